"""The products of a gradient as ops of their own: where the compiler makes them, and that the bits stay."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_plan import BF16, F32, normal, run, same_bits
from test_matmul_plans import with_cooperative_matrices
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from vk_kernels import ops
from vk_kernels.compiler.from_jaxpr import make_graph
from vk_kernels.compiler.partition import partition
from vk_kernels.compiler.passes.fuse_epilogue import fuse_epilogues
from vk_kernels.compiler.passes.simplify import simplify
from vk_kernels.compiler.passes.split_ops import split_ops
from vk_kernels.ops.matmul.gradient_parts import plan_matmul_dw, plan_matmul_dx
from vk_kernels.ops.matmul.planner import plan_matmul_backward
from vk_kernels.ops.matmul.reference import matmul_backward_reference
from vk_kernels.runtime.array_spec import ArraySpec

pytestmark = needs_vulkan

WHOLE = {"activation": None, "has_bias": False, "dropout_rate": 0.0, "site": 0}


def gradients(layers=2, width=128, rows=96, dtype=jnp.bfloat16, bias=None, variant=None):
    """The graph of the gradients of two products a layer, with GELU between them."""

    def loss(matrices, x):
        for first, second in matrices:
            x = ops.matmul(ops.matmul(x, first, bias, activation="gelu"), second)
        return x.astype(jnp.float32).sum()

    pair = jax.ShapeDtypeStruct((width, 2 * width), dtype), jax.ShapeDtypeStruct((2 * width, width), dtype)
    with vk_kernels.use("vulkan", device=SELECTOR, variant=variant):
        traced = jax.make_jaxpr(jax.grad(loss))([pair] * layers, jax.ShapeDtypeStruct((rows, width), dtype))
    return fuse_epilogues(simplify(make_graph(traced)))


def products(graph):
    return [node.op for node in graph.nodes if node.op.startswith("matmul_")]


def test_gradients_of_matrices_wait_for_one_another(device):
    plain = gradients()
    found = split_ops(plain, with_cooperative_matrices(device.info))
    assert products(plain) == ["matmul_backward"] * 4
    assert products(found) == [*["matmul_dx", "matmul_dw"] * 3, "matmul_dw"]  # nobody asked for the gradient of x
    assert [node.params["beside"] for node in found.nodes if node.op == "matmul_dw"] == [4] * 4
    assert [node.params["has_slope"] for node in found.nodes if node.op == "matmul_dx"] == [True, False, True]
    steps = partition(found).steps
    levels = {step.level for step in steps if step.node and step.node.op == "matmul_dw"}
    assert levels == {max(step.level for step in steps)}


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": 1, "width": 2048},  # more tiles than a device has cores
        {"dtype": jnp.float32},
        {"variant": "plain"},
        {"bias": np.zeros(256, jnp.bfloat16)},  # of the first of each layer
        {"rows": 1 << 15},  # long enough to fill a device one by one, and too large to be kept
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_fills_a_device_or_is_no_bare_product_stays_whole(device, changed):
    found = products(split_ops(gradients(**changed), with_cooperative_matrices(device.info)))
    assert found.count("matmul_dw") == (2 if "bias" in changed else 0)


def test_what_nobody_reads_is_not_counted(device):
    whole = gradients()
    frozen = replace(whole, outputs=whole.outputs[1:])  # the first matrix is not trained
    found = split_ops(frozen, with_cooperative_matrices(device.info))
    assert products(found).count("matmul_dw") == 3
    assert [node.params["beside"] for node in found.nodes if node.op == "matmul_dw"] == [3] * 3


def test_a_single_product_stays_whole(device):
    def loss(w, x):
        return ops.matmul(x, w).astype(jnp.float32).sum()

    w, x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), jax.ShapeDtypeStruct((96, 128), jnp.bfloat16)
    with vk_kernels.use("vulkan", device=SELECTOR):
        graph = simplify(make_graph(jax.make_jaxpr(jax.grad(loss))(w, x)))
    assert products(split_ops(graph, with_cooperative_matrices(device.info))) == ["matmul_backward"]


def test_beside_others_k_is_not_cut(device):
    info = with_cooperative_matrices(device.info)
    dy, x, dw = ArraySpec((4096, 256), BF16), ArraySpec((4096, 1024), BF16), ArraySpec((1024, 256), BF16)
    alone = plan_matmul_dw(info, [dy, x], [dw], transposed=False, beside=1)
    together = plan_matmul_dw(info, [dy, x], [dw], transposed=False, beside=18)
    assert [made.kernel for made in alone.dispatches] == ["matmul_coop1", "matmul_finish"]
    assert [made.kernel for made in together.dispatches] == ["matmul_coop1"]


@pytest.mark.parametrize(
    ("transposed", "slope", "dtype"), [(False, True, BF16), (True, False, BF16), (False, True, F32)]
)
def test_parts_have_the_bits_of_the_whole(device, transposed, slope, dtype):
    dy, x = normal(60, 48, dtype=dtype), normal(60, 40, seed=1, dtype=dtype)
    w = normal(*((48, 40) if transposed else (40, 48)), seed=2, dtype=dtype)
    before = [normal(60, 40, seed=3, dtype=dtype)] if slope else []
    options = WHOLE | {"transposed": transposed, "input_activation": "gelu" if slope else None}
    reference = functools.partial(matmul_backward_reference, **options)
    whole = run(device, plan_matmul_backward, matmul_backward_reference, dy, x, w, *before, **options)

    def only_dx(dy, w, *before, **_):
        return reference(dy, jnp.zeros((60, 40), dtype), w, *before)[0]

    def only_dw(dy, x, **_):
        return reference(dy, x, jnp.zeros(w.shape, dtype), *map(jnp.asarray, before))[1]

    dx = run(device, plan_matmul_dx, only_dx, dy, w, *before, transposed=transposed, has_slope=slope)
    dw = run(device, plan_matmul_dw, only_dw, dy, x, transposed=transposed, beside=1)
    assert same_bits([*dx, *dw], whole)
