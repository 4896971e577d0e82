"""Docstrings begin with a verb or the thing's name."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_docstring_begins_without_its_subject():
    found = []
    for folder in ("vk_kernels", "gpt_jax", "benchmarks", "examples", "configs", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node) or " "
                    if text.split()[:1] in (["Of"], ["What"], ["Where"]):
                        found.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []
