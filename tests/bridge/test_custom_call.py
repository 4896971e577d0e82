"""Operations under JAX's transformations as custom calls, on an operation that only copies."""

import os
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from vulkan_devices import SELECTOR, memory_at_rest, needs_vulkan
from waiting import PATIENCE

import vk_kernels
from vk_kernels.bridge.custom_call import counts
from vk_kernels.bridge.differentiable import make_differentiable
from vk_kernels.bridge.primitive import make_primitive
from vk_kernels.bridge.use import target_of
from vk_kernels.compiler.op_call import CallSite, decode_call, encode_call, make_plan
from vk_kernels.compiler.op_registry import KernelOp
from vk_kernels.errors import BufferSizeError, NoDeviceError
from vk_kernels.runtime import open_devices
from vk_kernels.runtime.array_spec import ArraySpec
from vk_kernels.runtime.dispatch_plan import Dispatch, Plan
from vk_kernels.runtime.open_devices import open_device
from vk_kernels.runtime.physical_device import list_devices
from vk_kernels.runtime.vulkan import vk

pytestmark = needs_vulkan

TARGET = CallSite(SELECTOR)


def plan_copies(info, inputs, outputs, *, kernel="copy"):
    """outputs[i] = inputs[i], in f32. The kernel 'broken' gets push constants that it does not take."""
    dispatches = []
    for i, x in enumerate(inputs):
        if x.dtype != np.float32:
            raise ValueError(f"float32 is needed, found {x.dtype}")
        if x.size:
            groups = -(-x.size // 256)
            folded = (min(groups, 65535), 1, 1)
            push_constants = struct.pack("I", x.size) * (2 if kernel == "broken" else 1)
            name = "copy" if kernel == "broken" else kernel
            dispatches.append(Dispatch(name, "f32", (), (i, len(inputs) + i), push_constants, folded))
    return Plan(tuple(dispatches))


def copies(*operands, kernel="copy"):
    return tuple(x + 0 for x in operands)


COPY = make_primitive("test_copy", copies, KernelOp(plan_copies, batch_axes=lambda kernel: (True,)))
COPY_IN_TURN = make_primitive("test_copy_in_turn", copies, KernelOp(plan_copies))
PAIR = make_primitive("test_pair", copies, KernelOp(plan_copies))
PAIR_BACKWARD = make_primitive("test_pair_backward", copies, KernelOp(plan_copies))
pair_operation = make_differentiable(
    PAIR,
    lambda target, operands, results, cotangents, **parameters: PAIR_BACKWARD.bind(
        *cotangents, target=target, **parameters
    ),
    outputs=2,
)


def copy(x, target=TARGET, primitive=COPY, kernel="copy"):
    return primitive.bind(x, target=target, kernel=kernel)[0]


def pair(x, w):
    return pair_operation(TARGET, x, w, kernel="copy")


def ran(function, *arguments):
    """(what it returns, how many copies ran on the device for it)."""
    before = counts().get("copy.f32", 0)
    result = jax.block_until_ready(function(*arguments))
    return result, counts().get("copy.f32", 0) - before


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4, 5), (0, 7)])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_one_call(shape, transform):
    x = numbers(*shape)
    y, calls = ran(transform(copy), x)
    np.testing.assert_array_equal(y, x)
    assert y.shape == shape
    assert calls == (1 if x.size else 0)


@pytest.mark.parametrize("shape", [(600, 600), (513, 1023), (1024, 1024)])
def test_over_a_megabyte(shape):
    """Large arrays are imported or copied, by size, alignment and device; all the same to the caller."""
    x = numbers(*shape)
    y, calls = ran(jax.jit(lambda x: copy(x + 1)[1:] * 2), x)
    np.testing.assert_array_equal(y, (x + 1)[1:] * 2)
    assert calls == 1


def test_memory_that_the_driver_will_not_import_is_copied(monkeypatch):
    device = open_device(SELECTOR)
    refuse = lambda *_: vk.VK_ERROR_INVALID_EXTERNAL_HANDLE  # noqa: E731
    monkeypatch.setattr(device.fn, "vkGetMemoryHostPointerPropertiesEXT", refuse, raising=False)
    x = numbers(1024, 1024)
    y, calls = ran(jax.jit(copy), x)
    np.testing.assert_array_equal(y, x)
    assert calls == 1


def test_what_is_too_large_to_be_planned_says_so():
    huge = jax.ShapeDtypeStruct((1 << 16, 1 << 16), jnp.bfloat16)
    with pytest.raises(BufferSizeError, match=r"gelu\(bfloat16\[4294967296\]\).* 8,589,934,592 bytes"):
        make_plan(
            open_device(SELECTOR),
            encode_call("gelu", {}, CallSite()).encode(),
            (ArraySpec((huge.size,), np.dtype(jnp.bfloat16)),),
            (ArraySpec((huge.size,), np.dtype(jnp.bfloat16)),),
        )


def test_many_calls_keep_memory_flat():
    device = open_device(SELECTOR)
    x = jnp.asarray(numbers(1024, 300))
    run = jax.jit(copy)
    run(x).block_until_ready()
    before = memory_at_rest(device)
    for _ in range(50):
        run(x).block_until_ready()
    after = memory_at_rest(device)
    assert (after.used, after.buffers, after.reserved) == (before.used, before.buffers, before.reserved)


def test_no_target_is_the_reference():
    y, calls = ran(jax.jit(lambda x: copy(x, target=None)), numbers(3))
    np.testing.assert_array_equal(y, numbers(3))
    assert calls == 0


def test_grad():
    x, w = numbers(4, 3), numbers(3)

    def loss(x, w):
        y, v = pair(x, w)
        return jnp.sum(y * y) + jnp.sum(3 * v)

    (dx, dw), calls = ran(jax.jit(jax.grad(loss, argnums=(0, 1))), x, w)
    np.testing.assert_array_equal(dx, 2 * x)
    np.testing.assert_array_equal(dw, np.full(3, 3, np.float32))
    assert calls == 4  # two copies forward, two backward


def test_vmap_folds_or_runs_in_turn():
    x = numbers(5, 2, 3)
    folded, calls = ran(jax.jit(jax.vmap(copy)), x)
    np.testing.assert_array_equal(folded, x)
    assert calls == 1
    in_turn, calls = ran(jax.jit(jax.vmap(lambda x: copy(x, primitive=COPY_IN_TURN), in_axes=1, out_axes=1)), x)
    np.testing.assert_array_equal(in_turn, x)
    assert calls == 2


def test_vmap_of_one_operand_and_of_grad():
    x, w = numbers(5, 3), numbers(3)
    y, v = jax.vmap(pair, in_axes=(0, None))(x, w)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(v, np.broadcast_to(w, (5, 3)))
    gradient = jax.vmap(jax.grad(lambda x, w: jnp.sum(pair(x, w)[0] ** 2)), in_axes=(0, None))(x, w)
    np.testing.assert_array_equal(gradient, 2 * x)


def test_scan_and_remat():
    x = numbers(6, 4)

    def loss(x):
        body = jax.checkpoint(lambda carry, row: (carry + jnp.sum(pair(row, row)[0] ** 2), None))
        return jax.lax.scan(body, 0.0, x)[0]

    gradient, calls = ran(jax.jit(jax.grad(loss)), x)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)
    assert calls >= 6 * 4


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_data_parallel(check_vma):
    """Two CPU devices, half of the batch each: a replicated operand's gradient is the sum over both."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    batch, replicated = PartitionSpec("data"), PartitionSpec()

    def local_loss(x, w):
        y, v = pair(x, w)
        return jax.lax.psum(jnp.sum(y * v[None]), "data")

    loss = jax.shard_map(local_loss, mesh=mesh, in_specs=(batch, replicated), out_specs=replicated, check_vma=check_vma)
    x, w = numbers(4, 3), numbers(3)
    (value, (dx, dw)), calls = ran(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), x, w)
    np.testing.assert_allclose(value, np.sum(x * w), rtol=1e-5)
    np.testing.assert_allclose(dx, np.broadcast_to(w, x.shape), rtol=1e-6)
    np.testing.assert_allclose(dw, x.sum(0), rtol=1e-5)
    assert calls == 2 * 4


def test_grad_inside_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def local(x, w):
        return jax.grad(lambda w: jnp.sum(pair(x, w)[1] * x.sum(0)))(w)

    gradients = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec())
    )
    x, w = numbers(4, 3), numbers(3)
    np.testing.assert_allclose(gradients(x, w), x.sum(0), rtol=1e-5)


def test_forward_mode_and_second_order_say_why_not():
    x = numbers(3)
    with pytest.raises(TypeError, match="no forward-mode"):
        jax.jvp(copy, (x,), (x,))
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(lambda x: pair(x, x)[0], (x,), (x,))
    with pytest.raises(TypeError, match="no second derivative"):
        jax.hessian(lambda x: jnp.sum(pair(x, x)[0] ** 2))(x)
    with pytest.raises(TypeError, match="no second derivative"):
        jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(pair(x, x)[0] ** 2))(x)))(x)


def test_what_the_planner_refuses_is_an_error_of_the_trace():
    with pytest.raises(ValueError, match=r"test_copy\(int32\[3\]\) on .*: float32 is needed, found int32"):
        jax.jit(copy)(np.arange(3, dtype=np.int32))
    with pytest.raises(ValueError, match=r"bfloat16\[2\]"):
        copy(np.zeros(2, ml_dtypes.bfloat16))


def test_a_buffer_over_the_limit_is_an_error_of_the_trace():
    limit = open_device(SELECTOR).limits.storage_buffer_range
    shape = jax.ShapeDtypeStruct((limit // 4 + 1,), np.float32)
    with pytest.raises(BufferSizeError, match="maxStorageBufferRange"):
        jax.jit(copy).lower(shape)


def test_a_kernel_that_cannot_be_made_is_an_error_of_the_trace():
    with pytest.raises(ValueError, match=r"test_copy\(float32\[3\]\) on .*'absent\.f32'"):
        jax.jit(lambda x: copy(x, kernel="absent")).lower(numbers(3))


def test_failure_on_the_device_is_an_error_with_its_message_and_no_more():
    run = jax.jit(lambda x: copy(x, kernel="broken") + 1)
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"test_copy\(float32\[3\]\).* 4 bytes of push constants"):
            run(numbers(3)).block_until_ready()
    np.testing.assert_array_equal(copy(numbers(3)), numbers(3))


def test_another_platform_is_refused():
    with pytest.raises(NotImplementedError, match=r"JAX_PLATFORMS=cpu"):
        jax.jit(copy).trace(numbers(3)).lower(lowering_platforms=("cuda",))


def test_threads():
    run = jax.jit(lambda x: copy(x * 2) + 1)
    failures = []

    def work(seed):
        x = np.random.default_rng(seed).standard_normal((700, 600)).astype(np.float32)
        for _ in range(5):
            if not np.array_equal(run(x), x * 2 + 1):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_concurrent_calls_of_one_program():
    x = numbers(8, 300, 300)
    y, calls = ran(jax.jit(lambda x: sum(copy(x[i] + i) for i in range(8))), x)
    np.testing.assert_allclose(y, sum(x[i] + i for i in range(8)), rtol=1e-5, atol=1e-6)
    assert calls == 8


# Which implementation runs.


def identity(x, implementation=None):
    """An operation as `vk_kernels.ops` has them."""
    target = target_of(implementation)
    return x + 0 if target is None else copy(x, target)


def test_use_is_part_of_the_cache_key():
    x = numbers(3)
    run, gradient = (
        jax.jit(identity),
        jax.jit(lambda x: jax.lax.scan(lambda c, row: (c, identity(row)), 0, x)[1]),
    )
    assert ran(run, x)[1] == 0
    with vk_kernels.use("vulkan", device=SELECTOR):
        assert ran(run, x)[1] == 1
        assert ran(gradient, x)[1] == 3
        with vk_kernels.use("xla"):
            assert ran(run, x)[1] == 0
            assert ran(gradient, x)[1] == 0
        assert ran(run, x)[1] == 1
    assert ran(run, x)[1] == 0


def test_use_under_remat_and_custom_derivatives():
    """Caches inside JAX, of traces below jit, know the context too."""
    inner = jax.checkpoint(lambda x: identity(x))
    x = numbers(3)
    assert ran(inner, x)[1] == 0
    with vk_kernels.use("vulkan", device=SELECTOR):
        assert ran(inner, x)[1] == 1
    assert ran(inner, x)[1] == 0


def test_backward_runs_as_forward_did():
    with vk_kernels.use("vulkan", device=SELECTOR):
        target = target_of(None)
        _, pullback = jax.vjp(lambda x: pair_operation(target, x, x, kernel="copy")[0], numbers(3))
    assert ran(pullback, numbers(3))[1] == 2


def test_an_argument_overrides_use():
    assert target_of(None) is None
    with vk_kernels.use("vulkan", device=SELECTOR):
        assert target_of("xla") is None
        assert target_of("vulkan") == TARGET
        with vk_kernels.use("xla"):
            assert target_of(None) is None
        with vk_kernels.use("vulkan"):
            assert target_of(None) == TARGET
    assert target_of("vulkan") == CallSite()


def test_use_is_of_this_thread_and_ends_with_an_error():
    seen = []

    def fail():
        with vk_kernels.use("vulkan", device=SELECTOR):
            thread = threading.Thread(target=lambda: seen.append(target_of(None)))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [None]
    assert target_of(None) is None


def test_use_refuses_what_it_does_not_know():
    for arguments in [("metal",), (None,)]:
        with pytest.raises(ValueError, match=r"'xla' or 'vulkan'"), vk_kernels.use(*arguments):
            pass
    with pytest.raises(ValueError, match="'vulkan' only"), vk_kernels.use("xla", device="cpu"):
        pass
    absent = vk_kernels.use("vulkan", device="absent")
    with pytest.raises(NoDeviceError, match="no Vulkan device is called 'absent'"), absent:
        pass


@needs_vulkan
def test_no_gpu_says_what_to_do(monkeypatch):
    if any(info.kind != "cpu" for info in list_devices()):
        pytest.skip("a GPU is here")
    monkeypatch.delenv("VK_KERNELS_DEVICE", raising=False)
    monkeypatch.setattr(open_devices, "_devices", {})  # of a process that has none open
    with pytest.raises(NoDeviceError, match="VK_KERNELS_DEVICE=cpu"), vk_kernels.use("vulkan"):
        pass


# Processes.


def run_process(code, **environment):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    # `at_end` runs after the exit handlers of all that is imported below its registration.
    program = "import atexit, sys\nat_end = int\natexit.register(lambda: at_end())\n"
    program += f"sys.path[:0] = {folders!r}\n"
    program += "from test_custom_call import *\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,  # a deadlock fails
    )


def test_a_program_from_the_disk_cache_runs(tmp_path):
    """Nothing in a compiled program belongs to the process that compiled it."""
    code = """
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        y, calls = ran(jax.jit(lambda x: copy(x) * 2), numbers(5))
        np.testing.assert_array_equal(y, numbers(5) * 2)
        assert calls == 1
    """
    for _ in range(2):
        done = run_process(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("result", ["held", "dropped"])
def test_the_process_ends_while_calls_run(result):
    """Results that are held are finished; nothing hangs, whoever holds them."""
    keep = "results.append(f(x))" if result == "held" else "f(x)"
    done = run_process(f"""
        f, x, results = jax.jit(lambda x: copy(x + 1)), numbers(700, 700), []
        at_end = lambda: print(len(results), sum(np.array_equal(y, x + 1) for y in results))
        f(x).block_until_ready()
        for _ in range(20): {keep}
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == (["20", "20"] if result == "held" else ["0", "0"])


def test_parameters_survive_the_call_string():
    parameters = {"rate": 0.1, "shape": (2, (3, 4)), "name": "a", "none": None, "flag": True, "huge": 1e30}
    operation, decoded, target = decode_call(encode_call("op", parameters, CallSite("cpu", "plain")).encode())
    assert (operation, decoded, target) == ("op", parameters, CallSite("cpu", "plain"))


def test_arrays_know_their_size():
    assert ArraySpec((2, 3), np.dtype(ml_dtypes.bfloat16)).nbytes == 12
    assert str(ArraySpec((2, 3), np.dtype(np.float32))) == "float32[2,3]"
    assert ArraySpec((0, 3), np.dtype(np.float32)).nbytes == 0
