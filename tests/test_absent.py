"""Packages that are hidden from an import: gone within, untouched behind it."""

import sys

import pytest

from gpt_jax.imports import absent


def test_a_hidden_package_is_not_found_and_then_found():
    sys.modules.pop("colorsys", None)
    with absent("colorsys"), pytest.raises(ImportError):
        import colorsys
    import colorsys

    assert colorsys.rgb_to_hsv(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)


def test_what_is_imported_already_stays():
    import json

    with absent("json"):
        import json as again

        assert again is json
    assert sys.modules["json"] is json


def test_a_failing_import_leaves_nothing_hidden():
    with pytest.raises(ModuleNotFoundError), absent("not_there", "nor_this"):
        import nor_this  # noqa: F401
    assert not {"not_there", "nor_this"} & sys.modules.keys()
