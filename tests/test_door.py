"""`import vk_kernels` has every public name, says so, and loads no jax before it is asked for one that needs it."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from vulkan_devices import needs_vulkan

import vk_kernels
from vk_kernels import errors


def test_the_door_has_what_dir_says():
    assert dir(vk_kernels) == sorted([*vk_kernels.__all__, "__version__"])
    assert [name for name in dir(vk_kernels) if not hasattr(vk_kernels, name)] == []
    assert dir(vk_kernels.ops) == sorted(vk_kernels.ops.__all__)
    assert vk_kernels.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="has no attribute 'jti'"):
        vk_kernels.jti  # noqa: B018


def test_every_error_is_at_the_door():
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert raised - set(vk_kernels.__all__) == set()


def test_type_checkers_see_what_is_imported_when_asked_for():
    """The imports under TYPE_CHECKING, which nothing runs, are of the same objects."""
    tree = ast.parse(Path(vk_kernels.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {}
    for statement in block.body:
        for alias in statement.names:
            module = importlib.import_module(statement.module)
            seen[alias.asname or alias.name] = getattr(module, alias.name)
    assert seen == {name: getattr(vk_kernels, name) for name in vk_kernels._LAZY}


@pytest.mark.slow
def test_the_door_opens_without_jax_and_ops_is_there_at_once():
    code = (
        "import sys, vk_kernels\n"
        "vk_kernels.UnsupportedError, vk_kernels.devices\n"
        "print('jax' in sys.modules, callable(vk_kernels.ops.gelu), 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "False True True\n", done.stderr


@needs_vulkan
def test_the_devices_are_listed_with_what_selects_them():
    found = vk_kernels.devices()
    assert [info.index for info in found] == list(range(len(found)))
    assert all(str(info).startswith(f"{info.index}: {info.name} (") for info in found)


def public_functions():
    yield from (name for name in dir(vk_kernels) if inspect.isroutine(getattr(vk_kernels, name)))
    yield from (f"ops.{name}" for name in vk_kernels.ops.__all__ if callable(getattr(vk_kernels.ops, name)))


@pytest.mark.parametrize("name", list(public_functions()))
def test_a_public_function_says_all_its_types(name):
    function = vk_kernels
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)
    bare = [key for key, parameter in signature.parameters.items() if parameter.annotation is parameter.empty]
    assert bare == []
    assert inspect.isclass(function) or signature.return_annotation is not signature.empty
    assert inspect.getdoc(function)
