"""The content of a report: sections of texts, lists, tables and figures, the same in every form that it is written in.

`markdown`, `page` and `report.json` are made of it; none of them knows where a number comes from.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NO_DATA = "No data yet."

Cell = int | str


@dataclasses.dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Notes:
    """Sentences, each for itself."""

    items: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and values, those alone that are known."""

    rows: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under columns; a whole number is an int, all else is written out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Answers to one prompt: what is said of each, as its step, and its text."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class TokenizedSentence:
    """A sentence in the pieces that a tokenizer makes of it, with their ids."""

    pieces: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart. x: its places, once for each of the chart's `x_names`; look: line, pale or points."""

    name: str
    x: tuple[list[float], ...]
    y: list[float | None]
    look: str = "line"


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines over one or, for the reader to choose from, several kinds of x."""

    x_names: tuple[str, ...]
    y_name: str
    lines: tuple[Line, ...]
    log: bool = False


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """values: a row for each name of y, its numbers in the order of x; log: whether the color is of the logarithm."""

    x_name: str
    x: list[str]
    y: list[str]
    values: list[list[float | None]]
    value_name: str
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Bars:
    """Horizontal bars: of each series one in each category, one after another (`stacked`) or side by side."""

    categories: tuple[str, ...]
    series: tuple[tuple[str, list[float]], ...]
    unit: str
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart, in a sentence what it shows, and the numbers behind it for those who cannot see it."""

    title: str
    description: str
    chart: Lines | HeatMap | Bars
    table: Table


ReportBlock = Text | Notes | Facts | Table | Timeline | TokenizedSentence | Figure


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it; nothing yet if there are no blocks."""

    title: str
    blocks: tuple[ReportBlock, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    title: str
    sections: tuple[Section, ...]


def make_facts(rows: Iterable[tuple[str, Any]]) -> list[ReportBlock]:
    """A list of what is known; no block if nothing is."""
    known = tuple((name, str(value)) for name, value in rows if value not in (None, "", {}))
    return [Facts(known)] if known else []


def make_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[ReportBlock]:
    """A table; no block if it has no rows."""
    cells = tuple(tuple(_cell(value) for value in row) for row in rows)
    return [Table(tuple(columns), cells)] if cells else []


def as_json(report: Report) -> dict[str, Any]:
    """A report as JSON has it: every block with its `kind`, every chart too."""
    return _described(report)


def _described(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__.lower(), **fields}
    return [_described(item) for item in value] if isinstance(value, tuple | list) else value


def _cell(value: Any) -> Cell:
    return int(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else str(value)
