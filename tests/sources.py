"""Facts about the tree's Python files, each of which is parsed once."""

import ast
import functools
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Source(NamedTuple):
    """Facts about one file, without its syntax tree: hundreds of those slow the garbage collector down.

    docstrings: of the module, its classes and its functions, with what each is of; empty where there is none.
    imports: all, in functions too. classes: those, and type aliases, at the top of the module.
    """

    docstrings: list[tuple[type[ast.AST], str]]
    imports: list[ast.Import | ast.ImportFrom]
    classes: set[str]


def python_files(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def read_source(file: Path) -> Source:
    module = ast.parse(file.read_bytes())
    docstrings, imports, nodes = [], [], [module]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            docstrings.append((type(node), ast.get_docstring(node) or ""))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):  # expressions hold none of these
            below = getattr(node, part, None)
            nodes += below if isinstance(below, list) else ()  # one expression, in a lambda or `a if b else c`
    return Source(docstrings, imports, set(_classes(module)))


def _classes(module: ast.Module) -> list[str]:
    found = []
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            names = (name.id for name in node.targets if isinstance(name, ast.Name))
            found += [name for name in names if name[:1].isupper() and not name.isupper()]
    return found
