import gc
import json
import math
import os
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from waiting import PATIENCE

from configs import chat, gpt2_124m
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.runs.flops import device_peak_flops, model_flops_per_token, model_flops_utilisation
from gpt_jax.runs.info import RunInfo, git_facts, new_run_id, read_json, write_json
from gpt_jax.runs.metrics import MetricsWriter, read_lines
from gpt_jax.storage.files import StorageError

ROOT = Path(__file__).parents[2]


def steps_of(path):
    return [record["step"] for record in read_lines(path)]


def tensorboard_events(workdir):
    """Every event of every file. A record is its length (8 bytes), a checksum (4), the event and a checksum (4)."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def test_a_line_holds_what_was_written(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3, "train", {"loss": np.float32(0.1), "finite": np.bool_(True), "skipped": 0})
        writer.write(4, "event", {"text": "resumed from 3"})
        writer.sample(4, "Hi?", "hé", tokens=2, seconds=0.5, ended=True)
    train, event = read_lines(tmp_path / "metrics.jsonl")
    assert time.time() - 60 < train.pop("time") <= time.time()
    assert train == {
        "step": 3,
        "split": "train",
        "loss": float(np.float32(0.1)),
        "finite": True,
        "skipped": 0,
    }
    assert event["text"] == "resumed from 3"
    (sample,) = read_lines(tmp_path / "samples.jsonl")
    assert sample == {"step": 4, "prompt": "Hi?", "text": "hé", "tokens": 2, "seconds": 0.5, "ended": True}


def test_nonfinite_values_are_valid_json_and_come_back(tmp_path):
    values = {"loss": math.nan, "grad_norm": np.float32(np.inf), "low": -math.inf, "fine": 1.0}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", values)

    def refuse(spelling):
        raise AssertionError(f"{spelling} is no JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [record[name] for name in values] == ["NaN", "Infinity", "-Infinity", 1.0]
    np.testing.assert_equal([float(record[name]) for name in values], [float(value) for value in values.values()])


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, "train", {"loss": 1 / step})
            writer.sample(step, "?", "!", tokens=1, seconds=0.1)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with MetricsWriter(tmp_path, resume_step=3, tensorboard=False) as writer:
        writer.write(4, "train", {"loss": 9})
    after = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert after[:3] == before[:3]
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_of(tmp_path / "samples.jsonl") == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_a_fresh_start_keeps_nothing(tmp_path):
    for _ in range(2):
        with MetricsWriter(tmp_path, tensorboard=False) as writer:
            writer.write(0, "validation", {"loss": 8})
    assert steps_of(tmp_path / "metrics.jsonl") == [0]


@pytest.mark.parametrize("tail", ['{"step": 2, "split": "tr', '{"step": 2, "split": "train"}', "\0\0\0", "[1]\n"])
def test_a_cut_last_line_is_left_out_and_removed_on_resume(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n' + tail)
    assert steps_of(path) == [1]
    with MetricsWriter(tmp_path, resume_step=10, tensorboard=False) as writer:
        writer.write(2, "train", {"loss": 1})
    assert steps_of(path) == [1, 2]


@pytest.mark.parametrize("line", ["oops", '{"step": Infinity}', '{"step": 1e300}', '{"step": -1}', "[" * 100_000])
def test_damage_elsewhere_names_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="line 2 is no JSON object; remove the line"):
        list(read_lines(path))


def test_lines_of_a_killed_process_are_on_disk(tmp_path):
    script = (
        "import os, signal, sys; from gpt_jax.runs.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], tensorboard=False)\n"
        "for step in range(100): writer.write(step, 'train', {'loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=PATIENCE).returncode == -signal.SIGKILL
    assert steps_of(tmp_path / "metrics.jsonl") == list(range(100))


def test_a_train_line_is_cheap(tmp_path):
    """By the function calls that it makes, wherever it runs: 50 us on an idle machine."""
    values = {"loss": 8.3, "finite": True} | {f"grad_norm/h_{layer}": 0.1 + layer for layer in range(14)}
    found = []
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "train", values)
        gc.disable()
        sys.setprofile(lambda _frame, event, _what: found.append(event))
        try:
            writer.write(2, "train", values)
        finally:
            sys.setprofile(None)
            gc.enable()
    assert sum(event in ("call", "c_call") for event in found) <= 60  # 39 of Python 3.11


def test_tensorboard_gets_logging_steps_texts_settings_alerts_and_the_purge(tmp_path):
    with MetricsWriter(tmp_path, settings={"optimizer.b1": 0.9, "name": "chat"}) as writer:
        writer.write(1, "train", {"loss": 8.0})
        writer.write(50, "train", {"loss": 7.0, "step_ms": 10.0})
        writer.write(50, "validation", {"loss": 7.5, "best": True})
        writer.write(50, "event", {"text": "something happened"})
        writer.sample(50, "Hi?", "Hello", tokens=1, seconds=0.1)
        writer.alert(50, "spike", "high")
    with MetricsWriter(tmp_path, resume_step=20):
        pass
    events = list(tensorboard_events(tmp_path))
    scalars = {(event.step, v.tag): v.simple_value for event in events for v in event.summary.value}
    assert scalars[50, "train/loss"] == 7.0
    assert scalars[50, "validation/best"] == 1.0
    assert (1, "train/loss") not in scalars
    shown = {"train", "validation", "event", "sample", "alert", "_hparams_"}
    assert {tag.split("/")[0] for _, tag in scalars} == shown
    values = {v.tag: v for event in events for v in event.summary.value}
    content = values["_hparams_/session_start_info"].metadata.plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["optimizer.b1"].number_value == 0.9
    assert settings["name"].string_value == "chat"
    assert values["alert/spike/text_summary"].tensor.string_val == [b"high"]
    restarts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert 21 in restarts


def test_a_disk_that_takes_no_events_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = MetricsWriter(tmp_path)
    for step in range(8):
        writer.write(step, "train", {"loss": 1.0, "grad_norm": 1.0, "step_ms": 2.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # enough for the lines, too little for the events
    try:
        with pytest.raises(StorageError, match=rf"^cannot write {tmp_path}/tensorboard: File too large; raise"):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.close()


def test_files_that_were_moved_away_are_noticed(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": 1.0})
        (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
        with pytest.raises(StorageError, match=r"metrics.jsonl: No such file or directory"):
            writer.check_in_place()
        (tmp_path / "metrics.jsonl").write_text("another run's")
        with pytest.raises(StorageError, match="another file stands there now"):
            writer.flush()
        (tmp_path / "elsewhere").rename(tmp_path / "metrics.jsonl")


def test_run_id():
    moment = datetime(2026, 2, 24, 6, 45, 26)
    assert re.fullmatch(r"20260224064526_[0-9a-z]{4}", new_run_id(moment))
    assert len({new_run_id(moment) for _ in range(20)}) > 10


def test_run_info_says_where_and_how(tmp_path):
    info = RunInfo(tmp_path, name="chat", domain="chat", backend="xla", parameters=6_838_784)
    saved = read_json(tmp_path / "run.json")
    assert saved["status"] == "running"
    assert saved["parameters"] == 6_838_784
    assert saved["versions"].keys() == {"python", "jax", "jaxlib", "flax", "optax", "orbax", "numpy"}
    assert saved["device"].keys() == {"platform", "kind", "count"}
    assert saved["host"]["cpu_count"] == os.cpu_count()
    assert shlex.split(saved["command"]) == sys.orig_argv
    with pytest.raises(ValueError, match="status must be one of running, completed, interrupted, failed; found 'done'"):
        info.finish("done")


def test_run_info_goes_on_after_an_interruption(tmp_path):
    first = RunInfo(tmp_path, name="chat", domain="chat", backend="xla")
    first.finish("interrupted")
    write_json(tmp_path / "run.json", read_json(tmp_path / "run.json") | {"elapsed_seconds": 1000.0})
    second = RunInfo(tmp_path, name="chat", domain="chat", backend="xla")
    assert second.run_id == first.run_id
    assert second.fields["started"] == first.fields["started"]
    assert second.fields["ended"] is None
    second.finish("completed")
    saved = read_json(tmp_path / "run.json")
    assert (saved["status"], saved["starts"]) == ("completed", 2)
    killed = RunInfo(tmp_path, name="chat", domain="chat", backend="xla", spent_seconds=3000.0)
    assert 3000 <= killed.fields["elapsed_seconds"] < 3100  # what its checkpoint says
    assert 1000 < saved["elapsed_seconds"] < 1100


def test_write_json_leaves_the_old_file_if_it_fails(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_json_names_the_file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"run\.json is not valid JSON"):
        read_json(path)


def test_no_commit_outside_git(tmp_path, monkeypatch):
    assert git_facts(tmp_path) == {"commit": None, "dirty": None}
    monkeypatch.setenv("PATH", "")
    assert git_facts(ROOT / "gpt_jax") == {"commit": None, "dirty": None}


def test_git_facts(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, timeout=PATIENCE
        )

    git("init")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    facts = git_facts(tmp_path / "package")
    assert re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert facts["dirty"] is False
    (tmp_path / "package" / "file").write_text("2")
    assert git_facts(tmp_path / "package")["dirty"] is True
    (tmp_path / "site-packages").mkdir()
    assert git_facts(tmp_path / "site-packages")["commit"] is None


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7e12),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA L4", "float32", 30.3e12),
        ("Tesla T4", "bfloat16", None),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v4", "float32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "float32", None),
        ("cpu", "float32", None),
    ],
)
def test_peak_of_a_device(kind, dtype, peak):
    assert device_peak_flops(kind, dtype) == (peak and pytest.approx(peak))


def test_model_flops_a_token_are_those_of_the_maths_alone():
    """GPT-2 124M: 6 (12 x 12 x 768^2 + 50,257 x 768) for the matrices, 6 x 12 x 1,024 x 768 for causal attention."""
    assert model_flops_per_token(gpt2_124m.get_config().model) == 741_192_192 + 56_623_104
    assert model_flops_per_token(chat.get_config().model) == 34_455_552 + 2_359_296
    # Adapters of 1,000 numbers: no matrix has a gradient of its own.
    assert model_flops_per_token(chat.get_config().model, 1000) == 34_455_552 * 4 // 6 + 6000 + 2_359_296


def test_model_flops_utilisation():
    model = chat.get_config().model  # 36,814,848 FLOPs a token
    assert model_flops_utilisation(model, 1e6, 989.4e12) == pytest.approx(0.0372092662, rel=1e-8)
    assert model_flops_utilisation(model, 1e6, None) is None


def with_a_narrow_mlp() -> ConfigDict:
    config = chat.get_config()
    config.model.update(mlp_dim=300, num_layers=1)
    return config


@pytest.mark.parametrize("get_config", [chat.get_config, gpt2_124m.get_config, with_a_narrow_mlp])
def test_the_weights_that_count_are_those_of_the_model_in_matrix_products(get_config):
    config = get_config().model
    params = jax.eval_shape(lambda: init_params(GPT(ModelConfig.from_config(config)), 0))
    counted = dict(params) if config.tie_head else {name: params[name] for name in params if name != "wte"}
    del counted["wpe"]
    matrices = sum(leaf.size for leaf in jax.tree.leaves(counted) if leaf.ndim == 2)
    attention = 6 * config.num_layers * config.block_size * config.embed_dim
    assert model_flops_per_token(config) == 6 * matrices + attention
