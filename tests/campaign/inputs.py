"""Bad inputs, from tables: each costs one line on stderr and a non-zero exit, and leaves nothing behind."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from runs import REPORT, SAMPLE, TRAIN, Tiny
from zygote import Process

from gpt_jax.config import FIELDS

Outcome = tuple[str, str]


class Bad(NamedTuple):
    kind: str
    command: str
    arguments: list[str]


def _values(name: str) -> list[str]:
    """Texts on a command line that a setting cannot have."""
    field = FIELDS[name]
    if field.kind is bool:
        return ["maybe", "2", "None"]
    if field.kind is tuple:
        return ["5", "[1,2]"]
    if field.kind is str:
        return ["nonsense", "XLA"] if field.choices else ["\udcff"]
    texts = ["many", "", "nan", "1e999", str(field.low - 1)]
    texts += ["1.5", str(2**70)] if field.kind is int else ["inf", "-inf", "1,5"]
    if field.open_low:
        texts.append(str(field.low))
    if field.high != float("inf"):
        texts.append(str(field.high + 1))
    return texts


def _settings(tiny: Tiny, workdir: Path) -> Iterator[Bad]:
    for name in FIELDS:
        for value in _values(name):
            yield Bad("a value of a setting", TRAIN, tiny.flags(workdir, f"--config.{name}={value}"))
        yield Bad("a name of a setting", TRAIN, tiny.flags(workdir, f"--config.{name[:-1]}x=1"))


def _contradictions(tiny: Tiny, workdir: Path) -> Iterator[Bad]:
    for changes in (
        ["model.num_heads=3"],
        ["batch_size=3", "accumulate_steps=2"],
        ["optimizer.min_learning_rate=1"],
        ["optimizer.warmup_steps=5000"],
        ["model.vocab_size=100"],
        ["model.block_size=100000"],
        ["init_from=nowhere"],
        ["data.tokenizer=README.md"],
        ["data.tokenizer=nowhere.json"],
        ["data.validation_fraction=0.0001"],
        ["data.source=nowhere.txt"],
        ["data.source="],
        ["data.source=nowhere/"],
        ["data.mixture=nowhere.txt"],
        ["data.validation=nowhere.txt"],
        ["data.weights=(1,2)"],
        ["data.source=default", "data.mixture=('default','default')"],
        ["data.source=default", "data.mixture=('default',)", "data.weights=(0,)"],
        ["data.source=hf:"],
    ):
        yield Bad("settings together", TRAIN, tiny.flags(workdir, *(f"--config.{change}" for change in changes)))


def _flags(tiny: Tiny, workdir: Path, run: Path) -> Iterator[Bad]:
    for extra in (
        "--wrkdir=x",
        "extra",
        "--config.model",
        "--nope",
        "--workdir=",
        "--config.model=5",
        "--config.x.y=1",
    ):
        yield Bad("a flag", TRAIN, tiny.flags(workdir, extra))
    yield Bad("a flag", TRAIN, [])
    yield Bad("a flag", TRAIN, [f"--workdir={workdir}"])
    for extra in (
        *("--temperature=-1", "--temperature=nan", "--temperature=x", "--top_k=-1", "--top_k=x", "--max_tokens=0"),
        *("--max_tokens=x", "--seed=-1", f"--seed={2**70}", "--backend=cuda", "--prompt=\udcff", "--nope", "\udcff"),
        *("--top_p=0", "--top_p=nan", "--min_p=2", "--repetition_penalty=0", "--presence_penalty=3", "--n=0", "--n=x"),
        *("--frequency_penalty=-3", "--stop=", "--logprobs=21", "--logprobs=1", "--prompts=nowhere"),
    ):
        yield Bad("a flag of sample", SAMPLE, [f"--workdir={run}", "--prompt=hi", extra])
    yield Bad("a flag of sample", SAMPLE, ["--prompt=hi"])
    for folder in ("nowhere", "README.md", "tests", ""):
        yield Bad("a folder for sample", SAMPLE, [f"--workdir={folder}", "--prompt=hi"])
        yield Bad("a folder for report", REPORT, [folder])
    yield Bad("a flag of report", REPORT, [])
    yield Bad("a flag of report", REPORT, [str(run), "extra"])
    yield Bad("a flag of report", REPORT, ["--nope", str(run)])


_CHANGED = "from configs import chat\ndef get_config():\n    c = chat.get_config()\n    c.{}\n    return c\n"
_CONFIG_FILES = {
    "empty.py": "",
    "syntax.py": "def get_config(:\n",
    "raises.py": "def get_config():\n    raise ValueError('two\\nlines')\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "imports.py": "import nowhere_to_be_found\n",
    "none.py": "def get_config():\n    return None\n",
    "dict.py": "def get_config():\n    return {'num_steps': 3}\n",
    "lacks.py": "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'num_steps': 3})\n",
    "typo.py": _CHANGED.format("num_stepz = 3"),
    "kind.py": _CHANGED.format("num_steps = 'x'"),
    "divides.py": "1 / 0\n",
    "bytes.py": b"\xff\xfe\x00",
    "text.txt": "num_steps = 3\n",
}


def _config_files(folder: Path, workdir: Path) -> Iterator[Bad]:
    place = folder / "config files"
    place.mkdir(exist_ok=True)
    for name, content in _CONFIG_FILES.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        yield Bad("a config file", TRAIN, [f"--config={place / name}", f"--workdir={workdir}"])
    for name in ("configs/nope.py", "README.md", "configs", "configs/chat.py:5", str(place / "folder.py")):
        (place / "folder.py").mkdir(exist_ok=True)
        yield Bad("a config file", TRAIN, [f"--config={name}", f"--workdir={workdir}"])


def _message(**fields: object) -> bytes:
    return json.dumps(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | fields]}
    ).encode()


_ROWS = {
    "cut.jsonl": b'{"messages": [{"role": "user", "con',
    "list.jsonl": b"[1, 2]",
    "number.jsonl": b"5",
    "keys.jsonl": b'{"question": "a"}',
    "empty messages.jsonl": b'{"messages": []}',
    "messages text.jsonl": b'{"messages": "hello"}',
    "message number.jsonl": b'{"messages": [5]}',
    "role.jsonl": _message(role="wizard"),
    "no role.jsonl": _message(role=None),
    "content number.jsonl": _message(content=5),
    "content empty.jsonl": _message(content=" "),
    "two users.jsonl": _message(role="user"),
    "surrogate.jsonl": _message(content="\ud800"),
    "text number.jsonl": b'{"text": 5}',
    "text empty.jsonl": b'{"text": " "}',
    "text with half a turn.jsonl": b'{"text": "hello<|user|>"}',
    "preferences of nothing.jsonl": b'{"chosen": "a", "rejected": "b"}',
    "bytes.jsonl": b'{"text": "\xff"}',
    "utf-16.jsonl": '{"text": "a"}'.encode("utf-16"),
    "deep.jsonl": b"[" * 5000,
    "null.jsonl": b"null",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n\n",
    "empty.txt": b"",
    "plain.txt": b"Hello, world.\n",
    "open.txt": b"<|user|>a<|assistant|>b",
    "order.txt": b"<|assistant|>a<|user|>b<|end_of_text|>",
    "empty turn.txt": b"<|user|><|assistant|>b<|end_of_text|>",
    "outside.txt": b"a<|user|>b<|assistant|>c<|end_of_text|>",
    "bytes.txt": b"<|user|>\xff<|assistant|>b<|end_of_text|>",
    "one.txt": b"<|user|>a<|assistant|>b<|end_of_text|>",
    "binary.txt": bytes(range(256)) * 20,
    "cut.gz": gzip.compress(b"Hello, world.\n" * 100)[:-9],
    "twice.gz": gzip.compress(gzip.compress(b"Hello, world.\n")),
    "nothing.gz": gzip.compress(b""),
    "archive.zip": b"PK\x03\x04" + bytes(40),
    "columns.parquet": b"PAR1" + bytes(40),
    "chatml.txt": b"<|im_start|>user\na<|im_end|>",
}


def _data(tiny: Tiny, folder: Path, workdir: Path) -> Iterator[Bad]:
    """Each bad row alone, and after good ones."""
    place = folder / "rows"
    place.mkdir(exist_ok=True)
    good = tiny.corpus.read_bytes()
    for name, content in _ROWS.items():
        (place / name).write_bytes(content)
        yield Bad("a row of data", TRAIN, tiny.flags(workdir, f"--config.data.source={place / name}"))
        if name.endswith(".jsonl") and content.strip():
            (place / f"late {name}").write_bytes(good + content + b"\n")
            yield Bad("a row of data", TRAIN, tiny.flags(workdir, f"--config.data.source={place / f'late {name}'}"))


_JSON = {"list": b"[]", "null": b"null", "cut": b'{"a": ', "text": b"hello", "newer": b'{"format_version": 1000000}'}


def _run_folders(tiny: Tiny, folder: Path) -> Iterator[Bad]:
    for name in ("run.json", "config.json"):
        for kind, content in _JSON.items():
            place = folder / "run folders" / f"{name} {kind}"
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
            yield Bad("a run folder", TRAIN, tiny.flags(place))
            yield Bad("a run folder", SAMPLE, [f"--workdir={place}", "--prompt=hi"])
            if name == "run.json":
                yield Bad("a run folder", REPORT, [str(place)])
    yield Bad("a run folder", TRAIN, tiny.flags(Path("README.md")))
    yield Bad("a run folder", TRAIN, tiny.flags(Path("README.md/run")))
    yield Bad("a run folder", TRAIN, tiny.flags(Path("/proc/run")))
    yield Bad("a run folder", TRAIN, tiny.flags(Path("x" * 300)))
    lost = folder / "run folders" / "lost"
    lost.mkdir(exist_ok=True)
    (lost / "metrics.jsonl").write_text('{"step": 67, "split": "train", "loss": 1.0}\n')
    yield Bad("a run folder", TRAIN, tiny.flags(lost))


def bad_inputs(tiny: Tiny, run: Path, folder: Path) -> list[Bad]:
    workdir = folder / "never"
    return [
        *_settings(tiny, workdir),
        *_contradictions(tiny, workdir),
        *_flags(tiny, workdir, run),
        *_config_files(folder, workdir),
        *_data(tiny, folder, workdir),
        *_run_folders(tiny, folder),
    ]


def inputs(tiny: Tiny, straight: Path, folder: Path, rng: random.Random, count: int) -> Iterator[Outcome]:
    """`count` of them, of every kind as many as its share."""
    place = folder / "inputs"
    place.mkdir()
    cases = bad_inputs(tiny, straight, place)
    rng.shuffle(cases)
    for bad in cases[:count]:
        before = _content(folder)
        ended = Process(bad.command, bad.arguments).wait()
        problem = ended.problem(1, 2)
        left = _content(folder) - before
        if not problem and left:
            problem = f"left behind: {sorted(left)[:3]}"
        what = " ".join(ascii(argument) for argument in bad.arguments[-2:])
        yield f"bad input: {bad.kind}", problem and f"{bad.command} ... {what}: {problem}"


def _content(folder: Path) -> set[str]:
    """The paths there are, but logs of folders that were there before, and the folder of token caches."""
    return {str(path) for path in folder.rglob("*") if path.name not in ("log.txt", "cache")}
