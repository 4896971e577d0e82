"""Every primitive of the functions that training, finetuning, evaluating and sampling jit is supported."""

import functools

import jax
import pytest
from profiles import night
from run_graph import primitives_of
from test_jit_train import MODEL, make_batch, make_decoding, make_step
from vulkan_devices import SELECTOR, needs_vulkan

import vk_kernels
from gpt_jax.model.gpt import GPT, ModelConfig
from gpt_jax.training.steps import diagnostics_step, eval_step, nonfinite_places
from vk_kernels.compiler.op_registry import kernel_op
from vk_kernels.tools.conformance.suite import names


def train(**changes):
    state, step = make_step(
        ModelConfig(**{**MODEL.__dict__, **changes}), **({"accumulate_steps": 2} if changes else {})
    )
    return step, (state, make_batch(0))


def of_params(function):
    return functools.partial(function, model=GPT(MODEL)), (make_step()[0].params, make_batch(0))


FUNCTIONS = {
    "train": train,
    "train in bf16": lambda: train(dtype="bfloat16"),
    "finetune another model": lambda: train(tie_head=True, use_bias=True, remat=True, dropout_rate=0.0),
    "evaluate": lambda: of_params(eval_step),
    "diagnose": lambda: of_params(diagnostics_step),
    "find what is not finite": lambda: of_params(nonfinite_places),
    "decode": make_decoding,
    "decode, and name alternatives": lambda: make_decoding(20),
}


def found_in(name: str) -> set[str]:
    function, args = FUNCTIONS[name]()
    return primitives_of(jax.make_jaxpr(lambda *args: function(*args))(*args).jaxpr)  # not one that it has traced


@night
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_primitive_in_plain_jax_is_supported(name):
    found = found_in(name)
    assert sorted(found - set(names())) == []
    assert len(found) > 20


@needs_vulkan
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_primitive_beside_the_hot_operations_is_supported(name):
    with vk_kernels.use("vulkan", device=SELECTOR):
        found = found_in(name)
    kernel_ops = {primitive for primitive in found if kernel_op(primitive)}
    assert kernel_ops
    assert sorted(found - kernel_ops - set(names())) == []
