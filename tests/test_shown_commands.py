"""Command lines that pages and docstrings show are taken as shown: each is read by its own program's parser."""

import argparse
import functools
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from test_docs import PAGES

from gpt_jax.cli import define_flags_of_command, parse_flags
from gpt_jax.config import validate

ROOT = Path(__file__).parents[1]
MODULE = r"\bpython -m ((?:gpt_jax|vk_kernels)\.[\w.]+)([^`\n]*)"
COMMAND = re.compile(MODULE + r"|(?:\bpython |`)(benchmarks/\w+\.py)([^`\n]*)")
SCRIPT = re.compile(r"\b(scripts/\w+\.(?:sh|py))((?: --\w+)*)")
CONFIG = "--config=configs/chat.py"


@functools.cache
def texts() -> dict[str, str]:
    """The pages, and the first docstrings of modules, by path; lines that go on are one."""
    found = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    for folder in ("gpt_jax", "vk_kernels", "benchmarks", "examples", "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            code = file.read_text()
            found[str(file.relative_to(ROOT))] = code.split('"""')[1] if code.startswith('"""') else ""
    return {name: re.sub(r"\\\n\s*|\n\s+(?=\[--)", " ", text) for name, text in found.items()}


def arguments_of(shown: str) -> list[str]:
    """A program's arguments as they are shown, optional ones too, without a remark or a pipe behind them."""
    shown = re.split(r" {3,}", shown)[0].replace(" or FOLDER", "")
    shown = re.sub(r"--config\.x\S*|\[|\]|(?<![ =])\.\.\.|(?<!^) \.\.\.", "", shown)
    words = shlex.split(shown, comments=True)
    return list(itertools.takewhile(lambda word: word not in (">", "|", "&", "&&"), words))


def shown_commands() -> list[tuple[str, str]]:
    """(program, what stands behind it) of all texts, each once."""
    found = [match for text in texts().values() for match in COMMAND.findall(text)]
    return sorted({(module or file, rest or more) for module, rest, file, more in found if rest or more})


def read_flags(program: str, words: list[str]) -> None:
    module = importlib.import_module("gpt_jax.runs.__main__" if program == "gpt_jax.runs" else program)
    values = flags.FlagValues()
    if program != "gpt_jax.main":
        module.define_flags(values)
        parse_flags([program, *words], values)
        return
    if not any(word.startswith("--config=configs/") for word in words):  # that of a run, or of the reader's choice
        assert words[0].startswith(("--workdir=", "...", "--config=..."))
        words = [CONFIG, *(word for word in words if word not in ("...", "--config=..."))]
    module.define_flags(values, [program, *words])
    parse_flags([program, *words], values)
    if "configs/finetune.py" not in str(words):  # whose model is the donor's
        validate(values.config)


class Taken(Exception):
    """A command line has been read, and nothing runs."""


def read_by_argparse(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    read = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *given: object) -> None:
        raise Taken(read(parser, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    name = "vk_kernels.tools.conformance.__main__" if program.endswith("conformance") else program
    module = importlib.import_module(Path(name).stem if name.endswith(".py") else name)
    with pytest.raises(Taken) as taken:
        module.main()
    return taken.value.args[0]


def look_up_cases(program: str, options: argparse.Namespace) -> None:
    """Raises where a benchmark's case is none."""
    benchmark = importlib.import_module("decode" if "decode" in program else "train_step")
    find = getattr(benchmark, "case_of", benchmark.CASES.__getitem__)
    for name in filter(None, [*getattr(options, "cases", "").split(","), getattr(options, "case", "")]):
        find(name)


@pytest.mark.parametrize(("program", "shown"), shown_commands())
def test_a_command_is_taken_as_it_is_shown(program, shown, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = arguments_of(shown)
    if program.startswith("gpt_jax."):
        read_flags(program, words)
    else:
        look_up_cases(program, read_by_argparse(program, words, monkeypatch))


OF_FLAGS = ("main", "chat", "serve", "sample", "evaluate", "export", "report", "runs", "watch")


@pytest.mark.parametrize("program", OF_FLAGS)
def test_help_shows_every_flag_of_a_command(program):
    module = importlib.import_module(f"gpt_jax.{program}" + (".__main__" if program == "runs" else ""))
    values = flags.FlagValues()
    define_flags_of_command(module.define_flags, values)
    shown = re.findall(r"^ +--(?:\[no\])?(\w+):", values.main_module_help(), re.MULTILINE)
    assert sorted(shown) == sorted(values)


def test_scripts_know_the_options_that_are_shown():
    for name, text in texts().items():
        for script, options in SCRIPT.findall(text):
            unknown = [each for each in options.split() if each not in (ROOT / script).read_text()]
            assert unknown == [], (name, script)


def test_what_make_is_asked_for_is_in_the_makefile():
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {found for text in texts().values() for found in re.findall(r"`make ([\w-]+)", text)}
    assert asked
    assert asked <= known


@pytest.mark.parametrize("program", ["train_step", "decode"])
def test_a_benchmark_names_its_cases_where_one_is_mistyped(program, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [program, "--cases=chat-bf61"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(program).main()
    assert "there is no case 'chat-bf61': give " in f"{ended.value} {capsys.readouterr().err}"
