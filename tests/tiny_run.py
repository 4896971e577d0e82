"""Runs in the test's own process, of a model so small that its compilation is what costs."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs import chat_tiny
from gpt_jax.runs.metrics import read_lines

STEPS, EVERY = 12, 4


def write_chats(file: Path) -> Path:
    """Writes sixty small dialogues."""
    words = ["sun", "moon", "star", "sea", "hill", "tree", "bird", "stone", "wind", "rain"]
    with file.open("w") as out:
        for i in range(60):
            question, reply = (" ".join(words[(i * k + j) % 10] for j in range(12)) for k in (3, 7))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{reply} {i}"}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def tiny(corpus: Path, **changes) -> ConfigDict:
    """12 steps with a checkpoint, an evaluation and a sample every 4; `changes` by dotted name, a dot as __."""
    config = chat_tiny.get_config()
    values = {
        "backend": "xla",
        "num_steps": STEPS,
        "batch_size": 2,
        "data.source": str(corpus),
        "data.cache_dir": str(corpus.parent / "cache"),
        "data.validation_fraction": 0.3,
        "model.num_layers": 1,
        "model.embed_dim": 16,
        "model.num_heads": 1,
        "model.block_size": 16,
        "model.vocab_size": 270,
        "model.dropout_rate": 0.1,
        "optimizer.warmup_steps": 2,
        "eval.every": EVERY,
        "eval.batches": 1,
        "sample.every": EVERY,
        "sample.max_tokens": 2,
        "sample.prompts": ("moon?", "sun?"),
        "checkpoint.every": EVERY,
        "checkpoint.keep_last": 2,
        "log.every": 2,
        "log.diagnostics_every": EVERY,
        "log.tensorboard": False,
    }
    config.update_from_flattened_dict(values | {name.replace("__", "."): value for name, value in changes.items()})
    return config


def written(workdir: Path) -> list[tuple]:
    """All that metrics and samples say, but times and events."""
    lines = [line for line in read_lines(workdir / "metrics.jsonl") if line["split"] != "event"]
    lines += list(read_lines(workdir / "samples.jsonl"))
    timed = ("time", "seconds", "tokens_per_second")
    kept = [
        {k: v for k, v in line.items() if k not in timed and not k.endswith(("_ms", "_seconds", "_bytes"))}
        for line in lines
    ]
    return sorted((line["step"], json.dumps(line, sort_keys=True)) for line in kept)


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
