"""A small made-up run, written as training writes it, for the tests of what reads runs."""

import math
from pathlib import Path

import numpy as np

from gpt_jax.runs.info import RunInfo, write_json
from gpt_jax.runs.metrics import MetricsWriter

LAYERS = ("wte", "wpe", "h_0", "h_1", "ln_f", "head")
SPIKE_STEP, SPIKE_LAYER = 137, "h_1"
CONFIG = {
    "num_steps": 600,
    "batch_size": 4,
    "init_from": "",
    "model": {"vocab_size": 4000, "block_size": 32, "soft_cap": 30.0},
    "optimizer": {"clip_norm": 1.0},
}


def loss_at(step: int) -> float:
    """Loss of the made-up training curve, before its noise."""
    return 4 + (math.log(4000) - 4) * math.exp(-(step - 1) / 200)


def write_run(workdir: Path, steps: int = 600, seed: int = 0, status: str = "completed") -> Path:
    """Writes a run with one gradient spike, of 150 at step 137, most of it in h_1."""
    rng = np.random.default_rng(seed)
    info = RunInfo(workdir, name=workdir.name, domain="chat", backend="xla", command="train it", parameters=6_838_784)
    write_json(workdir / "config.json", CONFIG)
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in range(1, steps + 1):
            writer.write(step, "train", _train_values(step, rng))
            if step % 100 == 0:
                validation = loss_at(step) + 0.05
                writer.write(step, "validation", {"loss": validation, "best": True, "seconds": 0.5})
                writer.write(step, "diagnostics", _attention_values(step))
                text = "Be well , be well , be well ." if step < 300 else "Live each day as if it were whole."
                writer.sample(step, "How to live?", text, tokens=8 + step // 100, seconds=0.2, ended=step >= 300)
    for step in (300, 600):
        folder = workdir / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "state").write_bytes(bytes(2_500_000))
    info.finish(status)
    return workdir


def _train_values(step: int, rng: np.random.Generator) -> dict[str, float]:
    norms = {layer: 0.4 + 0.02 * float(rng.random()) for layer in LAYERS}
    if step == SPIKE_STEP:
        norms[SPIKE_LAYER] = 150.0
    values = {
        "loss": loss_at(step) + (0.02 * float(rng.normal()) if step > 1 else 0.0),
        "grad_norm": math.hypot(*norms.values()),
        "param_norm": 40.0,
        "update_norm": 0.01,
        "learning_rate": 1e-6 * step,
        "finite": True,
    }
    values |= {f"grad_norm/{layer}": norm for layer, norm in norms.items()}
    if step == 1 or step % 50 == 0:
        values |= {"step_ms": 900.0 if step == 1 else 10.0, "data_ms": 0.1, "tokens_per_second": 12_800.0}
        values |= {"eta_seconds": 1.0, "checkpoint_ms": 30.0, "host_peak_bytes": 3e8}
    return dict(sorted(values.items()))  # the order in which jax gives dictionaries back


def _attention_values(step: int) -> dict[str, float]:
    return {
        f"{name}/h_{layer}/head_{head}": value + 0.1 * layer + 0.01 * head
        for name, value in (("attention_max", step / 100), ("attention_entropy", 2.0))
        for layer in range(2)
        for head in range(2)
    }
