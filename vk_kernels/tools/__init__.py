"""What one runs from the command line: the shader build, checks, and reports."""
