"""Docstrings begin with a verb or the thing's name."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEVER = {"Of", "What", "Where"}
WITHOUT_SUBJECT = {"That", "Those", "As", "In", "For", "With"}


def test_no_docstring_begins_without_its_subject():
    found = []
    for folder in ("vk_kernels", "gpt_jax", "benchmarks", "examples", "configs", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node) or " "
                    is_test = isinstance(node, ast.FunctionDef) and folder == "tests"  # its name is the subject
                    if {*text.split()[:1]} & (NEVER if is_test else NEVER | WITHOUT_SUBJECT):
                        found.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []
