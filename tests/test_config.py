"""Every config is valid, and every mistake in one costs a single line."""

import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import chat, chat_tiny, gpt2_124m
from gpt_jax.config import UserError, validate

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", [chat, chat_tiny, gpt2_124m])
def test_configs_are_valid_and_open_with_their_command(module):
    validate(module.get_config())
    name = module.__name__.split(".")[-1]
    assert f"python -m gpt_jax.main --config=configs/{name}.py" in module.__doc__


def test_chat_is_the_reference_run():
    config = chat.get_config()
    assert config.model.to_dict() == {
        "vocab_size": 4000,
        "block_size": 256,
        "num_layers": 6,
        "num_heads": 8,
        "embed_dim": 256,
        "dropout_rate": 0.1,
        "soft_cap": 30.0,
        "use_bias": False,
        "tie_head": False,
        "dtype": "float32",
        "remat": False,
    }
    assert config.optimizer.to_dict() == {
        "learning_rate": 3e-5,
        "min_learning_rate": 3e-6,
        "warmup_steps": 500,
        "decay_steps": 50_000,
        "b1": 0.9,
        "b2": 0.99,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
        "decay_matrices_only": True,
        "clip_norm": 1.0,
    }
    assert (config.seed, config.batch_size, config.accumulate_steps, config.num_steps) == (42, 16, 1, 50_000)
    assert (config.eval.every, config.eval.batches) == (2500, 10)
    sample = config.sample
    assert (sample.every, sample.temperature, sample.top_k, sample.max_tokens) == (500, 0.8, 40, 80)


BAD_VALUES = [
    ({"backend": "cuda"}, "config.backend must be one of auto, xla, vulkan; found 'cuda'"),
    ({"num_steps": 0}, "config.num_steps must be at least 1, found 0"),
    ({"seed": 2**32}, "config.seed must be below 2**32, found 4294967296"),
    ({"model.num_heads": 7}, "config.model.embed_dim must be a multiple of num_heads, found 256 and 7"),
    ({"model.dropout_rate": 1.0}, "config.model.dropout_rate must be in [0, 1), found 1.0"),
    ({"model.dtype": "float16"}, "config.model.dtype must be one of float32, bfloat16; found 'float16'"),
    ({"model.soft_cap": float("nan")}, "config.model.soft_cap must be at least 0, found nan"),
    ({"accumulate_steps": 3}, "config.batch_size must be a multiple of accumulate_steps, found 16 and 3"),
    ({"optimizer.learning_rate": -1.0}, "config.optimizer.learning_rate must be positive, found -1.0"),
    (
        {"optimizer.min_learning_rate": 1.0},
        "config.optimizer.min_learning_rate must not exceed learning_rate, found 1.0 and 3e-05",
    ),
    ({"optimizer.b2": 1.0}, "config.optimizer.b2 must be in [0, 1), found 1.0"),
    ({"optimizer.clip_norm": 0.0}, "config.optimizer.clip_norm must be positive, found 0.0"),
    (
        {"optimizer.warmup_steps": 50_000},
        "config.optimizer.warmup_steps must be below decay_steps, where the schedule ends, found 50000 and 50000",
    ),
    ({"data.validation_fraction": 0.0}, "config.data.validation_fraction must be in (0, 1), found 0.0"),
    ({"data.targets": "user"}, "config.data.targets must be one of all, assistant; found 'user'"),
    ({"sample.temperature": -0.5}, "config.sample.temperature must be at least 0, found -0.5"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES)
def test_bad_values_are_refused_in_one_line(changes, message):
    config: ConfigDict = chat.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value) == message


def run_main(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gpt_jax.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=configs/chat.py", "--config.model.num_heds=4"], 'Did you mean "num_heads"'),
        (["--config=configs/chat.py", "--config.model.num_heads=many"], "many"),
        (["--config=configs/chat.py", "--wrkdir=x"], "Did you mean: workdir"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs/chat.py", "--config.model.num_heads=7"], "embed_dim must be a multiple of num_heads"),
        (["--config=configs/chat.py", "extra"], "unexpected argument 'extra'"),
        ([], "give --config=configs/chat.py"),
    ],
)
def test_command_line_mistakes_say_how_to_mend_them(arguments, expected, tmp_path):
    done = run_main(*arguments, *([] if not arguments or "extra" in arguments else [f"--workdir={tmp_path / 'run'}"]))
    assert done.returncode != 0
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
