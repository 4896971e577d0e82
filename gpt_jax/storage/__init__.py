"""Files: whole or not at all, with errors of one line."""
