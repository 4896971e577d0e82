"""Checks a config before any work is done, so that a mistake costs one line and not an hour."""


class UserError(ValueError):
    """Something the user can mend; its message is one line that says how."""
