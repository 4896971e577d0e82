"""Imports run one way, from the tools and the trainer down to the errors, and nowhere in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from sources import ROOT, python_files, read_source

# Rooms from the top to the bottom: a module imports from its own room and from those below.
LIBRARY = ("tools", "ops", "bridge", "compiler", "runtime", "spirv", "errors")
TRAINER = (
    ("main", "sample", "report", "chat", "serve", "export", "evaluate", "watch"),
    ("training", "serving", "evaluation"),
    ("inference",),
    ("checkpoint", "backend", "huggingface"),
    ("runs", "config_file"),
    ("data", "model"),
    ("cli", "signals", "output", "tables"),
    ("distributed",),
    ("storage",),
    ("config", "log"),
    ("errors", "imports", "leaf_names"),
)


def modules() -> dict[str, Path]:
    files = python_files("vk_kernels", "gpt_jax")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, in functions and for annotations too."""
    found = set()
    for node in read_source(file).imports:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
    return found & set(known)


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: imports_of(file, known) for name, file in known.items()}


def test_the_walk_finds_imports(imports):
    assert "vk_kernels.compiler.pipeline" in imports["vk_kernels.bridge.stages"]
    assert len(imports) > 100


def test_no_module_imports_itself_by_way_of_others(imports):
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_imports_of_the_library_run_down(imports):
    floor = {room: i for i, room in enumerate(LIBRARY)}
    floor["jax_compat"] = floor["errors"]
    up = []
    for name, found in imports.items():
        for other in found:
            rooms = [x.split(".")[1] for x in (name, other) if x.startswith("vk_kernels.")]
            if len(rooms) == 2 and floor[rooms[0]] > floor[rooms[1]]:
                up.append(f"{name} imports {other}")
    assert up == []


def test_the_library_knows_nothing_of_the_trainer(imports):
    found = {name: other for name, others in imports.items() for other in others if name.startswith("vk_kernels")}
    assert not any(other.startswith("gpt_jax") for other in found.values())


def test_imports_of_the_trainer_run_down(imports):
    floor = {room: i for i, rooms in enumerate(TRAINER) for room in rooms}
    up = []
    for name, found in imports.items():
        for other in found:
            rooms = [x.split(".")[1] for x in (name, other) if x.startswith("gpt_jax.")]
            if len(rooms) == 2 and floor[rooms[0]] > floor[rooms[1]]:
                up.append(f"{name} imports {other}")
    assert up == []


def test_what_is_private_to_jax_is_in_one_file():
    users = [name for name, file in modules().items() if "jax._src" in file.read_text()]
    assert users == ["vk_kernels.jax_compat"]
