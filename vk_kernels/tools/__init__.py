"""Command-line tools: the shader build, checks, and reports."""
