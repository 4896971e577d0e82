"""Several devices give what one gives with the whole batch: rows, dropout, losses, parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meeting import everywhere, meet, states_that_differ
from ml_collections import ConfigDict
from vulkan_devices import SELECTOR

from configs import chat
from gpt_jax.data.batches import evaluation_batches, windows
from gpt_jax.data.token_cache import Tokens
from gpt_jax.distributed.mesh import OnMesh
from gpt_jax.distributed.placement import OneDevice, Share
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import init_params, make_model
from gpt_jax.training.optimizer import make_optimizer
from gpt_jax.training.programs import make_train_step
from gpt_jax.training.steps import init_state, loss_and_gradient
from vk_kernels import ops, use
from vk_kernels.ops.philox import site_at


def tiny() -> ConfigDict:
    config = chat.get_config()
    model = {"vocab_size": 48, "block_size": 16, "num_layers": 1, "num_heads": 2, "embed_dim": 16, "dropout_rate": 0.3}
    config.model.update(**model)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=2)
    config.update(num_steps=10, batch_size=8, accumulate_steps=2)
    return config


def make_batch(step: int) -> dict[str, np.ndarray]:
    """Some texts have targets, others few: a mean of means is another number."""
    drawn = np.random.default_rng(step).integers(0, 48, (8, 17)).astype(np.int32)
    targets = np.where(np.arange(16) < np.array([16, 1, 0, 3, 16, 9, 0, 2])[:, None], drawn[:, 1:], -1)
    return {"inputs": drawn[:, :-1], "targets": targets.astype(np.int32)}


def rows_of(batch: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in batch.items()}


def train(placement: OneDevice, put, steps: int = 3) -> tuple[list[float], list[np.ndarray], list[jax.Array]]:
    """Losses of some steps, the gradient's norms, and the leaves of the last state."""
    config = tiny()
    model, optimizer = make_model(config), make_optimizer(config)
    state = jax.jit(lambda: init_state(init_params(model, 1), optimizer))()
    structure = jax.tree.structure(state)

    def on_leaves(leaves, batch):
        new, metrics = make_train_step(config, placement)(jax.tree.unflatten(structure, leaves), batch)
        return tuple(jax.tree.leaves(new)), metrics

    step = jax.jit(on_leaves, **placement.step_options(state))
    leaves, losses, norms = tuple(jax.tree.leaves(put(state))), [], []
    for number in range(steps):
        leaves, metrics = step(leaves, placement.batch(make_batch(number), 2))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return losses, norms, leaves


@pytest.fixture(scope="module")
def alone():
    return train(OneDevice(), lambda state: state)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["replicated", "fsdp"])
def test_two_devices_of_xla_train_as_one_does(alone, shard):
    mesh = OnMesh(jax.devices()[:2], shard)
    losses, norms, leaves = train(mesh, mesh.put)
    np.testing.assert_allclose(losses, alone[0], rtol=3e-7)
    np.testing.assert_allclose(norms, alone[1], rtol=3e-6)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    size = sum(leaf.size for leaf in leaves)
    assert held < 0.51 * size if shard == "fsdp" else held == size
    for mine, other in zip(mesh.whole(leaves), alone[2], strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-3, atol=2e-5)
    for leaf in mesh.own(leaves):
        assert leaf.sharding.device_set == {jax.devices()[0]}


def test_processes_of_xla_compare_the_bits_of_what_each_of_them_has():
    meshes = [OnMesh(jax.devices()[:1], "replicated", process) for process in meet(2)]
    states = [meshes[0].put(state) for state in states_that_differ()]

    def check(index: int) -> str:
        assert meshes[index].settle(states[0], 3) is states[0]
        with pytest.raises(UserError) as caught:
            meshes[index].settle(states[index], 4)
        return str(caught.value)

    for line in everywhere([0, 1], check):
        assert line.startswith("h_0/w after step 4 is ")
        assert "process 1 (pid " in line


@pytest.mark.slow
def test_the_parts_of_a_batch_keep_the_bits_of_dropout(alone):
    """A device that has some texts, and knows which, drops what one device with all of them drops."""
    config, batch = tiny(), make_batch(0)
    params = init_params(make_model(config), 1)
    gradient = jax.jit(loss_and_gradient, static_argnames=("model", "seed", "accumulate_steps"))
    count = jnp.float32(max((batch["targets"] >= 0).sum(), 1))
    total, gradients = 0.0, []
    for index in (0, 1):
        share = Share(index, 1, 2)
        model = make_model(config, first_text=2 * index)  # of 4 texts in each part of the batch
        part = rows_of(batch, share.rows(8, 2))
        loss, grads = gradient(params, part, jnp.int32(0), count, model=model, seed=config.seed, accumulate_steps=2)
        total, gradients = total + float(loss), [*gradients, grads]
    assert total == pytest.approx(alone[0][0], rel=3e-7)
    summed = jax.tree.map(jnp.add, *gradients)
    norm = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(summed))))
    assert norm == pytest.approx(alone[1][0], rel=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_an_operation_on_some_rows_draws_their_bits(implementation, request):
    if implementation == "vulkan":
        request.getfixturevalue("device")
    drawn = np.random.default_rng(0)
    x = drawn.normal(size=(4, 8, 16)).astype(np.float32)
    qkv = drawn.normal(size=(4, 8, 3, 2, 8)).astype(np.float32)
    w = drawn.normal(size=(16, 16)).astype(np.float32)
    one, rng = np.ones(16, np.float32), np.array([7, 3], np.uint32)
    drop = functools.partial(ops.dropout, rate=0.5)
    operations = {  # of some texts, the site, and how many rows of its grid a text has
        "dropout": (lambda some, site: drop(x[some], rng, site=site), 8),
        "matmul": (lambda some, site: ops.matmul(x[some], w, rng=rng, dropout_rate=0.5, site=site), 8),
        "residual_layer_norm": (
            lambda some, site: ops.residual_layer_norm(x[some], x[some], one, one, rng, dropout_rate=0.5, site=site)[0],
            8,
        ),
        "packed_attention": (lambda some, site: ops.packed_attention(qkv[some], rng, dropout_rate=0.5, site=site), 2),
    }
    with use(implementation, device=SELECTOR if implementation == "vulkan" else None):
        for name, (operation, rows) in operations.items():
            whole = np.asarray(operation(slice(None), 5))
            parts = [operation(slice(i, i + 2), site_at(5, i * rows)) for i in (0, 2)]
            np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6, atol=1e-6, err_msg=name)
            again = np.asarray(operation(slice(2, 4), 5))
            assert not np.allclose(again, whole[2:]), name


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_the_rows_of_all_devices_are_each_part_of_the_batch(parts, total):
    size = 12 * parts
    shares = [Share(first, 1, total).rows(size, parts).reshape(parts, -1) for first in range(total)]
    together = np.concatenate(shares, axis=1)
    np.testing.assert_array_equal(together, np.arange(size).reshape(parts, -1))
    if total == 4:  # processes that hold several devices
        np.testing.assert_array_equal(Share(1, 3, 4).rows(size, parts).reshape(parts, -1), together[:, 12 // 4 :])


def test_a_batch_that_does_not_go_into_the_devices_is_said():
    Share(0, 1, 4).check_batch(16, 2)
    with pytest.raises(UserError, match=r"batch_size=10 in 2 parts does not go evenly into 4 devices: 8 or 16 does"):
        Share(0, 1, 4).check_batch(10, 2)


def test_a_process_reads_its_rows_of_every_batch():
    stream = Tokens(np.arange(73, dtype=np.uint16), np.zeros(73, np.uint8))
    shape = {"block_size": 8, "batch_size": 4}
    shares = [Share(first, 1, 2) for first in (0, 1)]
    whole = windows(stream, seed=3, **shape)
    mine = [windows(stream, seed=3, rows=share.rows(4, 2), **shape) for share in shares]
    for number in (0, 1, 1000):
        for share, some in zip(shares, mine, strict=True):
            np.testing.assert_array_equal(some[number]["inputs"], whole[number]["inputs"][share.rows(4, 2)])
    whole = evaluation_batches(stream, batches=9, **shape)
    mine = [evaluation_batches(stream, batches=9, rows=share.rows(4), **shape) for share in shares]
    assert len(whole) == 3  # of 9 windows: the last has one and is filled up
    for number in range(3):
        for name in ("inputs", "targets"):
            together = np.concatenate([some[number][name] for some in mine])
            np.testing.assert_array_equal(together, whole[number][name])
