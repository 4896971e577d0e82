"""JSON files of a run that are cut, empty, of another kind or of another version: one line, wherever they are read."""

import contextlib
import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from synthetic_run import write_run

from configs import chat_tiny
from gpt_jax import sample
from gpt_jax.backend import enter_backend
from gpt_jax.checkpoint import Checkpointer, restore_parameters
from gpt_jax.cli import parse_flags
from gpt_jax.data.tokenizer import save, train_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.inference import generate, load_model
from gpt_jax.inference.decoder import Decoder
from gpt_jax.inference.load_model import load_for_sampling
from gpt_jax.inference.sampling import SamplingOptions
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.runs import info
from gpt_jax.runs.info import CONFIG_FILE, INFO_FILE, RunInfo, read_json, write_json
from gpt_jax.runs.load import load_run
from gpt_jax.runs.report import make_report
from gpt_jax.storage import checkpoint_files
from gpt_jax.storage.checksum import crc32_of_json
from gpt_jax.training.train import save_config

pytestmark = pytest.mark.slow

GOOD = {INFO_FILE: {"run_id": "1", "status": "completed"}, CONFIG_FILE: {"num_steps": 5, "model": {"vocab_size": 9}}}
DAMAGE = [
    (b"", "is not valid JSON"),
    (b"[]", "holds a list where an object must be"),
    (b"null", "holds null where an object must be"),
    (b"5", "holds a number where an object must be"),
    (b'"x"', "holds text where an object must be"),
    (b'{"run_id": "1", "num_st', "is not valid JSON"),
    (b"\xff\xfe\x00\x80\x81", "is not valid JSON"),
    (b"[" * 100_000, "is not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    (b'{"format_version": 2}', "has format version 2, and this program knows none above 1"),
    (b'{"format_version": "1"}', "format_version is '1', not a whole number"),
    (b'{"format_version": null}', "format_version is None, not a whole number"),
    (None, "cannot be read: Is a directory"),
]
DAMAGE_IDS = [str(damage[:20]) if damage is not None else "folder" for damage, _ in DAMAGE]


def put(file: Path, content: bytes | None) -> None:
    if content is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(content)


def one_line(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder that can be sampled from and read."""
    workdir = write_run(tmp_path_factory.mktemp("finished") / "run", steps=5)
    config = chat_tiny.get_config()
    config.model.update(vocab_size=270, block_size=8, num_layers=1, num_heads=1, embed_dim=8)
    save_config(config, workdir, print)
    save(train_tokenizer(["a question and an answer"], 262), workdir / "tokenizer.json")
    shutil.rmtree(workdir / "checkpoints")
    params = jax.jit(lambda: init_params(GPT(ModelConfig.from_config(config.model)), 3))()
    with Checkpointer(workdir / "checkpoints", keep_last=2, keep_every=None) as checkpointer:
        checkpointer.save(1, {"params": params}, {"next_window": 4}, 5.0)
        checkpointer.save(2, {"params": params}, {"next_window": 8}, 6.0)
    return workdir


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("name", [INFO_FILE, CONFIG_FILE])
@pytest.mark.parametrize(("content", "message"), DAMAGE, ids=DAMAGE_IDS)
def test_every_reader_names_a_damaged_file_in_one_line(name, content, message, run):
    put(run / name, content)
    readers = [lambda: load_run(run)]
    if name == CONFIG_FILE:
        readers += [lambda: load_for_sampling(run), lambda: save_config(chat_tiny.get_config(), run, print)]
    else:
        readers += [lambda: RunInfo(run, name="a", domain="b", backend="c")]
    for reader in readers:
        line = one_line(reader)
        assert line.startswith((f"{run / name} ", f"{run / name}: "))
        assert message in line


WRONG_TYPES = [
    (INFO_FILE, {"elapsed_seconds": "long"}, "elapsed_seconds cannot be text"),
    (INFO_FILE, {"starts": [1]}, "starts cannot be a list"),
    (INFO_FILE, {"device": 5}, "device cannot be a number"),
    (INFO_FILE, {"versions": "all"}, "versions cannot be text"),
    (INFO_FILE, {"peak_memory_bytes": {"device": "much"}}, "peak_memory_bytes.device cannot be text"),
    (INFO_FILE, {"host": {"memory_bytes": True}}, "host.memory_bytes cannot be true or false"),
    (CONFIG_FILE, {"model": 5}, "model cannot be a number"),
    (CONFIG_FILE, {"num_steps": "ten"}, "num_steps cannot be text"),
    (CONFIG_FILE, {"optimizer": {"clip_norm": {}}}, "optimizer.clip_norm cannot be an object"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG_TYPES, ids=[message for *_, message in WRONG_TYPES])
def test_a_field_of_another_type_is_named(name, change, message, run):
    write_json(run / name, read_json(run / name) | change)
    assert f"{run / name}: {message}" in one_line(lambda: make_report(load_run(run)))


def test_files_carry_their_version_and_older_ones_without_it_are_read(run):
    for name in (INFO_FILE, CONFIG_FILE):
        content = json.loads((run / name).read_text())
        assert content.pop("format_version") == info.FORMAT_VERSION
        (run / name).write_text(json.dumps(content))
        assert "format_version" not in read_json(run / name)
    before = make_report(load_run(run))
    write_json(run / CONFIG_FILE, read_json(run / CONFIG_FILE))
    assert make_report(load_run(run)) == before
    record = json.loads((run / "checkpoints" / "2" / "position.json").read_text())
    assert record.pop("format_version") == checkpoint_files.FORMAT_VERSION
    del record["crc32"]
    rewrite(run / "checkpoints" / "2", record)
    assert load_for_sampling(run)[3].endswith("(best validation loss 5.0000)")
    assert restore_parameters(run / "checkpoints" / "2")[1].endswith("/2")


def test_a_checkpoint_of_a_diverged_run_answers_nothing(run, monkeypatch):
    params, description = restore_parameters(run)
    diverged = jax.tree.map(lambda x: x * np.nan, params)
    monkeypatch.setattr(load_model, "restore_parameters", lambda folder: (diverged, description))
    line = one_line(load_for_sampling, run)
    assert line.startswith(f"{description}: ")
    assert "are NaN or infinite" in line


def rewrite(step: Path, record: dict) -> None:
    (step / "position.json").write_text(json.dumps(record | {"crc32": crc32_of_json(record)}))


@pytest.mark.parametrize("content", [content for content, _ in DAMAGE], ids=DAMAGE_IDS)
def test_a_damaged_position_skips_its_checkpoint(content, run, caplog):
    put(run / "checkpoints" / "1" / "position.json", content)
    with caplog.at_level(logging.WARNING):
        assert "/checkpoints/2 (best validation loss 6" in load_for_sampling(run)[3]
    put(run / "checkpoints" / "2" / "position.json", content)
    assert "every checkpoint in " in one_line(load_for_sampling, run)


def test_a_position_of_a_newer_version_is_no_damage(run):
    record = json.loads((run / "checkpoints" / "2" / "position.json").read_text())
    del record["crc32"]
    rewrite(run / "checkpoints" / "2", record | {"format_version": 2})
    for call in (load_for_sampling, lambda run: Checkpointer(run / "checkpoints", keep_last=1, keep_every=None)):
        assert "2/position.json has format version 2, and this program knows none above 1" in one_line(call, run)


UNFIT = [
    ({"vocab_size": 250}, " ids, and the model of"),
    ({"vocab_size": 300}, "the parameter head has the shape (8, 270), and the config says (8, 300)"),
    ({"embed_dim": 16}, "has the shape"),
    ({"num_layers": 2}, "the parameter h_1/"),
    ({"tie_head": True}, "the parameter head has the shape (8, 270), and the config says that there is none"),
    ({"num_heads": 3}, "model.embed_dim must be a multiple of num_heads, found 8 and 3"),
    ({"num_heads": 0}, "model.num_heads must be a whole number from 1 to"),
    ({"dtype": "float64"}, "model.dtype must be one of float32, bfloat16; found 'float64'"),
    ({"rope": True}, "this program knows no model.rope"),
]


@pytest.mark.parametrize(("changes", "message"), UNFIT, ids=[str(changes) for changes, _ in UNFIT])
def test_a_config_that_does_not_fit_the_checkpoint_is_refused(changes, message, run):
    config = read_json(run / CONFIG_FILE)
    config["model"] |= changes
    write_json(run / CONFIG_FILE, config)
    assert message in one_line(load_for_sampling, run)


def test_a_config_without_what_sampling_needs_is_refused_and_other_settings_may_differ(run):
    config = read_json(run / CONFIG_FILE)
    del config["log"], config["model"]["remat"], config["model"]["soft_cap"]
    write_json(run / CONFIG_FILE, config | {"later": {"setting": 1}})
    load_for_sampling(run)
    del config["sample"]["top_k"]
    write_json(run / CONFIG_FILE, config)
    assert f"{run / CONFIG_FILE} lacks sample.top_k" in one_line(load_for_sampling, run)
    (run / CONFIG_FILE).unlink()
    assert "is no run folder: it has no config.json" in one_line(load_for_sampling, run)


SAMPLE_FLAGS = [
    ("--seed=99999999999999999999999", "--seed must be a whole number from 0 to 4294967295, found 9999"),
    ("--seed=-1", "--seed must be a whole number from 0 to 4294967295, found -1"),
    ("--seed=x", "flag --seed=x: must be a whole number"),
    ("--temperature=nan", "--temperature must be a number in [0, inf), found nan"),
    ("--temperature=inf", "--temperature must be a number in [0, inf), found inf"),
    ("--temperature=-1", "--temperature must be a number in [0, inf), found -1"),
    ("--temperature=1e-40", "--temperature must be a number in [0, inf), found 1e-40, which is 0 in float32"),
    ("--temperature=1e39", "which is inf in float32"),
    ("--top_k=-1", "--top_k must be a whole number from 0 to"),
    ("--max_tokens=0", "--max_tokens must be a whole number from 1 to"),
    ("--max_tokens=1.5", "flag --max_tokens=1.5: must be a whole number"),
    ("--backend=cuda", "value should be one of <auto|xla|vulkan>"),
    ("--prompt=\udcff", r"--prompt must be text in UTF-8, found '\udcff' in it"),
    ("--workdir=", "--workdir is empty"),
    ("--prompt", "Missing value for flag --prompt"),
    ("--promt=Hi", "Did you mean: prompt"),
]


@pytest.mark.parametrize(("flag", "message"), SAMPLE_FLAGS, ids=[ascii(flag) for flag, _ in SAMPLE_FLAGS])
def test_nonsense_for_sampling_costs_one_line(flag, message, monkeypatch):
    values = flags.FlagValues()
    sample.define_flags(values)
    monkeypatch.setattr(sample, "FLAGS", values)

    def start() -> None:
        parse_flags(["sample", "--workdir=run", flag], values)
        sample.check_flags()

    assert message in one_line(start)


def test_the_coldest_temperatures_answer_as_0_does(finished):
    config, params, _, _ = load_for_sampling(finished)
    options = SamplingOptions(temperature=0.0, top_k=40, seed=0, max_tokens=9)
    with contextlib.ExitStack() as stack:
        backend = enter_backend("xla", "highest", stack)
        decoder = Decoder(GPT(ModelConfig.from_config(config.model)), backend.put(params), backend, slots=2)
        coldest, zero = (
            generate.generate(decoder, [[4, 5], [6, 7]], [dataclasses.replace(options, temperature=temperature)] * 2)
            for temperature in (1e-38, 0.0)
        )
    assert coldest == zero
