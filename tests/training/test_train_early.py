"""Mistakes that are said before a run begins, and what is left out."""

import contextlib
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from whole_run import ROOT, configuration, environment

from gpt_jax import backend, sample
from gpt_jax.backend import enter_backend
from gpt_jax.checkpoint import Checkpointer
from gpt_jax.data import token_cache
from gpt_jax.data.batches import loader, windows
from gpt_jax.data.corpus import source_fingerprint
from gpt_jax.data.token_cache import Tokens
from gpt_jax.errors import UserError
from gpt_jax.runs.metrics import read_lines
from gpt_jax.training.programs import abstract_state
from gpt_jax.training.train import train_and_evaluate
from vk_kernels.runtime import open_devices

TINY = [
    *("--config.num_steps=2", "--config.model.num_layers=1", "--config.model.embed_dim=16"),
    *("--config.model.num_heads=1", "--config.model.dropout_rate=0.0", "--config.batch_size=2"),
]


def test_every_0_means_never(corpus, tmp_path):
    never = ["eval.every", "sample.every", "checkpoint.every", "log.every", "log.diagnostics_every"]
    config = configuration(corpus, *TINY, *(f"--config.{name}=0" for name in never))
    assert train_and_evaluate(config, tmp_path / "run") is None
    lines = list(read_lines(tmp_path / "run" / "metrics.jsonl"))
    done = [(line["split"], line["step"]) for line in lines if line["split"] != "event"]  # of its start and end
    assert done == [("train", 1), ("train", 2)]
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]  # the last is always saved
    assert "step      1/2" not in (tmp_path / "run" / "log.txt").read_text()
    assert "# Run" in (tmp_path / "run" / "report.md").read_text()


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("the corpus was tokenised before the mistake was said")


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory) -> Path:
    """A run's folder with one checkpoint, of zeros."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_state(configuration(corpus, *TINY)))
    with Checkpointer(workdir / "checkpoints", keep_last=1, keep_every=None) as checkpointer:
        checkpointer.save(2, state, {"elapsed_seconds": 1.0, "data_fingerprint": "x"})
    return workdir


@pytest.fixture
def old_run(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "old")


def too_small(folder: Path) -> Path:
    file = folder / "tokenizer.json"
    file.write_text("{")
    return file


EARLY = [
    ("--config.init_from=gpt2", "there is no run gpt2: give the folder of a run, latest or best"),
    ("--config.init_from={tmp}", "is neither a run nor a checkpoint"),
    ("--config.init_from={old} --config.model.embed_dim=32", "old: no parameter of the checkpoint fits the model"),
    ("--config.data.source={tmp}/missing.jsonl", "missing.jsonl' does not exist: give a file"),
    (
        "--config.data.source=default --config.data.mixture=('default','{tmp}/missing.txt')",
        "missing.txt' does not exist: give a file",
    ),
    ("--config.data.validation={tmp}/missing.txt", "missing.txt' does not exist: give a file"),
    ("--config.data.source=", "config.data.source is empty"),
    ("--config.data.source=hf:", "write hf:NAME"),
    ("--config.data.tokenizer={tmp}/none.json", "none.json does not exist"),
    ("--config.data.tokenizer={damaged}", "cannot be read, it is damaged"),
    ("--config.model.vocab_size=258", "config.model.vocab_size is 258: a byte-level tokenizer needs 259 or more"),
    ("--config.seed=-1", "config.seed must be a whole number"),
    ("--workdir={old} --config.model.num_layers=3", "does not fit this config"),
    ("--workdir={damaged}", "tokenizer.json is a file; choose another --workdir"),
    ("--workdir={damaged}/below/it", "tokenizer.json is a file; choose another --workdir"),
    ("--workdir={tmp}/" + "x" * 300, "File name too long"),
    ("--workdir=/proc/1/none", "cannot write to the run folder"),
]


@pytest.mark.parametrize(("arguments", "message"), EARLY, ids=[arguments[:60] for arguments, _ in EARLY])
def test_a_mistake_is_said_before_the_corpus_is_read(arguments, message, corpus, tmp_path, old_run, monkeypatch):
    monkeypatch.setattr(token_cache, "prepare", forbidden)
    names = {"tmp": tmp_path, "old": old_run, "damaged": too_small(tmp_path)}
    given = arguments.format(**names).split(" ")
    folders = [text.removeprefix("--workdir=") for text in given if text.startswith("--workdir=")]
    workdir = Path(folders[0]) if folders else tmp_path / "runs" / "new"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        train_and_evaluate(configuration(corpus, *TINY, *(text for text in given if "workdir" not in text)), workdir)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before  # no folder was made


@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_damaged_file_of_the_run_is_said_before_the_corpus_is_read(name, corpus, old_run, monkeypatch):
    monkeypatch.setattr(token_cache, "prepare", forbidden)
    (old_run / name).write_text("[]")
    with pytest.raises(UserError, match=f"{name} holds a list where an object must be"):
        train_and_evaluate(configuration(corpus, *TINY), old_run)


def test_other_data_is_said_before_it_is_tokenised_and_the_fingerprint_of_older_runs_is_known(
    corpus, old_run, monkeypatch
):
    config = configuration(corpus, *TINY)
    monkeypatch.setattr(token_cache, "open_or_build", forbidden)
    with pytest.raises(UserError, match=r"is not what the run's checkpoint was trained on \(fingerprint x, now"):
        train_and_evaluate(config, old_run)
    choices = {name: config.data[name] for name in ("tool_calls", "on_error")}
    how = choices | {"skipped": 0, "skipped_first": [], "tools": 0, "context": 0, "unread": {}}
    source = source_fingerprint(str(corpus))
    for first in ([1, source], [2, source, how], [3, source, how], [4, source, choices]):
        older = token_cache._digest([*first, config.data.validation_fraction, config.model.vocab_size])
        lines = []
        with contextlib.suppress(AssertionError):  # of what would tokenise it
            token_cache.prepare(config.data, config.model.vocab_size, lines.append, expected=older)
        assert any("is of a version that read some rows in another way" in line for line in lines)


def test_a_block_larger_than_the_data_leaves_no_folder(corpus, tmp_path):
    with pytest.raises(UserError, match="block_size is 100000 but the training data has"):
        train_and_evaluate(configuration(corpus, *TINY, "--config.model.block_size=100000"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_window_can_be_loaded():
    ids = jnp.arange(50, dtype=jnp.uint16)
    batches = windows(Tokens(ids, ids * 0), block_size=4, batch_size=1, seed=0)
    with contextlib.closing(loader(batches)) as loaded:
        assert next(loaded)["inputs"].shape == (1, 4)


def test_variables_for_other_programs_change_no_dtype_and_no_random_bits():
    plain = jax.random.key_data(jax.random.key(3))
    with (
        jax.enable_x64(True),
        jax.default_prng_impl("rbg"),
        jax.numpy_dtype_promotion("strict"),
        jax.transfer_guard("disallow"),
        contextlib.ExitStack() as stack,
    ):
        enter_backend("xla", "highest", stack)
        assert jnp.arange(3).dtype == jnp.int32
        assert (jnp.arange(3) + jnp.float32(1)).dtype == jnp.float32
        assert (jax.random.key_data(jax.random.key(3)) == plain).all()


@pytest.mark.parametrize("name", ["vulkan", "auto"])
def test_a_variable_that_means_nothing_is_no_reason_for_another_backend(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setenv("VK_KERNELS_VALIDATION", "nonsense")
    monkeypatch.setattr(open_devices, "_devices", {})  # another test's is open, and was asked for before
    with (
        contextlib.ExitStack() as stack,
        pytest.raises(UserError, match=rf"^config.backend={name}: .*VK_KERNELS_VALIDATION.*'nonsense'$"),
    ):
        enter_backend(name, "highest", stack)


def test_a_device_that_is_named_and_not_there_is_no_reason_for_another_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(backend, "list_devices", list)
    monkeypatch.setenv("VK_KERNELS_DEVICE", "nonsense")
    expected = "^config.backend=auto: no Vulkan device is called 'nonsense'; .*set VK_KERNELS_DEVICE to one of them"
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=expected):
        enter_backend("auto", "highest", stack)
    monkeypatch.delenv("VK_KERNELS_DEVICE")
    processor = types.SimpleNamespace(kind="cpu")
    for devices in ([], [processor]):
        monkeypatch.setattr(backend, "list_devices", lambda devices=devices: devices)
        with contextlib.ExitStack() as stack:
            chosen = str(enter_backend("auto", "highest", stack))
            assert chosen.startswith("xla (auto: no GPU with a Vulkan driver) on ")


def test_sampling_asks_for_a_device_before_it_reads_a_checkpoint(monkeypatch, tmp_path):
    values = flags.FlagValues()
    sample.define_flags(values)
    values(["sample", f"--workdir={tmp_path}"])
    monkeypatch.setattr(sample, "FLAGS", values)
    monkeypatch.setattr(jax, "devices", forbidden)  # an AssertionError, as JAX's for a platform that is not there
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="does not find a device: JAX_PLATFORMS=cuda must be unset"):
        sample.answer_prompts(["a question"], contextlib.ExitStack())


JAX_VARIABLES = [
    ("main", {"JAX_PLATFORMS": "tpu"}, "JAX_PLATFORMS=tpu must be unset or name what this machine has"),
    ("sample", {"JAX_ENABLE_X64": "perhaps"}, "'perhaps' for environment 'JAX_ENABLE_X64'; set or unset the variable"),
]


@pytest.mark.parametrize(("program", "variables", "message"), JAX_VARIABLES, ids=["platform", "x64"])
def test_a_variable_that_jax_cannot_use_is_named_in_one_line(program, variables, message, corpus, tmp_path):
    arguments = [f"--workdir={tmp_path / 'run'}"]
    if program == "main":
        arguments += ["--config=configs/chat_tiny.py", f"--config.data.source={corpus}"]
    done = subprocess.run(
        [sys.executable, "-m", f"gpt_jax.{program}", *arguments],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()
