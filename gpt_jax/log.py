"""The type of what functions tell their progress to."""

from collections.abc import Callable

Log = Callable[[str], None]  # takes a line
