"""Adapters as the library peft has them; scripts/peft.sh shows that it reads them."""

import errno
import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from untrained_run import write_adapter_run

from gpt_jax.checkpoint import restore_adapters, restore_parameters
from gpt_jax.errors import UserError
from gpt_jax.export import export
from gpt_jax.huggingface import adapter as adapter_module
from gpt_jax.huggingface.adapter import target_modules
from gpt_jax.huggingface.donor import read_donor
from gpt_jax.runs.find import find_run
from gpt_jax.storage.files import StorageError

OPTIONS = {"dtype": "float32", "most": None, "force": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = {"model__soft_cap": 0.0, "model__use_bias": True, "model__tie_head": True}
    return write_adapter_run(tmp_path_factory.mktemp("runs") / "lora", lora__targets=("qkv", "mlp_*"), **model)


def test_adapters_alone_are_peft_s_files(run, tmp_path):
    export(find_run(str(run)), str(tmp_path / "out"), adapter=True, **OPTIONS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 6.0, True)
    assert config["target_modules"] == ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.h.0."
    assert {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()} == {
        "attn.c_attn.lora_A.weight": (4, 16),
        "attn.c_attn.lora_B.weight": (48, 4),
        "mlp.c_fc.lora_A.weight": (4, 16),
        "mlp.c_fc.lora_B.weight": (64, 4),
        "mlp.c_proj.lora_A.weight": (4, 64),
        "mlp.c_proj.lora_B.weight": (16, 4),
    }
    (adapters, _), _ = restore_adapters(run)
    ours = adapters["h_0"]["mlp_in"]["lora_b"]
    np.testing.assert_array_equal(tensors[f"{prefix}mlp.c_fc.lora_B.weight"], ours.T)


def test_a_layer_that_only_some_blocks_adapt_is_named_in_each():
    layers = ["h_0/qkv", "h_0/projection", "h_1/qkv", "h_1/mlp_out"]
    assert target_modules(layers, 2) == ["attn.c_attn", "h.0.attn.c_proj", "h.1.mlp.c_proj"]


def test_merged_and_base_are_exported_as_any_model(run, tmp_path):
    for name, folder in (("merged", run), ("base", run / "base")):
        export(find_run(str(folder)), str(tmp_path / name), **OPTIONS)
        expected, _ = restore_parameters(folder)
        jax.tree.map(np.testing.assert_array_equal, read_donor(str(tmp_path / name)).params, expected)
        assert ("## Training" in (tmp_path / name / "README.md").read_text()) == (name == "merged")


def test_what_has_no_adapters_or_is_cast_is_refused_in_a_line(run, tmp_path):
    with pytest.raises(UserError, match=r"has no adapters: give one of a run with config.lora.rank"):
        export(find_run(str(run / "base")), str(tmp_path / "out"), adapter=True, **OPTIONS)
    with pytest.raises(UserError, match=r"in float32: leave out --dtype=bfloat16"):
        export(find_run(str(run)), str(tmp_path / "out"), adapter=True, **OPTIONS | {"dtype": "bfloat16"})
    with pytest.raises(UserError, match=r"one file, which is small: leave out --max_shard_size"):
        export(find_run(str(run)), str(tmp_path / "out"), adapter=True, **OPTIONS | {"most": 10**9})
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_half_written_leave_nothing(run, tmp_path, monkeypatch):
    def full(path, _):
        path.write_bytes(b"half")
        raise StorageError(f"could not write {path}: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(adapter_module, "save_tensors", full)
    with pytest.raises(StorageError, match="No space left"):
        export(find_run(str(run)), str(tmp_path / "new" / "out"), adapter=True, **OPTIONS)
    assert list(tmp_path.iterdir()) == []
