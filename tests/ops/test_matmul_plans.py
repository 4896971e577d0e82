"""The plans of matrix products: which kernels run, and what cannot be multiplied. Nothing runs on the device."""

import dataclasses
import functools

import pytest
from run_plan import BF16, F32
from vulkan_devices import SELECTOR, needs_vulkan, with_cooperative_matrices

from vk_kernels.errors import FeatureError
from vk_kernels.ops.matmul.gemm import (
    CPU_TILES,
    NOTHING,
    TILES,
    Epilogue,
    SoftmaxGradient,
    choose_tile,
    choose_variant,
    matrix,
    plan_gemm,
)
from vk_kernels.ops.matmul.planner import plan_matmul_forward
from vk_kernels.runtime.array_spec import ArraySpec

pytestmark = [needs_vulkan, pytest.mark.usefixtures("strict_dtypes")]


def test_a_tile_is_chosen_by_how_many_there_are():
    big, *_, small = tiles = TILES["coop2"]
    assert choose_tile(tiles, 8192, 8192, 8192) == (big, 1)
    assert choose_tile(tiles, 4096, 256, 256) == (small, 1)
    assert choose_tile(tiles, 64, 64, 64) == (small, 1)
    tile, splits = choose_tile(tiles, 768, 768, 16384)  # too few tiles for 132 cores
    assert splits * (768 // tile.m) * (768 // tile.n) > 100
    assert choose_tile(tiles, 10**6, 64, 512, batch=2)[1] == 1
    for family in (*TILES.values(), CPU_TILES):
        assert all(choose_tile((tile,), 100, 30, 0) == (tile, 1) for tile in family)


def test_a_plain_tile_is_chosen_by_how_many_fill_the_device():
    tiles = big, wide, _, small = TILES["plain"]
    assert choose_tile(tiles, 4096, 1024, 256) == (big, 1)  # all at once: 256, two to a core
    assert choose_tile(tiles, 4096, 768, 768) == (wide, 1)  # 384, three to a core
    assert choose_tile(tiles, 64, 48, 64) == (small, 1)


def test_a_tile_in_stages_is_chosen_where_whole_ones_fill_the_device():
    staged, *_ = tiles = TILES["coop1"]
    assert choose_tile(tiles, 4096, 768, 768) == (staged, 1)
    assert choose_tile(tiles, 768, 3072, 16384)[0] == staged
    for m, n, k in [(4096, 768, 800), (4096, 800, 768), (4096, 256, 256)]:  # it would load with bounds; too few of them
        assert choose_tile(tiles, m, n, k)[0] != staged


def test_a_tile_in_stages_takes_rows_of_b_along_n_alone(device):
    info = with_cooperative_matrices(device.info)
    a, b, c = matrix(0, BF16, 4096, 768), matrix(1, BF16, 768, 768), matrix(2, BF16, 4096, 768)
    tile = TILES["coop1"][0]
    for transpose_b, staged in [(False, True), (True, False)]:
        (found,) = plan_gemm(info, a, b, c, transpose_b=transpose_b, scratch=3).dispatches
        assert (found.kernel, found.variant == "bf16_128x192x128") == ("matmul_coop1", staged)
        assert ("TRANSPOSE_B" in dict(found.spec)) != staged
    with pytest.raises(ValueError, match=r"matmul tile 128x192x128 takes no transposed b"):
        plan_gemm(info, a, b, c, transpose_b=True, scratch=3, tile=tile)


@pytest.mark.parametrize(("sizes", "kernel"), [((8, 8), "matmul_lanes"), ((4, 8), "matmul_lanes"), ((4, 4), "matmul")])
def test_the_vectors_of_a_cpu_have_a_kernel_of_their_own(device, sizes, kernel):
    limits = dataclasses.replace(device.info.limits, subgroup_size_range=sizes, subgroup_size_selectable=True)
    info = dataclasses.replace(device.info, kind="cpu", limits=limits)
    places = (matrix(0, F32, 64, 32), matrix(1, F32, 32, 48), matrix(2, F32, 64, 48))
    (dispatch,) = plan_gemm(info, *places, scratch=3).dispatches
    assert (dispatch.kernel, dispatch.subgroup_size) == (kernel, 8 if kernel == "matmul_lanes" else None)


def test_loads_without_bounds_where_k_is_whole_tiles(device):
    for m, n, k, whole in [(3, 4, 48, True), (3, 5, 48, False), (4, 4, 44, False), (4, 4, 47, False), (4, 4, 0, False)]:
        places = (matrix(0, F32, m, k), matrix(1, F32, k, n), matrix(2, F32, m, n))
        for tile in TILES["plain"]:
            plan = plan_gemm(device.info, *places, scratch=3, tile=tile)
            assert dict(plan.dispatches[0].spec)["WHOLE"] == (whole and tile.unbounded)


def test_what_cannot_be_multiplied(device):
    a, b, c = matrix(0, F32, 3, 4), matrix(1, F32, 4, 5), matrix(2, F32, 3, 5)
    gemm_of = functools.partial(plan_gemm, device.info, scratch=3)
    with pytest.raises(ValueError, match=r"no product of 4x3 and 4x5 is 3x5"):
        gemm_of(a, b, c, transpose_a=True)
    with pytest.raises(ValueError, match=r"no product of float32 and bfloat16 gives float32"):
        gemm_of(a, matrix(1, BF16, 4, 5), c)
    with pytest.raises(ValueError, match=r"no product of float32 and float32 gives bfloat16"):
        gemm_of(a, b, matrix(2, BF16, 3, 5))
    with pytest.raises(ValueError, match=r"must be one of coop1, coop2, plain, found 'fast'"):
        gemm_of(a, b, c, variant="fast")
    with pytest.raises(ValueError, match=r"'coop1' multiplies bfloat16, found float32"):
        gemm_of(a, b, c, variant="coop1")
    for epilogue, batch in [
        (Epilogue(bias=3), 2),
        (Epilogue(gelu_slope_of=3, residual=4), 1),
        (Epilogue(rng=3, accumulate=True), 1),
        (Epilogue(softmax_gradient=SoftmaxGradient(3, 4, 5, 0, 9), bias=6), 1),
        (Epilogue(softmax_gradient=SoftmaxGradient(3, 4, 5, 0, 9)), 2),
    ]:
        with pytest.raises(ValueError, match=r"an epilogue has"):
            gemm_of(a, b, c, epilogue=epilogue, batch=batch)
    assert gemm_of(a, b, c, epilogue=NOTHING).dispatches
    arrays = [ArraySpec((3, 4), F32), ArraySpec((4, 5), F32), ArraySpec((5,), BF16)]
    static = {"has_bias": True, "has_residual": False, "dropout_rate": 0.0, "site": 0}
    with pytest.raises(ValueError, match=r"bias must be float32 as x is, found bfloat16\[5\]"):
        plan_matmul_forward(device.info, arrays, [ArraySpec((3, 5), F32)], activation=None, **static)
    with pytest.raises(ValueError, match=r"activation must be None or 'gelu', found 'relu'"):
        plan_matmul_forward(device.info, arrays, [ArraySpec((3, 5), F32)], activation="relu", **static)


def test_a_device_without_cooperative_matrices_says_what_it_lacks(device):
    if SELECTOR != "cpu":
        pytest.skip("this device may have them")
    assert choose_variant(device.info, BF16) == "plain"
    for name in ("coop1", "coop2"):
        with pytest.raises(FeatureError, match=rf"matmul variant '{name}': .* lacks .*cooperativeMatrix"):
            choose_variant(device.info, BF16, name)
