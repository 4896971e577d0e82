"""The table of measured tiles: what is kept is taken, what cannot be read or run is not."""

import json

import pytest
from vulkan_devices import needs_vulkan, with_cooperative_matrices

from vk_kernels.ops.matmul import gemm, tile_table
from vk_kernels.ops.matmul.gemm import BF16, F32, matrix, plan_gemm
from vk_kernels.ops.matmul.tile_table import Choice, Product

pytestmark = needs_vulkan
PRODUCT = Product("coop1", "bf16", 4096, 256, 768, 1, False, True)


@pytest.fixture
def gpu_info(device):
    return with_cooperative_matrices(device.info)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """The cache's folder; no table yet."""
    monkeypatch.setenv("VK_KERNELS_CACHE", str(tmp_path))
    tile_table._read.cache_clear()
    yield tmp_path
    tile_table._read.cache_clear()


def test_the_key_of_a_product_says_all_that_its_choice_depends_on():
    assert str(PRODUCT) == "coop1 bf16 4096x256x768 nt"
    assert str(PRODUCT._replace(batch=3, transpose_a=True)) == "coop1 bf16 3x4096x256x768 tt"


def test_what_is_kept_is_taken(table, gpu_info):
    default, _ = gemm.choose(gpu_info, PRODUCT)
    other = next(tile for tile in gemm.tiles_for(gpu_info, PRODUCT) if tile != default)
    file = tile_table.keep(gpu_info, {PRODUCT: Choice(other.m, other.n, other.k, 2)})
    assert gemm.choose(gpu_info, PRODUCT) == (other, 2)
    # A second table adds to the first.
    more = PRODUCT._replace(m=64)
    tile_table.keep(gpu_info, {more: Choice(64, 64, 64, 1)})
    assert set(json.loads(file.read_text())["products"]) == {str(PRODUCT), str(more)}
    assert gemm.choose(gpu_info, PRODUCT) == (other, 2)
    assert gemm.choose(gpu_info, more)[1] == 1


def test_a_plan_is_made_with_the_tile_of_the_table(table, gpu_info):
    a, b, c = (matrix(i, dtype, *shape) for i, (dtype, shape) in enumerate(
        ((BF16, (4096, 768)), (BF16, (256, 768)), (BF16, (4096, 256)))
    ))  # fmt: skip
    tile_table.keep(gpu_info, {PRODUCT: Choice(64, 64, 64, 3)})
    plan = plan_gemm(gpu_info, a, b, c, transpose_b=True, scratch=3)
    assert [dispatch.variant for dispatch in plan.dispatches] == ["bf16_f32_64x64x64", "f32_bf16"]
    assert plan.scratch == (4 * 3 * 4096 * 256,)
    assert F32 not in (a.dtype, c.dtype)


@pytest.mark.parametrize("choice", [Choice(7, 64, 64, 1), Choice(64, 64, 64, 0), Choice(128, 192, 128, 1)])
def test_a_choice_that_the_device_cannot_run_is_none(table, gpu_info, choice):
    """The last takes no transposed B."""
    before = gemm.choose(gpu_info, PRODUCT)
    tile_table.keep(gpu_info, {PRODUCT: choice})
    assert gemm.choose(gpu_info, PRODUCT) == before


@pytest.mark.parametrize("text", ["", "[]", "null", '{"products": 5}', '{"products": {"a": [1, 2]}}'])
def test_a_damaged_table_is_left_out_with_a_warning(table, gpu_info, text):
    before = gemm.choose(gpu_info, PRODUCT)
    file = tile_table.file_of(gpu_info)
    file.parent.mkdir()
    file.write_text(text)
    tile_table._read.cache_clear()
    with pytest.warns(UserWarning, match="the table of tiles .* is left out"):
        assert gemm.choose(gpu_info, PRODUCT) == before


def test_a_search_answers_in_the_place_of_the_table(table, gpu_info):
    tile_table.keep(gpu_info, {PRODUCT: Choice(64, 64, 64, 3)})
    with tile_table.answering({PRODUCT: Choice(128, 128, 64, 1)}.get):
        tile, splits = gemm.choose(gpu_info, PRODUCT)
        assert (tile.m, tile.n, splits) == (128, 128, 1)
    assert gemm.choose(gpu_info, PRODUCT)[1] == 3
