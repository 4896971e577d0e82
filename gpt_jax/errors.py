"""The error that commands print as one line."""


class UserError(ValueError):
    """Something the user can mend; its message is one line that says how. A command exits with `exit_code`."""

    exit_code = 2
