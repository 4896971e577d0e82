"""Tables and panels for people, as text: as wide as the terminal, or as they need where standard output is none."""

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 1000  # columns: wider than any table
_PANEL = 120  # columns of a panel where there is no terminal


def printable(value: Any) -> str:
    """A value in one line, without what a terminal would take for a command."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def render(columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> str:
    """A table; the columns called in `numbers` are set to the right. What is in a cell is shown as it is, in one line.

    A terminal that is too narrow gets cells of several lines.
    """
    from rich import box  # only where a table is printed: it takes as long as all else here
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return _as_text(table, _WIDE)


def panels(contents: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> "RenderableType":
    """Panels below each other, a title and rows of name and value each; a terminal's width cuts the values."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    found = []
    for title, rows in contents:
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
        for name, value in rows:
            grid.add_row(name, Text(printable(value)))
        found.append(Panel(grid, title=Text(printable(title)), title_align="left"))
    return Group(*found)


def render_panels(contents: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Panels as text."""
    return _as_text(panels(contents), _PANEL)


def _as_text(content: "RenderableType", width: int) -> str:
    from rich.console import Console

    file = io.StringIO()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else width
    Console(file=file, width=width, color_system=None, legacy_windows=False).print(content)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")
