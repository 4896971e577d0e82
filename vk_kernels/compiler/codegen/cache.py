"""Generated kernels, kept on disk: to make those of an optimizer takes as long as to trace the whole step, and those of
the small graphs of a step, of which many are alike, together a quarter of a second."""

import enum
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from vk_kernels.compiler.codegen import kernels
from vk_kernels.compiler.codegen.kernels import Generated, GeneratedKernel
from vk_kernels.compiler.ir import Graph, Operand, Value
from vk_kernels.runtime import disk_cache

_FEWEST_NODES = 3  # of a graph whose kernels are kept: those of others are made in 2 ms, and read in 1


def generate(graph: Graph) -> Generated:
    """`kernels.generate`, or what it once gave for such a graph."""
    key = _key(graph) if len(graph.nodes) >= _FEWEST_NODES else None
    if key is None:
        return kernels.generate(graph)
    file = disk_cache.file_of(disk_cache.root() / "generated", f"{_generator()}\n{key}")
    data = disk_cache.load(file)
    if data:
        return _unpacked(data)
    made = kernels.generate(graph)
    disk_cache.save(file, _packed(made))
    return made


@functools.cache
def _generator() -> str:
    """A hash of the sources that decide what is generated: those here, the graph's, and the SPIR-V builder's."""
    here = Path(__file__).parent
    sources = sorted([*here.glob("*.py"), here.parent / "ir.py", *(here.parents[1] / "spirv").glob("*.py")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _key(graph: Graph) -> str | None:
    """All that kernels are made from, as text: two graphs have the same where they are the same but for names of
    scopes and lines. None where a parameter has no text that says all of it."""
    numbers: dict[Value, int] = {}

    def named(values: tuple[Value, ...]) -> list[tuple]:
        return [(numbers.setdefault(value, len(numbers)), value.shape, value.dtype.name) for value in values]

    def operand(x: Operand) -> Any:
        return numbers[x] if isinstance(x, Value) else (x.dtype.name, x.shape, x.value.tobytes())

    lines: list[Any] = [named(graph.inputs)]
    for node in graph.nodes:
        if not all(map(_is_plain, node.params.values())):
            return None
        lines.append((node.op, list(node.params.items()), list(map(operand, node.inputs)), named(node.outputs)))
    lines.append(list(map(operand, graph.outputs)))
    return repr(lines)


def _is_plain(x: Any) -> bool:
    """Whether `repr` says all of a parameter."""
    if isinstance(x, tuple):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, bool | int | float | str | np.dtype | enum.Enum)


def _packed(made: Generated) -> bytes:
    """One line of JSON, and the code of the kernels."""
    kernels = [(k.label, k.operands, k.writes, k.groups, len(k.spirv)) for k in made.kernels]
    head = json.dumps([kernels, made.scratch, sorted(made.in_place)])
    return b"\n".join([head.encode(), b"".join(kernel.spirv for kernel in made.kernels)])


def _unpacked(data: bytes) -> Generated:
    head, _, code = data.partition(b"\n")
    rows, scratch, in_place = json.loads(head)
    kernels, start = [], 0
    for label, operands, writes, groups, size in rows:
        spirv, start = code[start : start + size], start + size
        kernels.append(GeneratedKernel(label, spirv, tuple(operands), tuple(writes), tuple(groups)))
    return Generated(tuple(kernels), tuple(scratch), frozenset(map(tuple, in_place)))
