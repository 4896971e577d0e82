"""The tiny run that all faults meet, and what two runs are compared by."""

import json
import os
import sys
from pathlib import Path

from zygote import Ended, Process, call

STEPS, EVERY = 60, 3
TRAIN, SAMPLE, REPORT = "gpt_jax.main", "gpt_jax.sample", "gpt_jax.report"


def write_corpus(file: Path) -> Path:
    words = ["sun", "moon", "star", "sea", "hill", "tree", "bird", "stone", "wind", "rain"]
    with file.open("w") as out:
        for i in range(80):
            question, reply = (" ".join(words[(i * k + j) % 10] for j in range(12)) for k in (3, 7))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{reply} {i}"}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


class Tiny:
    """Command lines of a run of one layer, 32 wide, with a checkpoint every third step."""

    def __init__(self, folder: Path, backend: str = "xla") -> None:
        self.folder, self.backend = folder, backend
        self.corpus = folder / "chats.jsonl"
        if not self.corpus.exists():
            write_corpus(self.corpus)

    def flags(self, workdir: Path, *changes: str) -> list[str]:
        values = {
            "backend": self.backend,
            "num_steps": STEPS,
            "batch_size": 2,
            "model.num_layers": 1,
            "model.embed_dim": 32,
            "model.num_heads": 1,
            "model.block_size": 16,
            "model.vocab_size": 280,
            "model.dropout_rate": 0.1,
            "optimizer.warmup_steps": 2,
            "data.source": self.corpus,
            "data.cache_dir": self.folder / "cache",
            "data.validation_fraction": 0.3,
            "eval.every": 5,
            "eval.batches": 1,
            "sample.every": 10,
            "sample.max_tokens": 3,
            "checkpoint.every": EVERY,
            "checkpoint.keep_last": 2,
            "checkpoint.keep_every": 0,
            "log.every": 2,
            "log.diagnostics_every": 15,
            "log.tensorboard": "false",
        }
        given = [f"--config.{name}={value}" for name, value in values.items()]
        return ["--config=configs/chat_tiny.py", f"--workdir={workdir}", *given, *changes]

    def start(self, workdir: Path, *changes: str, **options) -> Process:
        return Process(TRAIN, self.flags(workdir, *changes), **options)

    def train(self, workdir: Path, *changes: str, **options) -> Ended:
        return call(TRAIN, *self.flags(workdir, *changes), **options)


def lines(workdir: Path, name: str) -> list[dict]:
    """The whole lines of a file of JSON objects."""
    try:
        text = (workdir / name).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return []
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("split") != "event":
            found.append(record)
    return found


def written(workdir: Path) -> list[str]:
    """All that metrics and samples say, but times and events."""
    records = lines(workdir, "metrics.jsonl") + lines(workdir, "samples.jsonl")
    for record in records:
        for name in [n for n in record if n in ("time", "seconds", "tokens_per_second", "mfu")]:
            del record[name]
        for name in [n for n in record if n.endswith(("_ms", "_seconds", "_bytes"))]:
            del record[name]
    return sorted(json.dumps(record, sort_keys=True) for record in records)


def keys(workdir: Path) -> set[tuple]:
    """The step and kind of each line there is."""
    metrics = {(record.get("step"), record.get("split")) for record in lines(workdir, "metrics.jsonl")}
    return metrics | {(record.get("step"), record.get("prompt")) for record in lines(workdir, "samples.jsonl")}


def steps_saved(workdir: Path) -> list[int]:
    try:
        return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    except OSError:
        return []


def status(workdir: Path) -> str:
    return json.loads((workdir / "run.json").read_text())["status"]


def difference(one: Path, other: Path) -> str:
    """The difference of two finished runs, to the last bit of the parameters; nothing if there is none."""
    if written(one) != written(other):
        missing = len(set(written(one)) - set(written(other)))
        return f"{missing} lines of metrics or samples differ"
    if steps_saved(one)[-1:] != steps_saved(other)[-1:]:
        return f"last checkpoints {steps_saved(one)} and {steps_saved(other)}"
    pid = os.fork()
    if not pid:
        code = 2
        try:
            import numpy as np
            from flax.traverse_util import flatten_dict

            from gpt_jax.checkpoint import restore_parameters

            trees = [
                flatten_dict(restore_parameters(folder / "checkpoints" / str(steps_saved(folder)[-1]))[0])
                for folder in (one, other)
            ]
            same = trees[0].keys() == trees[1].keys()
            code = 0 if same and all(np.array_equal(trees[0][name], trees[1][name]) for name in trees[0]) else 3
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {0: "", 3: "the last parameters differ"}.get(code, "the last parameters cannot be read")
