"""The command for scripts: where prompts come from, what is printed, and mistakes at one line each."""

import io
import json
import sys

import pytest
from absl import flags
from stub_run import stub_run
from untrained_run import write_untrained_run

from gpt_jax import sample
from gpt_jax.cli import parse_flags
from gpt_jax.errors import UserError
from vk_kernels.errors import DeviceLostError


class Pipe(io.StringIO):
    """Standard input: a pipe, or with nothing to read, a terminal."""

    def isatty(self) -> bool:
        return not self.getvalue()


def set_flags(monkeypatch, *arguments: str, typed: str = "") -> list[str]:
    values = flags.FlagValues()
    sample.define_flags(values)
    monkeypatch.setattr(sample, "FLAGS", values)
    monkeypatch.setattr(sys, "stdin", Pipe(typed))
    return parse_flags(["sample", "--workdir=run", *arguments], values)


def test_a_run_that_is_left_out_is_asked_for_in_words():
    values = flags.FlagValues()
    sample.define_flags(values)
    with pytest.raises(UserError, match=r"^missing --workdir=\.\.\.: a run: its folder, latest or best; "):
        parse_flags(["sample", "a question"], values)


@pytest.fixture
def answers(monkeypatch, capsys):
    """The lines that the command prints, (stdout, stderr), where the model repeats the prompt in capitals."""

    def say(prompt, options):
        return f" {prompt.split('<|user|>')[1].split('<|assistant|>')[0].upper()} {options.seed % 1000}"

    def run(*arguments: str, typed: str = "") -> tuple[list[str], list[str]]:
        argv = set_flags(monkeypatch, *arguments, typed=typed)
        with stub_run(say) as (served, _):
            monkeypatch.setattr(sample, "open_run", lambda *_, **__: served)
            assert sample.main(argv) == 0
        return tuple(stream.splitlines() for stream in capsys.readouterr())

    return run


def test_one_answer_is_all_that_standard_output_has(answers):
    out, err = answers("a question", "--seed=7")
    assert out == ["A QUESTION 7"]
    assert err[0] == "a stub; none"
    assert "tokens in" in err[1]
    assert "a second, compilation included" in err[1]
    assert answers("--prompt=a question", "--seed=7")[0] == out


def test_prompts_come_from_arguments_a_file_or_a_pipe_and_answers_in_their_order(answers, tmp_path):
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\nan a\n  an b \n\n")
    rows.write_text('{"prompt": "an a", "id": 1}\n{"prompt": "an b"}\n')
    expected = ["> an a", "AN A 1", "", "> an b", "AN B 1", ""]
    assert answers("an a", "an b", "--seed=1")[0] == expected
    assert answers("--seed=1", typed=lines.read_text())[0] == expected
    assert answers("--seed=1", typed=rows.read_text())[0] == expected
    assert answers(f"--prompts={lines}", "--seed=1")[0] == expected
    assert answers(f"--prompts={rows}", "--seed=1", typed="not read")[0] == expected
    assert answers("an a", f"--prompts={lines}", "--seed=1")[0] == expected[:3] + expected


def test_json_lines_say_by_which_seed_each_of_n_answers_comes_again(answers):
    out, _ = answers("an a", "an b", "--n=2", "--json")
    rows = [json.loads(line) for line in out]
    assert [(row["prompt"], row["choice"]) for row in rows] == [("an a", 0), ("an a", 1), ("an b", 0), ("an b", 1)]
    assert len({row["seed"] for row in rows}) == 4
    for row in rows:
        assert row["text"] == f"{row['prompt'].upper()} {row['seed'] % 1000}"
        assert row["finish_reason"] == "stop"
        [again], _ = answers(row["prompt"], f"--seed={row['seed']}")
        assert again == row["text"]


def test_a_token_that_cannot_be_has_a_number_of_json(answers):
    [row] = [json.loads(line, parse_constant=pytest.fail) for line in answers("an a", "--logprobs=3", "--json")[0]]
    assert [logprob for _, logprob in row["logprobs"][0]["top"]] == pytest.approx([-0.6931, -1.3863, -9999], abs=1e-4)


def test_an_answer_ends_before_a_stop_string_and_at_max_tokens(answers):
    [row] = map(json.loads, answers("an a an b", "--stop=N B", "--stop=nowhere", "--json")[0])
    assert (row["text"], row["finish_reason"]) == ("AN A A", "stop")
    [row] = map(json.loads, answers("an a an b", "--max_tokens=3", "--json")[0])
    assert (row["tokens"], row["finish_reason"]) == (3, "length")


MISTAKES = [
    ((), "", "there is no prompt: give some as arguments, by --prompts=FILE or in a pipe"),
    ((), "\n\n", "there is no prompt"),
    (("--prompts=nowhere",), "", "nowhere"),
    ((), '{"prompt": "a"}\nb', "standard input, line 2: no JSON, as the first line is: "),
    ((), '{"text": "a"}', 'standard input, line 1: must be a JSON object with a text under "prompt", found'),
    ((), '{"prompt": 5}', 'line 1: must be a JSON object with a text under "prompt", found'),
    ((), '{"prompt": "\\ud800"}', r"line 1: a prompt must be text in UTF-8, found '\ud800' in it"),
    (("a", "\udcff"), "", r"prompt 2 of the command line must be text in UTF-8, found '\udcff' in it"),
    (
        ("a", "z" * 500),
        "",
        "prompt 2: the message has 502 tokens with their markers, and the model sees 400",
    ),
    (("a", "--n=0"), "", "--n must be a whole number from 1 to 1000, found 0"),
    (("a", "--n=x"), "", "flag --n=x: must be a whole number"),
    (("a", "--top_p=0"), "", "--top_p must be a number in (0, 1], found 0"),
    (("a", "--min_p=nan"), "", "--min_p must be a number in [0, 1], found nan"),
    (("a", "--repetition_penalty=0"), "", "--repetition_penalty must be a number in (0, inf), found 0"),
    (("a", "--presence_penalty=3"), "", "--presence_penalty must be a number in [-2, 2], found 3"),
    (("a", "--frequency_penalty=-3"), "", "--frequency_penalty must be a number in [-2, 2], found -3"),
    (("a", "--logprobs=21", "--json"), "", "--logprobs must be a whole number from 0 to 20, found 21"),
    (("a", "--logprobs=2"), "", "--logprobs is told in JSON alone: add --json"),
    (("a", "--stop="), "", "--stop[0] must be text of 1 or more characters, found ''"),
]


@pytest.mark.parametrize(("arguments", "typed", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_costs_one_line(arguments, typed, message, answers):
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        answers(*arguments, typed=typed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_is_no_utf8_is_named(monkeypatch, tmp_path):
    file = tmp_path / "prompts"
    file.write_bytes(b"\xff\xfe")
    set_flags(monkeypatch, f"--prompts={file}")
    with pytest.raises(UserError, match="prompts is not text in UTF-8"):
        list(sample.find_prompts([]))


def test_a_device_that_fails_while_it_answers_costs_one_line(monkeypatch, capsys):
    def fail(number):
        raise DeviceLostError("the device was lost")

    argv = set_flags(monkeypatch, "a question")
    with stub_run(lambda prompt, options: "an answer", pace=fail) as (served, _):
        monkeypatch.setattr(sample, "open_run", lambda *_, **__: served)
        assert sample.main(argv) == 1
    assert capsys.readouterr().err.splitlines()[1:] == ["error: the device was lost"]


@pytest.mark.slow
def test_a_run_answers_alike_by_the_same_seed(monkeypatch, capsys, tmp_path):
    folder = write_untrained_run(tmp_path / "run")
    asked = ["a question", "--seed=3", "--n=2", "--max_tokens=4", "--logprobs=2", "--json"]

    def answered() -> list[dict]:
        argv = set_flags(monkeypatch, f"--workdir={folder}", *asked)
        assert sample.main(argv) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    rows = answered()
    assert rows == answered()
    assert rows[0]["text"] != rows[1]["text"]
    assert [len(row["logprobs"]) for row in rows] == [row["tokens"] for row in rows]
    assert all(token["logprob"] < 0 for row in rows for token in row["logprobs"])
    assert all(len(token["top"]) == 2 for row in rows for token in row["logprobs"])
