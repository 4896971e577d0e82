"""Tests draw the same in every run, but at night: one that draws anew fails now and then, and by no change."""

import ast

from sources import python_files


def test_every_test_that_draws_follows_the_profile():
    strays, drawing = [], 0
    for file in python_files("tests"):
        text = file.read_text()
        for node in ast.walk(ast.parse(text)) if "given(" in text else ():
            decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", ())]
            if any(each.startswith(("given(", "hypothesis.given(")) for each in decorators):
                drawing += 1
                strays += [] if any("PROFILE" in each for each in decorators) else [f"{file.name}::{node.name}"]
    assert strays == []
    assert drawing > 10
