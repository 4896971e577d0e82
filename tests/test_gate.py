"""benchmarks/gate.py: what it says of a ratio, and which tree it measures against. Nothing is timed."""

import importlib
import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gate")


def test_a_case_that_got_slower_is_named(gate, monkeypatch, capsys, tmp_path):
    assert gate.verdict(0.99, 0.97) == ""
    assert gate.verdict(1.0, 0.97) == "slower by 3 %"
    assert gate.verdict(0.5, None) == "not in the table"
    table = tmp_path / "gate.json"
    table.write_text(json.dumps({"base": str(tmp_path), "ratios": {"chat-bf16": 0.9, "chat-f32": 1.0}}))
    monkeypatch.setattr(gate, "TABLE", table)
    found = iter([(10.0, 9.0), (10.0, 10.5), (10.0, 8.0)])
    monkeypatch.setattr(gate, "times", lambda *_: next(found))
    monkeypatch.setattr("sys.argv", ["gate.py"])
    assert gate.main() == 1
    assert "slower than the table by more than 3 %: chat-f32" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gate.py", "--cases", "chat-bf16", "--write"])
    assert gate.main() == 0
    assert json.loads(table.read_text()) == {"base": str(tmp_path), "ratios": {"chat-bf16": 0.8}}


def test_the_base_is_a_folder_or_a_revision(gate, tmp_path):
    with gate.tree_of(str(tmp_path)) as tree:
        assert tree == tmp_path.resolve()
    with pytest.raises(SystemExit, match=re.escape("found 'no-such-revision'")), gate.tree_of("no-such-revision"):
        pass


def test_a_tree_is_timed_by_its_own_program(gate, tmp_path):
    """Its packages may have other names than those of today."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "program.py").write_text("raise SystemExit('the program of the tree')")
    found = gate.measure("chat-bf16", "vulkan", 1, False, str(tmp_path / "caches"), tree=tmp_path)
    assert found == {"error": "the program of the tree"}


def test_the_table_is_of_cases_that_there_are(gate):
    train_step = importlib.import_module("train_step")
    assert set(json.loads(gate.TABLE.read_text())["ratios"]) <= set(train_step.CASES)
    fused = [name for name in train_step.CASES if train_step.can_fuse_attention(train_step.case_of(name).load())]
    assert fused == ["124m-plain-b4", "124m-plain-b16"]
