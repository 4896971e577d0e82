"""Docstrings begin with a verb or the thing's name."""

import ast

import pytest
from sources import ROOT, python_files, read_source

NEVER = {"Of", "What", "Where"}
WITHOUT_SUBJECT = {"That", "Those", "As", "In", "For", "With"}


@pytest.mark.slow  # reads the whole tree
def test_no_docstring_begins_without_its_subject():
    found = []
    for folder in ("vk_kernels", "gpt_jax", "benchmarks", "examples", "configs", "tests"):
        for file in python_files(folder):
            for kind, text in read_source(file).docstrings:
                is_test = kind is ast.FunctionDef and folder == "tests"  # its name is the subject
                if {*text.split()[:1]} & (NEVER if is_test else NEVER | WITHOUT_SUBJECT):
                    found.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []
