"""Runs of adapters: what is trained and saved, that a run is whole without its donor, and what of it others read."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import tiny, write_chats, written
from untrained_run import write_adapter_run
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from gpt_jax.checkpoint import check_donor, restore_adapters, restore_parameters, save_base
from gpt_jax.errors import UserError
from gpt_jax.inference.load_model import load_for_sampling
from gpt_jax.leaf_names import named_leaves
from gpt_jax.model.gpt import init_params, make_model
from gpt_jax.model.lora import is_adapter
from gpt_jax.model.parameters import MergeReport, hash_of_parameters
from gpt_jax.training.adapters import check_donor_is_whole
from gpt_jax.training.donor import find_donor
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.programs import abstract_state, make_train_step
from gpt_jax.training.steps import init_state
from gpt_jax.training.train import train_and_evaluate
from gpt_jax.training.trainable import trained_parameters

LORA = {"lora__rank": 2, "lora__alpha": 4.0, "lora__dropout": 0.1, "optimizer__learning_rate": 0.03}
NO_PRODUCTS = ("matmul_finish", "matmul_column", "matmul_epilogue")  # what else a product's plan has


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    """The base of another run of adapters: a model of random numbers."""
    return write_adapter_run(tmp_path_factory.mktemp("donor") / "donor", model__block_size=16) / "base"


def config_of(folder: Path, donor: Path | str, **changes):
    quick = {"eval__every": 0, "sample__every": 0, "log__diagnostics_every": 0}
    return tiny(folder / "chats.jsonl", init_from=str(donor), **quick | LORA | changes)


@pytest.fixture(scope="module")
def finished(donor, tmp_path_factory) -> Path:
    """A run of adapters. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("lora")
    write_chats(folder / "chats.jsonl")
    assert train_and_evaluate(config_of(folder, donor), folder / "run") is None
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "there")
    return tmp_path / "there" / "run"


def record(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "position.json").read_text())


def test_checkpoints_hold_adapters_and_their_moments_and_the_base_is_saved_once(finished, donor):
    leaves = record(finished / "checkpoints" / "12")["leaves"]
    params = [name for name in leaves if name.startswith("params/")]
    assert len(params) == 8
    assert all(map(is_adapter, params))
    moments = [name for name in leaves if name.startswith("opt_state/") and name.count("/") > 3]
    assert len(moments) == 16
    assert all(map(is_adapter, moments))
    base, _ = restore_parameters(finished / "base")
    given, _ = restore_parameters(donor)
    assert hash_of_parameters(base) == hash_of_parameters(given)
    assert record(finished / "checkpoints" / "12")["position"]["adapts"] == {
        "base": hash_of_parameters(given),
        "scale": 2.0,
    }


def test_it_says_what_it_trains(finished):
    info = json.loads((finished / "run.json").read_text())
    assert info["trained_parameters"] == 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16) < info["parameters"] / 10
    assert f"{info['trained_parameters']:,}" in (finished / "log.txt").read_text()


@pytest.mark.slow
def test_who_reads_its_parameters_gets_them_merged(finished, donor):
    base, _ = restore_parameters(donor)
    (adapters, scale), description = restore_adapters(finished)
    assert scale == 2
    merged, also = restore_parameters(finished)
    assert description == also
    together = {**named_leaves(base), **named_leaves(adapters)}
    kernel = together["h_0/qkv/kernel"] + np.float32(2) * (together["h_0/qkv/lora_a"] @ together["h_0/qkv/lora_b"])
    np.testing.assert_array_equal(merged["h_0"]["qkv"]["kernel"], kernel)
    assert np.abs(kernel - together["h_0/qkv/kernel"]).max() > 1e-4
    np.testing.assert_array_equal(merged["wte"], base["wte"])
    assert named_leaves(merged).keys() == named_leaves(base).keys()
    config, params, _, _ = load_for_sampling(finished)
    assert config.lora.rank == 2
    jax.tree.map(np.testing.assert_array_equal, params, merged)
    with pytest.raises(UserError, match=r"has no adapters: give one of a run with config.lora.rank above 0"):
        restore_adapters(donor)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_without_its_donor(copy, finished):
    shutil.rmtree(copy / "checkpoints" / "12")
    config = config_of(copy.parent, "no longer there")
    assert train_and_evaluate(config, copy) is None
    assert "initialised from this run's checkpoint at step 8" in (copy / "log.txt").read_text()
    assert written(copy) == written(finished)
    leaves, expected = (named_leaves(restore_parameters(run / "checkpoints" / "12")[0]) for run in (copy, finished))
    for name in expected:
        np.testing.assert_array_equal(leaves[name], expected[name], err_msg=name)


@pytest.mark.parametrize("what", ["gone", "damaged", "another"])
def test_a_base_that_is_gone_damaged_or_another_one_is_one_line(copy, what):
    base = copy / "base" / "0"
    if what == "gone":
        shutil.rmtree(base.parent)
    elif what == "damaged":
        largest = max((file for file in base.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
    else:
        save_base(copy, {"wte": np.zeros(3, np.float32)})
    with pytest.raises(UserError) as caught:
        restore_parameters(copy)
    assert str(caught.value).startswith(f"{base}, the parameters that the adapters of {copy} were trained beside: ")
    assert str(caught.value).endswith("put them back, with which the run is whole again")


def test_a_run_of_adapters_is_a_donor_like_any_other(finished):
    config = tiny(finished.parent / "chats.jsonl", init_from=str(finished))
    check_donor(finished, abstract_state(config).params)
    params, _ = find_donor(str(finished)).read_parameters()
    jax.tree.map(np.testing.assert_array_equal, params, restore_parameters(finished)[0])
    wider = tiny(finished.parent / "chats.jsonl", model__embed_dim=32)
    with pytest.raises(UserError, match="no parameter of the checkpoint fits the model: it has h_0/ln_1/bias"):
        check_donor(finished, abstract_state(wider).params)


def test_a_donor_that_lacks_a_part_of_the_model_is_refused():
    new = {"h_1/ln_1/bias": "float32 (16,)", "h_1/qkv/lora_a": "float32 (16, 2)"}
    report = MergeReport(taken=(), dropped={}, mismatched={"wpe": ("float32 (8, 16)", "float32 (16, 16)")}, new=new)
    with pytest.raises(UserError, match=r"the donor has not all of it: wpe, h_1/ln_1/bias would stay random"):
        check_donor_is_whole(report, 16, 16)
    whole = MergeReport(taken=("wte",), dropped={}, mismatched={}, new={"h_1/qkv/lora_a": "float32 (16, 2)"})
    check_donor_is_whole(whole, 16, 32)
    with pytest.raises(UserError, match=r"block_size is 32 and the donor's 16: .*; give --config.model.block_size=16"):
        check_donor_is_whole(whole, 32, 16)


def test_targets_are_checked_before_any_work(donor, tmp_path):
    config = config_of(tmp_path, donor, lora__targets=("c_attn",))
    with pytest.raises(UserError, match=r"config.lora.targets: 'c_attn' is no linear layer: there are qkv, projection"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def steps_of(**changes):
    """(state on the host, step, batch) of a run of adapters."""
    config = config_of(Path("nowhere"), "a donor", **changes)
    model, optimizer, is_trained = make_model(config), make_optimizer(config), trained_parameters(config)
    state = jax.jit(lambda: init_state(init_params(model, 0), optimizer, is_trained))()
    stream = np.random.default_rng(0).integers(0, 270, (2, 17)).astype(np.int32)
    return (
        jax.tree.map(np.asarray, state),
        make_train_step(config),
        {"inputs": stream[:, :-1], "targets": stream[:, 1:]},
    )


@pytest.mark.slow
@needs_vulkan
def test_two_steps_are_those_of_xla_and_no_gradient_is_made_of_what_adapters_stand_beside():
    """Below the first linear layer nothing is trained: it needs no dx either."""
    state, step, batch = steps_of(lora__dropout=0.25)
    on_vulkan = vk_kernels.jit(step, donate_argnums=0, device=SELECTOR)
    found = {}
    for name, jitted in (("xla", jax.jit(step)), ("vulkan", on_vulkan)):
        after, _ = jitted(state, batch)
        after, metrics = jitted(after, batch)
        found[name] = jax.tree.map(np.asarray, (after.params, metrics))
    (params, metrics), (expected, expected_metrics) = found["vulkan"], found["xla"]
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=2e-4, err_msg=name)
    before, wanted = named_leaves(state.params), named_leaves(expected)
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(leaf, wanted[name], rtol=1e-3, atol=2e-5, err_msg=name)
        assert (leaf != before[name]).any() == is_adapter(name), name

    lowered = on_vulkan.lower(state, batch)
    assert set(lowered.donated) == set(lowered.program.aliases.values())  # the base stays where it is
    labels = [command.label for command in lowered.program.commands]
    layers, adapters, below = 4 + 1, 4, 1
    products = 2 * layers - below + 6 * adapters - below  # y and dx; of an adapter's two products dw too
    assert sum(label.startswith("matmul") and not label.startswith(NO_PRODUCTS) for label in labels) == products
