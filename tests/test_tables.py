"""Panels: what a terminal is too narrow for."""

from gpt_jax.tables import render_panels


def test_a_long_value_is_cut_and_its_name_stays():
    lines = render_panels([("run", [("loss", "1.5"), ("sample", "word " * 80)])]).splitlines()
    assert [line.split()[1] for line in lines[1:3]] == ["loss", "sample"]
    assert lines[2].endswith("\u2026 \u2502")
    assert {len(line) for line in lines} == {120}
