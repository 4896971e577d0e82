"""Generated kernels on disk: what is read is what was made, and graphs that differ never share."""

from dataclasses import replace

import numpy as np
import pytest

from vk_kernels.compiler.codegen import cache as codegen_cache
from vk_kernels.compiler.codegen import kernels
from vk_kernels.compiler.ir import Graph, Literal, Node, Value

F32, BF16 = np.dtype(np.float32), np.dtype("bfloat16")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VK_KERNELS_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def generated(monkeypatch):
    """The graphs that kernels were generated for."""
    graphs, original = [], kernels.generate
    monkeypatch.setattr(kernels, "generate", lambda graph: graphs.append(graph) or original(graph))
    return graphs


def chain(length=20, shape=(3, 5), dtype=F32, factor=0.5, axes=(1,), scope="", swap=False, extra=None) -> Graph:
    """x * factor + y, again and again, and a sum over axes."""
    x, y = Value(shape, dtype), Value(shape, dtype)
    first, nodes = x, []
    for i in range(length):
        made = Value(shape, dtype)
        other = Literal(np.asarray(factor, dtype)) if i % 2 else y
        inputs = (other, first) if swap else (first, other)
        nodes.append(Node("sub", inputs, (made,), {} if extra is None else {"extra": extra}, scope=scope))
        first = made
    total = Value(tuple(size for axis, size in enumerate(shape) if axis not in axes), dtype)
    nodes.append(Node("reduce_sum", (first,), (total,), {"axes": axes, "out_sharding": None}, "file.py:1"))
    return Graph((x, y), {}, nodes, (total, first))


def test_what_is_read_is_what_was_made(generated, cache):
    made = codegen_cache.generate(chain())
    assert made == kernels.generate(chain())
    generated.clear()
    assert codegen_cache.generate(chain()) == made
    assert codegen_cache.generate(chain(scope="elsewhere")) == made
    assert not generated
    assert len(list(cache.rglob("*.bin"))) == 1


def test_a_graph_of_few_nodes_is_kept_too(generated):
    made = codegen_cache.generate(chain(length=2))
    assert codegen_cache.generate(chain(length=2)) == made
    assert len(generated) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"length": 21},
        {"shape": (5, 3)},
        {"dtype": BF16},
        {"factor": 0.25},
        {"factor": -0.5},
        {"axes": (0,)},
        {"axes": (0, 1)},
        {"swap": True},
    ],
    ids=str,
)
def test_graphs_that_differ_do_not_share(generated, other):
    codegen_cache.generate(chain())
    found = codegen_cache.generate(chain(**other))
    assert len(generated) == 2
    assert found == kernels.generate(chain(**other))


def test_zeros_of_both_signs_do_not_share(generated):
    for factor in (0.0, -0.0):
        codegen_cache.generate(chain(factor=factor))
    assert len(generated) == 2


def test_other_outputs_do_not_share(generated):
    graph = chain()
    codegen_cache.generate(graph)
    codegen_cache.generate(replace(graph, outputs=graph.outputs[::-1]))
    assert len(generated) == 2


def test_another_generator_does_not_share(generated, monkeypatch):
    codegen_cache.generate(chain())
    monkeypatch.setattr(codegen_cache, "_generator", lambda: "another")
    codegen_cache.generate(chain())
    assert len(generated) == 2


def test_small_graphs_and_parameters_without_a_text_are_not_kept(generated, cache):
    for graph in (chain(length=1), chain(extra=object()), chain(extra=({1: 2},))):
        for _ in range(2):
            assert codegen_cache.generate(graph).kernels
    assert len(generated) == 6
    assert not list(cache.iterdir())


def test_a_damaged_file_is_made_again(generated, cache):
    made = codegen_cache.generate(chain())
    (file,) = cache.rglob("*.bin")
    file.write_bytes(file.read_bytes()[:-4])
    assert codegen_cache.generate(chain()) == made
    assert codegen_cache.generate(chain()) == made
    assert len(generated) == 2
