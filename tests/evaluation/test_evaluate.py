"""The command that evaluates: its figures beside plain NumPy's, what it prints, and mistakes at one line each."""

import contextlib
import functools
import hashlib
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from tiny_run import tiny
from vulkan_devices import SELECTOR, needs_vulkan

from gpt_jax import evaluate
from gpt_jax.backend import enter_backend
from gpt_jax.cli import parse_flags
from gpt_jax.data import token_cache
from gpt_jax.data.batches import MASKED
from gpt_jax.data.corpus import is_validation, read_corpus
from gpt_jax.data.dialogue import TEXT, Context, Dialogue, Part, Turn
from gpt_jax.data.tokenizer import encode, encode_dialogues, encode_prompt
from gpt_jax.errors import UserError
from gpt_jax.evaluation.encoding import Encoding
from gpt_jax.evaluation.open_model import open_model
from gpt_jax.evaluation.results import as_json, may_replace
from gpt_jax.evaluation.scorer import Scorer
from gpt_jax.evaluation.sources import validation_texts
from gpt_jax.evaluation.windows import Window
from gpt_jax.huggingface.donor import read_donor
from gpt_jax.model.gpt import GPT, ModelConfig
from gpt_jax.storage.files import StorageError
from vk_kernels import OutOfMemoryError

BLOCK = 32
OLD_GPT2 = f"hf:{Path(__file__).parents[1] / 'huggingface' / 'models' / 'old'}"


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command; returns what it printed on standard output and on standard error."""

    def run(*arguments: str) -> tuple[str, str]:
        values = flags.FlagValues()
        evaluate.define_flags(values)
        monkeypatch.setattr(evaluate, "FLAGS", values)
        assert evaluate.main(parse_flags(["evaluate", *arguments], values)) == 0
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def log_probabilities(run):
    """A function of up to 32 tokens: the model's own logarithms of probabilities of the next one, f64 (n, V)."""
    opened = open_model(str(run))
    model = GPT(ModelConfig.from_config(opened.config.model))

    @jax.jit
    def logits(tokens):
        return model.apply({"params": opened.params}, tokens) @ opened.params["head"]

    def of(tokens: list[int]) -> np.ndarray:
        rows = np.asarray(logits(np.pad(tokens, (0, BLOCK - len(tokens)))[None]), np.float64)[0, : len(tokens)]
        shifted = rows - rows.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    return of


def validation_dialogues(run: Path) -> list:
    return [d for d in read_corpus(str(run.parent / "chats.jsonl")) if is_validation(d.source, 0.3)]


def folder_state(folder: Path) -> dict[str, tuple]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "targets", "batch_size"), [(32, "all", 8), (5, "all", 3), (32, "assistant", 1)])
def test_the_figures_are_those_of_a_plain_computation(stride, targets, batch_size, run, command, log_probabilities):
    tokenizer = open_model(str(run)).tokenizer
    dialogues = validation_dialogues(run)
    encoded = encode_dialogues(tokenizer, dialogues)
    stream = np.concatenate([[2], *(ids for ids, _ in encoded)])  # behind a marker of an end
    said = np.concatenate([[0], *(said for _, said in encoded)])
    windows = functools.cache(lambda number: log_probabilities(stream[number * stride :][:BLOCK]))
    nats, text_nats = [], []
    for i in range(1, len(stream)):
        number = max(0, -(-(i - BLOCK) // stride))
        loss = -windows(number)[i - 1 - number * stride, stream[i]]
        if targets == "all" or said[i]:
            nats.append(loss)
            text_nats += [loss] if stream[i] > 2 else []
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    size = sum(len(turn.text.encode()) for turn in turns if targets == "all" or turn.role == "assistant")

    out, _ = command(str(run), "--json", f"--stride={stride}", f"--targets={targets}", f"--batch_size={batch_size}")
    [model] = json.loads(out)["models"]
    [found] = model["likelihood"]
    assert (found["documents"], found["tokens"], found["text_bytes"]) == (len(dialogues), len(nats), size)
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(np.sum(text_nats) / math.log(2) / size, rel=1e-6)
    assert model["total"] == {name: value for name, value in found.items() if name != "source"}


@pytest.mark.slow
def test_two_models_compare_in_one_table_and_nothing_of_their_folders_is_written(run, command, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "a question", "completion": "an answer"}\n')
    before = folder_state(run)
    asked = (f"{run}@1", f"{run}@2", f"--validation_of={run}", f"--data={more}", "--stride=16")
    table, told = command(*asked, f"--output={tmp_path / 'found.json'}")
    assert folder_state(run) == before
    lines = [line.split() for line in table.splitlines()[2:]]
    sources = [str(more), str(run.parent / "chats.jsonl")]
    assert [line[:2] for line in lines[:4]] == [[source, f"{run}@{step}"] for source in sources for step in (1, 2)]
    assert [line[:4] for line in lines[4:]] == [["all", "of", "it", f"{run}@{step}"] for step in (1, 2)]
    assert f"{run}@2: the checkpoint {run}/checkpoints/2; xla (asked for)" in told

    written = (tmp_path / "found.json").read_text()
    assert command(*asked, "--json")[0] == written  # the same to the last digit
    for model in json.loads(written)["models"]:
        assert model["total"]["tokens"] == sum(each["tokens"] for each in model["likelihood"])
        assert model["total"]["nats"] == pytest.approx(sum(each["nats"] for each in model["likelihood"]))
        shown = [line for line in lines if model["model"] in line]
        assert [line[-5] for line in shown] == [
            f"{each['loss']:.4f}" for each in (*model["likelihood"], model["total"])
        ]


@pytest.mark.slow
def test_data_that_is_not_what_the_run_had_is_told(run, command, tmp_path):
    dialogues = validation_dialogues(run)
    size = sum(len(turn.text.encode()) for dialogue in dialogues for turn in dialogue.turns)
    info = run / "run.json"
    for count, expected in ((len(dialogues), ""), (len(dialogues) + 1, "warning: the validation data of ")):
        info.write_text(json.dumps({"data": {"validation": {"dialogues": count, "bytes": size}}}))
        told = command(str(run), "--batch_size=3")[1]
        assert ("warning" in told) == bool(expected)
        assert expected in told
    info.unlink()


def test_parts_of_a_long_document_end_where_they_end_in_training(tmp_path):
    """The tokens of a validation split and of what is evaluated are the same, markers too."""
    (tmp_path / "book.txt").write_text("\n\n".join(f"Chapter {n} tells of {n * n} things." for n in range(12_000)))
    config = tiny(tmp_path / "book.txt")
    prepared = token_cache.prepare(config.data, config.model.vocab_size, lambda line: None)
    encoding = Encoding(prepared.tokenizer, config.model.vocab_size)
    recorded = {name: prepared.stats["validation"][name] for name in ("dialogues", "bytes")}
    told = []
    texts = [text for _, text in validation_texts(config, recorded, told.append)]
    ids = np.concatenate([encoding.dialogue(text, "all")[0] for text in texts])
    np.testing.assert_array_equal(ids, prepared.validation[0].ids)
    assert [line for line in told if "warning" in line] == []
    closed = sum(not isinstance(text, Part) for text in texts)
    assert closed == np.count_nonzero(ids == encoding.start) > 3


@pytest.mark.slow
def test_two_sources_of_one_name_are_two_rows(run, command, tmp_path):
    data = str(run.parent / "chats.jsonl")
    found = json.loads(command(str(run), f"--data={data}", f"--validation_of={run}", "--json")[0])["models"][0]
    counts = {each["source"]: each["documents"] for each in found["likelihood"]}
    assert counts == {data: 60, f"{data}, of the validation": len(validation_dialogues(run))}


@pytest.mark.parametrize("content", ['{"messages": []}\n', "a text", '{"format_version": 1}', "[1]"])
def test_output_takes_the_place_of_results_alone(content, run, command, tmp_path):
    file = tmp_path / "there"
    file.write_text(content)
    lost = r"there is a folder, or a file of something else that would be lost: give another name"
    with pytest.raises(UserError, match=lost):
        command(str(run), f"--output={file}", f"--data={run.parent / 'chats.jsonl'}")
    assert file.read_text() == content
    file.write_text("")
    assert may_replace(file)
    file.write_text(as_json([]))
    assert may_replace(file)
    assert may_replace(tmp_path / "none")
    assert not may_replace(tmp_path)
    assert may_replace(Path("/dev/stdout"))


@pytest.mark.parametrize(
    ("other", "message"), [("nowhere", "there is no run nowhere"), (OLD_GPT2, "no data of its own")]
)
def test_a_model_that_cannot_be_measured_is_told_before_any_is(other, message, run, command, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_model", lambda *_: pytest.fail("one is measured"))
    with pytest.raises(UserError, match=message):
        command(str(run), other)


def test_figures_are_printed_before_a_disk_that_is_full(run, monkeypatch, capsys):
    values = flags.FlagValues()
    evaluate.define_flags(values)
    monkeypatch.setattr(evaluate, "FLAGS", values)
    arguments = parse_flags(
        ["evaluate", str(run), f"--data={run.parent / 'chats.jsonl'}", "--output=/dev/full"], values
    )
    with pytest.raises(StorageError):
        evaluate.main(arguments)
    assert "chats.jsonl" in capsys.readouterr().out


QUESTIONS = [
    ("a question", ["an answer", "another question and an answer", "q"], 0),
    ("another", ["question", "answer"], 1),
    ("an answer, " * 12, ["a question", "and"], 1),  # longer than the model sees
]


@pytest.mark.parametrize("prompts", ["chat", "text"])
def test_choices_are_taken_by_likelihood_and_by_likelihood_a_character(
    prompts, run, command, log_probabilities, tmp_path
):
    tokenizer = open_model(str(run)).tokenizer
    file = tmp_path / "choices.jsonl"
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    acc, acc_norm = [], []
    for question, choices, answer in QUESTIONS:
        if prompts == "chat":
            context = encode_prompt(tokenizer, [Turn("user", question.strip())])
            continuations = [encode(tokenizer, choice) for choice in choices]
        else:
            context = encode(tokenizer, question.strip())
            continuations = [encode(tokenizer, f" {choice}") for choice in choices]
        sums = []
        for ids in continuations:
            tokens = [*context, *ids][-BLOCK - 1 :]
            found = log_probabilities(tokens[:-1])[range(len(tokens) - 1), tokens[1:]]
            sums.append(found[-len(ids) :].sum())
        acc.append(np.argmax(sums) == answer)
        acc_norm.append(np.argmax(sums / np.array([len(choice) for choice in choices])) == answer)

    out, _ = command(str(run), f"--choices={file}", f"--prompts={prompts}", "--json")
    [model] = json.loads(out)["models"]
    [found] = model["choices"]
    assert (model["likelihood"], model["total"]) == ([], None)
    assert (found["questions"], found["contexts_cut"]) == (3, 1)
    assert (found["acc"], found["acc_norm"]) == (np.mean(acc), np.mean(acc_norm))
    assert found["acc_stderr"] == pytest.approx(np.std(acc, ddof=1) / math.sqrt(3))


def write_last_words(file: Path, run: Path, log_probabilities) -> list[float]:
    """Writes a text whose last word is the model's own, and others; returns the losses of the words."""
    tokenizer = open_model(str(run)).tokenizer
    words = [" question", " answer", " another", " and", " a"]
    context = "a question and an answer,"
    ids = encode(tokenizer, context)
    losses = []
    for word in words:
        whole = [*ids, *encode(tokenizer, word)]
        found = log_probabilities(whole[:-1])[len(ids) - 1 :]
        losses.append(-sum(row[token] for row, token in zip(found, whole[len(ids) :], strict=True)))
    rows = [{"text": context + word + "\n"} for word in words[:3]]
    rows += [{"context": context, "target": word} for word in words[3:]]
    file.write_text("\n".join(map(json.dumps, rows)))
    return losses


def test_last_words_have_a_perplexity(run, command, log_probabilities, tmp_path):
    losses = write_last_words(tmp_path / "words.jsonl", run, log_probabilities)
    [found] = json.loads(command(str(run), f"--last_word={tmp_path / 'words.jsonl'}", "--json")[0])["models"][0][
        "last_word"
    ]
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["questions"] == 5


def make_scorer(run: Path, backend: str, stack: contextlib.ExitStack) -> Scorer:
    opened = open_model(str(run))
    model = GPT(ModelConfig.from_config(opened.config.model))
    return Scorer(model, opened.params, enter_backend(backend, "highest", stack), batch_size=2)


def answers_of_two_tokens(log_probabilities) -> tuple[list[Window], list[bool], list[float]]:
    """Windows that end with the two likeliest tokens in turn, and the same with another token for one of them."""
    windows, hits, sums = [], [], []
    for change in ((0, 0), (1, 0), (0, 1)):
        tokens = [5, 70, 71, 72]
        for add in change:
            tokens.append((int(log_probabilities(tokens)[-1].argmax()) + add) % 270)
        whole = np.array(tokens, np.int32)
        windows.append(Window(whole[:-1], np.where(np.arange(5) < 3, MASKED, whole[1:]).astype(np.int32)))
        found = log_probabilities(tokens[:-1])
        sums.append(-found[3, tokens[4]] - found[4, tokens[5]])
        hits.append(change == (0, 0))
    return windows, hits, sums


def test_an_answer_counts_where_each_of_its_tokens_is_the_likeliest(run, log_probabilities):
    windows, hits, sums = answers_of_two_tokens(log_probabilities)
    with contextlib.ExitStack() as stack:
        found = list(make_scorer(run, "xla", stack).losses_and_hits(windows, width=16, most=3))
    assert [hit for _, hit in found] == hits
    assert [losses.sum() for losses, _ in found] == pytest.approx(sums, rel=1e-5)


@pytest.mark.slow
@needs_vulkan
def test_vulkan_gives_the_figures_of_xla(run, log_probabilities, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_DEVICE", SELECTOR)
    windows, hits, sums = answers_of_two_tokens(log_probabilities)
    with contextlib.ExitStack() as stack:
        scorer = make_scorer(run, "vulkan", stack)
        found = list(scorer.losses_and_hits(windows, width=16, most=2))
        alone = [losses for _, losses in scorer.losses(windows, width=16)]
    assert [hit for _, hit in found] == hits
    assert [losses.sum() for losses, _ in found] == pytest.approx(sums, rel=1e-4)
    assert [losses.sum() for losses in alone] == pytest.approx(sums, rel=1e-4)


ROW = '{"question": "q", "choices": ["a", "b"], "answer": 0}'
MISTAKES = [
    (("nowhere",), "", "there is no run nowhere"),
    (("{run}@9",), "", "has no checkpoint '9': there are 1, 2, best and latest"),
    (("{run}", "--data=nowhere"), "", "data source 'nowhere' does not exist"),
    (("{run}", "--data={file}"), "\n", "data source '{file}' holds no dialogue and no text"),
    (("{run}", "--validation_of=nowhere"), "", "there is no run nowhere"),
    (("{run}", f"--validation_of={OLD_GPT2}"), "", f"{OLD_GPT2} has no data of its own: give a run"),
    (("{run}", "--data={file}", "--data={file}"), "", "--data={file} is given twice: give it once"),
    (("{run}", "--choices={file}", "--choices={file}"), "", "--choices={file} is given twice: give it once"),
    (("{run}", "--stride=33"), "", "--stride is 33, and {run} sees 32 tokens at once: lower it"),
    (("{run}", "--stride=0"), "", "--stride must be a whole number from 1 to"),
    (("{run}", "--batch_size=x"), "", "flag --batch_size=x: must be a whole number"),
    (("{run}", "--targets=user"), "", "--targets=user: value should be one of <all|assistant>"),
    (("{run}", "--output=nowhere/x.json"), "", "--output=nowhere/x.json: there is no folder nowhere"),
    (("{run}", "--choices=nowhere"), "", "nowhere does not exist: give JSON lines"),
    (("{run}", "--choices={file}"), "\n", "holds no question"),
    (("{run}", "--choices={file}"), "[1]", "{file}:1: found '[1]' where a JSON object must be"),
    (("{run}", "--choices={file}"), ROW + "\n{", "{file}:2: not valid JSON"),
    (("{run}", "--choices={file}"), "[" * 100_000, "{file}:1: not valid JSON"),
    (("{run}", "--choices={file}"), '{"choices": ["a", "b"]}', 'neither "question" nor "context", found'),
    (("{run}", "--choices={file}"), '{"question": "q"}', '"choices" must be a list of two texts or more, found'),
    (("{run}", "--choices={file}"), '{"question": "q", "choices": ["a", 1], "answer": 0}', "choice must be text"),
    (("{run}", "--choices={file}"), ROW.replace("0", "2"), "must be the place of the right choice, 0 to 1, found"),
    (("{run}", "--choices={file}"), ROW.replace("0", '"A"'), "must be the place of the right choice, 0 to 1, found"),
    (("{run}", "--choices={file}"), ROW.replace('"a"', '" "'), "choice is empty"),
    (("{run}", "--choices={file}"), ROW.replace('"a"', json.dumps("x" * 99)), "{file}:1: an answer of "),
    (
        ("{run}", "--choices={file}"),
        '{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}',
        "must be text in UTF-8",
    ),
    (("{run}", "--last_word={file}"), ROW, 'has neither "text" nor "context" and "target", found'),
    (
        ("{run}", "--last_word={file}"),
        '{"text": "word"}',
        "text has one word, and the last of two or more is asked for",
    ),
    (("{run}", "--last_word={file}"), '{"context": "a", "target": ""}', "target is empty"),
    (("{run}", "--last_word={file}"), b"\xff\xfe", "is not text in UTF-8"),
]


@pytest.mark.parametrize(("arguments", "content", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_costs_one_line(arguments, content, message, run, command, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        command(*(argument.format(run=run, file=file) for argument in arguments))
    assert message.format(run=run, file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_device_that_has_no_room_costs_one_line(run, monkeypatch, capsys):
    def fail(names):
        raise OutOfMemoryError("no room for 5 GB")

    monkeypatch.setattr(evaluate, "evaluate", fail)
    assert evaluate.main(["evaluate", "run"]) == 1
    line = "error: no room for 5 GB; a smaller --batch_size or --backend=xla, without Vulkan, may help"
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.slow
def test_a_model_of_transformers_has_the_figures_that_it_has_there(command, tmp_path):
    """As record_transformers.py recorded them; text in place of the markers, which its tokenizer has not."""
    here = Path(__file__).parent
    recorded = json.loads((here / "transformers.json").read_text())
    for name in ("dialogues", "choices", "last_words"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, recorded[name])))
    model = f"hf:{here.parent / 'huggingface' / 'models' / 'old'}"
    asked = [model, "--json", "--backend=xla", f"--data={tmp_path / 'dialogues.jsonl'}"]
    questions = [f"--choices={tmp_path / 'choices.jsonl'}", f"--last_word={tmp_path / 'last_words.jsonl'}"]
    for stride, sums in recorded["sums"].items():
        [found] = json.loads(command(*asked, *questions, f"--stride={stride}")[0])["models"]
        total = found["total"]
        assert (total["tokens"], total["text_bytes"]) == (sums["tokens"], recorded["bytes"])
        assert (total["nats"], total["text_nats"]) == pytest.approx((sums["nats"], sums["text_nats"]), rel=1e-5)
    assert found["choices"][0]["acc"] == recorded["acc"]
    assert found["choices"][0]["acc_norm"] == recorded["acc_norm"]
    assert found["last_word"][0]["acc"] == recorded["last_word_acc"]
    assert math.log(found["last_word"][0]["perplexity"]) == pytest.approx(recorded["last_word_nats"], rel=1e-5)


def test_without_markers_the_end_of_text_closes_what_is_whole_and_counts_as_what_is_before_it():
    donor = read_donor(str(Path(__file__).parents[1] / "huggingface" / "models" / "old"))
    encoding = Encoding(donor.tokenizer, 262, donor.end_of_text)

    def spelled(dialogue: Dialogue, targets: str = "all") -> list[str]:
        """The tokens that count, and as dots those that do not."""
        ids, counted = encoding.dialogue(dialogue, targets)
        spelled = [encoding.tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        return ["." if not counts else text for text, counts in zip(spelled, counted, strict=True)]

    question, answer, unsaid = Turn("user", "a"), Turn("assistant", "b"), Context("assistant", "c")
    assert spelled(Part("source", (Turn(TEXT, "ab"),))) == ["a", "b"]
    assert spelled(Dialogue("source", (Turn(TEXT, "ab"),))) == ["a", "b", "<|endoftext|>"]
    assert spelled(Dialogue("source", (question, answer))) == ["a", ".", ".", "b", "<|endoftext|>"]
    assert spelled(Dialogue("source", (question, answer)), "assistant") == [".", ".", ".", "b", "<|endoftext|>"]
    assert spelled(Dialogue("source", (question, unsaid))) == ["a", ".", ".", ".", "."]
    assert spelled(Dialogue("source", (Turn(TEXT, "ab"),)), "assistant") == [".", ".", "."]


def test_a_source_of_which_nothing_counts_is_told(run, command, tmp_path):
    (tmp_path / "plain.txt").write_text("a question")
    out, told = command(str(run), f"--data={tmp_path}/plain.txt", "--targets=assistant", "--json")
    assert f"warning: {tmp_path}/plain.txt: nothing counts, targets are assistant (--targets)" in told
    assert json.loads(out)["models"][0]["total"]["loss"] == "NaN"


@pytest.mark.slow
def test_a_model_without_data_or_markers_says_what_to_give(command):
    with pytest.raises(UserError, match=r"hf:.* has no data of its own: give --data=FILE or --validation_of=RUN"):
        command(OLD_GPT2, "--backend=xla")
    with pytest.raises(UserError, match=r"--prompts=chat: the tokenizer of hf:.* has no markers of turns"):
        command(OLD_GPT2, "--backend=xla", "--prompts=chat", "--data=default")
    with pytest.raises(UserError, match=r"has no tokenizer: put its tokenizer.json there"):
        command(OLD_GPT2.replace("old", "tied"), "--backend=xla", "--data=default")
