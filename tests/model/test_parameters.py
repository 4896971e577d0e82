"""Parameters of one model that another takes."""

import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import assert_identical

from gpt_jax.errors import UserError
from gpt_jax.model.parameters import check_finite, merge_parameters


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_numbers_that_are_none_are_counted_and_the_parameter_is_named(dtype):
    sound = {"h_0": {"kernel": jnp.ones((2, 3), dtype)}, "wte": jnp.ones(4, dtype)}
    check_finite(sound, "checkpoint 7")
    diverged = {**sound, "wte": sound["wte"].at[1].set(jnp.nan).at[2].set(-jnp.inf)}
    with pytest.raises(UserError, match="checkpoint 7: 2 of the 4 numbers of the parameter wte are NaN or infinite"):
        check_finite(diverged, "checkpoint 7")


def test_merge_takes_by_path_and_shape():
    fresh = {
        "h_0": {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "bias": jnp.zeros(3)},
        "wte": jnp.zeros((8, 2)),
        "table": jnp.zeros(4, jnp.int32),
        "adapter": jnp.ones(5),
    }
    restored = {
        "h_0": {"kernel": np.full((2, 3), 1.001, np.float32), "bias": np.full(3, 2, np.float32)},
        "wte": np.ones((4, 2), np.float32),
        "table": np.ones(4, np.float32),
        "head": np.ones((2, 4), np.float32),
    }
    merged, report = merge_parameters(fresh, restored)
    assert_identical(
        merged,
        fresh | {"h_0": {"kernel": jnp.full((2, 3), 1.001, jnp.bfloat16), "bias": jnp.full(3, 2, jnp.float32)}},
    )
    restored["h_0"]["bias"][:] = -1  # the merged tree has its own memory
    assert merged["h_0"]["bias"][0] == 2
    assert str(report) == textwrap.dedent("""\
        parameters: 2 taken, 1 dropped, 2 mismatched and kept fresh, 1 new
          dropped head: float32 (2, 4)
          mismatched table: float32 (4,) in the checkpoint, int32 (4,) in the model
          mismatched wte: float32 (4, 2) in the checkpoint, float32 (8, 2) in the model
          new adapter: float32 (5,)""")
    assert report.taken == ("h_0/bias", "h_0/kernel")


def test_a_long_merge_report_is_cut():
    names = [f"h_{layer}" for layer in range(30)]
    _, report = merge_parameters({"w": jnp.zeros(1)} | {name: jnp.zeros(2) for name in names}, {"w": np.zeros(1)})
    lines = str(report).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  new 20 more"


def test_merge_of_nothing():
    with pytest.raises(
        UserError, match=r"no parameter of the checkpoint fits .* a: float64 \(2,\), .* a: float32 \(3,\)"
    ):
        merge_parameters({"a": jnp.zeros(3)}, {"a": np.zeros(2)})
