"""A name means one thing: no class, and no module of a package, is called as another is."""

from collections import defaultdict

import pytest
from sources import ROOT, python_files, read_source

# One meaning in two places, or a meaning that its place makes plain.
CLASSES = {
    "Batch": "on the host; on the device",
    "Block": "our model's; the same in torch, to be timed beside it",
    "GPT": "our model; the same in torch",
}
MODULES = {
    "api": "an operation's public functions",
    "planner": "what an operation launches",
    "reference": "an operation in plain JAX",
    "export": "the command; what it writes",
    "report": "the command; what it writes",
    "donor": "a run or a folder of transformers to begin with; such a folder read",
    "files": "those of a data source; those that a run writes",
    "tokenizer": "ours; in the files of transformers",
}


@pytest.mark.slow  # reads the whole tree
def test_no_class_is_called_as_another():
    found = defaultdict(list)
    for file in python_files("vk_kernels", "gpt_jax", "benchmarks"):
        for name in read_source(file).classes:
            found[name].append(str(file.relative_to(ROOT)))
    twice = {name: where for name, where in found.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in CLASSES} == {}
    assert set(CLASSES) <= set(twice), "an exception that none needs any more"


def test_no_module_of_a_package_is_called_as_another():
    twice = {}
    for package in ("vk_kernels", "gpt_jax"):
        found = defaultdict(list)
        for file in python_files(package):
            if file.name != "__init__.py":
                found[file.stem].append(str(file.relative_to(ROOT)))
        twice |= {name: where for name, where in found.items() if len(where) > 1}
    assert {name: where for name, where in twice.items() if name not in MODULES} == {}
    assert set(MODULES) <= set(twice), "an exception that none needs any more"
