"""A report in Markdown."""

import re
from collections.abc import Iterable
from typing import Any

from gpt_jax.runs.content import (
    NO_DATA,
    Facts,
    Figure,
    Notes,
    Report,
    ReportBlock,
    Section,
    Table,
    Text,
    Timeline,
    TokenizedSentence,
)


def render(report: Report) -> str:
    """The whole report. A figure is the numbers behind it."""
    return "\n\n".join([f"# {report.title}", *map(render_section, report.sections)]) + "\n"


def render_section(section: Section) -> str:
    return f"## {section.title}\n\n{render_blocks(section.blocks)}"


def render_blocks(blocks: Iterable[ReportBlock]) -> str:
    return "\n\n".join(map(_block, blocks)) or NO_DATA


def _block(block: ReportBlock) -> str:
    match block:
        case Text(text):
            return text
        case Notes(items):
            return "\n".join(f"- {item}" for item in items)
        case Facts(rows):
            return "\n".join(f"- {name}: {value}" for name, value in rows)
        case Table():
            return _table(block)
        case Timeline(prompt, answers):
            parts = [f"**{said}**, {one_line(prompt)}\n\n{fenced(text)}" for said, text in answers]
            return "\n\n".join(parts)
        case TokenizedSentence(pieces):
            return _table(Table(("token", "id"), tuple((repr(text), number) for text, number in pieces)))
        case Figure(title, description, _, table):
            return f"**{title}.** {description}\n\n{_table(table)}"


def _table(table: Table) -> str:
    cells = [[f"{cell:,}" if isinstance(cell, int) else one_line(cell) for cell in row] for row in table.rows]
    rows = (table.columns, ["---"] * len(table.columns), *cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def one_line(text: Any) -> str:
    """Text in one line, as a table's cell may hold it."""
    return " ".join(str(text).split()).replace("|", "\\|")


def fenced(text: str) -> str:
    """Text as a block of code, whatever backticks it holds."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
