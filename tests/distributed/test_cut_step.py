"""The step of several processes, each with a device of its own: threads stand for them here, in one process."""

import dataclasses
import functools
import uuid
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vulkan_devices import SELECTOR, needs_vulkan
from waiting import PATIENCE

import vk_kernels
from configs import chat
from gpt_jax.distributed.buckets import ArrayPiece, Buckets
from gpt_jax.model.gpt import GPT, ModelConfig, init_params
from gpt_jax.training.cut_step import CutStep
from gpt_jax.training.optimizer import learning_rate_schedule, make_optimizer
from gpt_jax.training.steps import init_state, train_step
from vk_kernels.bridge.host_exchange import HostExchange
from vk_kernels.runtime.host_links import HostLinks

SEED, STEPS = 42, 3
MODEL = ModelConfig(vocab_size=50, block_size=16, num_layers=1, num_heads=2, embed_dim=48, dropout_rate=0.1)


def test_buckets_are_of_one_size_from_the_last_layer_to_the_first_and_give_the_tree_back():
    tree = {"head": np.arange(10.0), "wte": {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(7).reshape(())}}
    tree = jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)
    buckets = Buckets(tree, ("wte", "ln_f", "head"), "float32", 4 * 7)
    assert buckets.pieces == [
        [ArrayPiece(0, 0, 7)],
        [ArrayPiece(0, 7, 10), ArrayPiece(2, 0, 1), ArrayPiece(1, 0, 3)],
        [ArrayPiece(1, 3, 6)],
    ]
    packed = buckets.pack(tree)
    assert buckets.sizes == [7, 7, 3]
    assert [part.shape for part in packed] == [(7,), (7,), (3,)]
    jax.tree.map(np.testing.assert_array_equal, buckets.unpack(packed), tree)


def test_buckets_of_bfloat16_are_half_as_large_and_come_back_in_float32():
    tree = {"head": jnp.arange(10.0)}
    buckets = Buckets(tree, ("head",), "bfloat16", 20)
    packed = buckets.pack(tree)
    assert [(part.shape, part.dtype) for part in packed] == [((10,), jnp.bfloat16)]
    assert buckets.unpack(packed)["head"].dtype == jnp.float32


def test_a_small_tree_has_four_buckets_and_a_large_one_those_of_32_mb():
    small = {"head": jax.ShapeDtypeStruct((1001,), jnp.float32)}
    assert Buckets(small, ("head",), "float32").sizes == [251, 251, 251, 248]
    large = {"head": jax.ShapeDtypeStruct((40 << 20,), jnp.float32)}
    assert Buckets(large, ("head",), "bfloat16").sizes == [10 << 20] * 4
    assert Buckets(large, ("head",), "float32").sizes == [8 << 20] * 5


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"the layers \['head', 'tail'\] are not among \['head'\]"):
        Buckets({"head": np.zeros(2), "tail": np.zeros(2)}, ("head",), "float32")


def make_batch(step: int, rows: int = 4) -> dict[str, np.ndarray]:
    """The first half of the rows has fewer targets than the second, and in step 2 none."""
    stream = np.random.default_rng(step).integers(0, MODEL.vocab_size, (rows, 17)).astype(np.int32)
    targets = stream[:, 1:].copy()
    targets[: rows // 2, : 16 if step == 2 else 9] = -1
    return {"inputs": stream[:, :-1].copy(), "targets": targets}


@functools.cache
def parts():
    """(state on the host, what a step needs)."""
    settings = chat.get_config()
    settings.optimizer.update(learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=5, decay_steps=200)
    optimizer = make_optimizer(settings)
    options = {"optimizer": optimizer, "schedule": learning_rate_schedule(settings), "seed": SEED, "model": GPT(MODEL)}
    state = jax.jit(lambda: init_state(init_params(GPT(MODEL), SEED), optimizer))()
    return jax.tree.map(np.asarray, state), options


def run_alone(**more) -> tuple[list[float], object]:
    """One device with the whole batch, through XLA."""
    state, options = parts()
    step, losses = jax.jit(functools.partial(train_step, **options, **more)), []
    for i in range(STEPS):
        state, metrics = step(state, make_batch(i))
        losses.append({name: float(value) for name, value in metrics.items()})
    return losses, jax.tree.map(np.asarray, state)


def run_cut(count: int, **more) -> list[tuple[list[dict[str, float]], list[bytes], object]]:
    """Metrics of each process, the bits of its parameters and its state in the end."""
    name = uuid.uuid4().hex
    state, options = parts()
    jit = functools.partial(vk_kernels.jit, device=SELECTOR)

    def run(step: CutStep, index: int):
        step.make_exchange = lambda device, specs: HostExchange(device, HostLinks(name, index, count, PATIENCE), specs)
        leaves = tuple(jax.tree.leaves(vk_kernels.device_put(state, SELECTOR)))
        found = []
        for i in range(STEPS):
            rows = slice(index * 4 // count, (index + 1) * 4 // count)
            leaves, metrics = step(leaves, {key: x[rows] for key, x in make_batch(i).items()})
            found.append({key: float(value) for key, value in metrics.items()})
        host = jax.tree.unflatten(jax.tree.structure(state), [np.asarray(leaf) for leaf in leaves])
        return found, [leaf.tobytes() for leaf in jax.tree.leaves(host)], host

    batch = {key: x[: 4 // count] for key, x in make_batch(0).items()}
    steps = []
    for index in range(count):  # compiled here, and not by all threads at once
        own = {"model": GPT(dataclasses.replace(MODEL, first_text=index * 4 // count))}
        steps.append(CutStep(state, None, jit, bucket_bytes=2**16, **options | own | more))
        steps[index]._update = steps[0]._update  # the same for all
        for lowered in steps[index].lower(tuple(jax.tree.leaves(state)), batch):
            lowered.compile()
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(run, steps, range(count)))
    for step in steps:
        [compiled] = step._gradient._compiled.values()
        assert len(compiled.executable._cuts) > len(step.specs) // 2  # buckets are ready one after another
    return found


@needs_vulkan
def test_two_devices_train_as_one_with_the_whole_batch_and_stay_the_same_bit_for_bit():
    expected, state = run_alone()
    (found, bits, last), (_, other_bits, _) = run_cut(2)
    assert bits == other_bits
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), last.params, state.params)
    assert int(last.step) == STEPS
