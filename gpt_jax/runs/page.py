"""A report as one HTML page that needs nothing from elsewhere: text, tables, and charts drawn by ECharts.

What a chart shows is in a table below it too, so the page says the same without a script, on paper and read aloud.
"""

import html
import json
import re
from pathlib import Path

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
    as_json,
)

FILES = Path(__file__).parent / "page_files"
LONG_TABLE = 30  # rows: a longer table is folded


def render(report: Report) -> str:
    """The whole page."""
    figures = [block for section in report.sections for block in section.blocks if isinstance(block, Figure)]
    numbers = {id(figure): number for number, figure in enumerate(figures)}
    data = json.dumps([as_json(figure.chart) for figure in figures], separators=(",", ":"), allow_nan=False)
    parts = {
        "title": html.escape(report.title),
        "contents": "".join(
            f'<li><a href="#{_anchor(section.title)}">{html.escape(section.title)}</a></li>'
            for section in report.sections
        ),
        "sections": "\n".join(_section(section, numbers) for section in report.sections),
        "style": _read("page.css"),
        "data": data.replace("<", "\\u003c"),  # no text of a run can end the script
        "library": _read("echarts.min.js"),
        "script": _read("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _read("page.html"))


def _section(section: Section, numbers: dict[int, int]) -> str:
    anchor = _anchor(section.title)
    body = "\n".join(_block(block, section.title, numbers) for block in section.blocks) or f"<p>{NO_DATA}</p>"
    return (
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{html.escape(section.title)}</h2>\n{body}\n</section>'
    )


def _block(block: ReportBlock, heading: str, numbers: dict[int, int]) -> str:
    match block:
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Notes(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Facts(rows):
            return (
                f"<dl>{''.join(f'<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd></div>' for a, b in rows)}</dl>"
            )
        case Table(_, rows):
            table = _table(block, heading)
            return table if len(rows) <= LONG_TABLE else _folded(f"{heading}: {len(rows)} rows", table)
        case Timeline(prompt, answers):
            steps = "".join(
                f"<li><h4>{html.escape(said)}</h4><p>{html.escape(text)}</p></li>" for said, text in answers
            )
            return f'<h3>{html.escape(prompt)}</h3>\n<ol class="timeline">{steps}</ol>'
        case TokenizedSentence(pieces):
            spans = "".join(_token(text, number) for text, number in pieces)
            return f'<ol class="tokens">{spans}</ol>'
        case Figure(title, description, _, table):
            name = html.escape(title)
            return (
                f"<figure>\n<figcaption><h3>{name}</h3><p>{html.escape(description)}</p></figcaption>\n"
                f'<div class="chart" data-chart="{numbers[id(block)]}" role="img" aria-label="Chart: {name}. '
                f'{html.escape(description)}"></div>\n{_folded(f"{title}: numbers", _table(table, title))}\n</figure>'
            )


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>\n{inside}\n</details>"


def _table(table: Table, caption: str) -> str:
    """A table that scrolls by itself where it is wider than the page, by keyboard too."""
    rows = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in table.rows]
    kinds = [' class="number"' if all(map(_is_number, column)) else "" for column in zip(*rows, strict=True)]
    names = zip(kinds, table.columns, strict=True)
    head = "".join(f'<th scope="col"{kind}>{html.escape(name)}</th>' for kind, name in names)
    body = "".join(f"<tr>{_row(row, kinds)}</tr>" for row in rows)
    name = html.escape(f"{caption}: {', '.join(table.columns)}")
    return (
        f'<div class="scroll" role="group" tabindex="0" aria-label="{name}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: list[str], kinds: list[str]) -> str:
    """The first cell is the name of the row."""
    cells = zip(kinds, map(html.escape, row), strict=True)
    tags = ('th scope="row"', "th"), *(("td", "td") for _ in row[1:])
    return "".join(f"<{tag}{kind}>{x}</{end}>" for (tag, end), (kind, x) in zip(tags, cells, strict=True))


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-|[-+]?[\d.,]+(e[-+]\d+)?( ?(%|s|min|[kMG]?B))?", cell))


def _token(text: str, number: int) -> str:
    """A token with its blanks made visible; its id is read too."""
    shown = text.replace(" ", "·").replace("\n", "↵").replace("\t", "→")
    return f"<li>{html.escape(shown)}<span>{number}</span></li>"


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _read(name: str) -> str:
    return (FILES / name).read_text(encoding="utf-8")
