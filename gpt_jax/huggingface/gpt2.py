"""GPT-2 in the words of transformers: its settings and tensors, and ours.

Source: `GPT2Config` and `GPT2LMHeadModel` of transformers. Its linear layers (`Conv1D`) have (in, out) matrices, as
ours; only an output layer of its own lies the other way round.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax.config import FIELDS
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import ModelConfig
from gpt_jax.model.parameters import listing

HEAD = "lm_head.weight"  # (vocab_size, embed_dim); ours is (embed_dim, vocab_size)
BASE = "transformer."  # before the name of every tensor but the head's; a model without a head is saved without it
OURS = "gpt_jax"  # a group of config.json: what of our config GPT-2's has no word for

TYPES: Mapping[str, Any] = {  # of config.json
    **dict.fromkeys(("model_type", "activation_function"), str),
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"), int),
    **dict.fromkeys(("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"), int),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon"), (int, float)),
    **dict.fromkeys(("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"), bool),
    **dict.fromkeys(("tie_word_embeddings",), bool),
    OURS: {"use_bias": bool},
}
_DEFAULTS = {  # of GPT2Config, for what a config.json leaves out
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_ALSO = {  # names that GPT2Config takes as well
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
_SHAPE = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "embed_dim": "n_embd",
}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")  # names of one function
_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")
LINEAR_NAMES = {"qkv": "attn.c_attn", "projection": "attn.c_proj", "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
_LAYER_NAMES = {
    "ln_1/scale": "ln_1.weight",
    "ln_1/bias": "ln_1.bias",
    "ln_2/scale": "ln_2.weight",
    "ln_2/bias": "ln_2.bias",
    **{f"{ours}/kernel": f"{theirs}.weight" for ours, theirs in LINEAR_NAMES.items()},
    **{f"{ours}/bias": f"{theirs}.bias" for ours, theirs in LINEAR_NAMES.items()},
}
_BIASES = [name for name in _LAYER_NAMES if name.endswith("/bias") and not name.startswith("ln_")]


def settings_of(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The settings of a GPT-2, those that `raw`, the content of config.json, leaves out too.

    Raises:
      UserError: it is another model, or has an option that ours has not.
    """
    kind = raw.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{file}: model_type is {kind!r}, and only models of type 'gpt2' can be read")
    settings: dict[str, Any] = {"n_inner": raw.get("n_inner"), OURS: raw.get(OURS) or {}}
    for name, default in _DEFAULTS.items():
        found = raw.get(name, raw.get(_ALSO.get(name, name)))
        settings[name] = default if found is None else found
    if settings["activation_function"] not in _TANH_GELU:
        raise UserError(
            f"{file}: activation_function is {settings['activation_function']!r}, and the model here has the GELU of "
            "GPT-2, 'gelu_new'"
        )
    if settings["add_cross_attention"]:
        raise UserError(f"{file}: add_cross_attention is true, which the model here cannot do")
    for name in ("quantization_config", "pruned_heads"):
        if raw.get(name):
            raise UserError(f"{file}: it has a {name}, and only a whole model in floating point can be read")
    return settings


def model_of(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The values of `config.model` for a GPT-2, but its dtype and remat.

    Raises:
      UserError: a value that no model can have.
    """
    width, inner = settings["n_embd"], settings["n_inner"]
    model: dict[str, Any] = {ours: settings[theirs] for ours, theirs in _SHAPE.items()}
    model |= {
        "mlp_dim": 0 if inner is None or inner == 4 * width else inner,
        "norm_epsilon": float(settings["layer_norm_epsilon"]),
        "dropout_rate": float(settings["resid_pdrop"]),
        "soft_cap": 0.0,
        "use_bias": settings[OURS].get("use_bias") is not False,
        "tie_head": settings["tie_word_embeddings"],
    }
    theirs = {**_SHAPE, "mlp_dim": "n_inner", "norm_epsilon": "layer_norm_epsilon", "dropout_rate": "resid_pdrop"}
    for name, called in theirs.items():
        if problem := FIELDS[f"model.{name}"].problem(model[name]):
            raise UserError(f"{file}: {called} {problem}")
    if width % model["num_heads"]:
        raise UserError(f"{file}: n_embd must be a multiple of n_head, found {width} and {model['num_heads']}")
    return model


def notes_of(settings: Mapping[str, Any]) -> list[str]:
    """Lines about what of a GPT-2's settings has no counterpart here; none of it changes what the model answers."""
    rates = {name: settings[name] for name in ("resid_pdrop", "attn_pdrop", "embd_pdrop")}
    if rates["resid_pdrop"] == rates["attn_pdrop"] and not rates["embd_pdrop"]:
        return []
    told = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return [
        f"its dropout rates are {told}: model.dropout_rate is that of the residual branches and of attention, "
        "and embeddings have no dropout here"
    ]


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a GPT-2 of this shape, by name without `BASE`, in the order of the forward pass.

    Without the head where it is tied.
    """
    width, inner, vocabulary = model.embed_dim, model.mlp_width, model.vocab_size
    layer = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
        "mlp.c_proj.bias": (width,),
    }
    return {
        "wte.weight": (vocabulary, width),
        "wpe.weight": (model.block_size, width),
        **{f"h.{i}.{name}": shape for i in range(model.num_layers) for name, shape in layer.items()},
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
        **({} if model.tie_head else {HEAD: (vocabulary, width)}),
    }


def is_buffer(name: str) -> bool:
    """Whether a tensor is none of the parameters: the causal mask, which older versions saved beside them."""
    return _BUFFER.fullmatch(name) is not None


def parameters_of(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], model: ModelConfig, where: str
) -> dict[str, Any]:
    """The tensors of a GPT-2, f32, as our tree of parameters. Every tensor is taken, or the folder is refused.

    Attention scores that are scaled otherwise are those of another query, so that the query's weights take the factor
    in: `query_factor`.

    Raises:
      UserError: a tensor is missing, of another shape, or of no meaning here.
    """
    if twice := [name for name in tensors if BASE + name in tensors]:
        raise UserError(f"{where}: {listing(twice)} is there with {BASE!r} before it as well: remove one of the two")
    tensors = {name.removeprefix(BASE): tensor for name, tensor in tensors.items()}
    shapes = tensor_shapes(model)
    _check_names(tensors, shapes, where)
    if model.tie_head and not np.array_equal(tensors.pop(HEAD, tensors["wte.weight"]), tensors["wte.weight"]):
        raise UserError(
            f"{where}: {HEAD} is not wte.weight, though tie_word_embeddings says so in config.json: put "
            '"tie_word_embeddings": false there'
        )
    flat: dict[str, np.ndarray] = {"wte": tensors["wte.weight"], "wpe": tensors["wpe.weight"]}
    for i in range(model.num_layers):
        flat |= {f"h_{i}/{ours}": tensors[f"h.{i}.{theirs}"] for ours, theirs in _LAYER_NAMES.items()}
    flat |= {"ln_f/scale": tensors["ln_f.weight"], "ln_f/bias": tensors["ln_f.bias"]}
    if not model.tie_head:
        flat["head"] = np.ascontiguousarray(tensors[HEAD].T)
    for i in range(model.num_layers):
        if (factor := query_factor(settings, i, model.embed_dim // model.num_heads)) != 1:
            for name in (f"h_{i}/qkv/kernel", f"h_{i}/qkv/bias"):
                flat[name] = flat[name].copy()
                flat[name][..., : model.embed_dim] *= np.float32(factor)
    if not model.use_bias:
        for name in (f"h_{i}/{bias}" for i in range(model.num_layers) for bias in _BIASES):
            if flat.pop(name).any():
                raise UserError(f"{where}: {OURS}.use_bias in config.json is false, and {name} is not zero: remove it")
    return unflatten_dict(flat, sep="/")


def query_factor(settings: Mapping[str, Any], layer: int, head_dim: int) -> float:
    """The factor by which a layer's attention scores are larger than those of the model here.

    A power of two, and so exact, for heads of 4, 16, 64 or 256 and in layers 0, 1, 3, 7.
    """
    unscaled = 1.0 if settings["scale_attn_weights"] else math.sqrt(head_dim)
    return unscaled / (layer + 1) if settings["scale_attn_by_inverse_layer_idx"] else unscaled


def _check_names(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises UserError unless all tensors that must be there are, in their shapes, and no other."""
    if missing := [name for name in shapes if name not in tensors]:
        raise UserError(f"{where}: no tensor {listing(missing)}, which the GPT-2 of its config.json has")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"{where}: {name} has the shape {tensors[name].shape}, and by its config.json {shape}")
    if unknown := [name for name in tensors if name not in shapes and name != HEAD]:
        raise UserError(f"{where}: {listing(unknown)} has no place in a GPT-2 that writes text")


def tensors_of(params: Mapping[str, Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters as the tensors of `GPT2LMHeadModel`; a linear layer without a bias has one of zeros there."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(params), sep="/").items()}
    named = {"wte.weight": "wte", "wpe.weight": "wpe", "ln_f.weight": "ln_f/scale", "ln_f.bias": "ln_f/bias"}
    for i in range(model.num_layers):
        named |= {f"h.{i}.{theirs}": f"h_{i}/{ours}" for ours, theirs in _LAYER_NAMES.items()}
    tensors = {}
    for name, shape in tensor_shapes(model).items():
        if name == HEAD:
            tensors[HEAD] = np.ascontiguousarray(flat["head"].T)
        else:
            leaf = flat.get(named[name])
            tensors[BASE + name] = np.zeros(shape, np.float32) if leaf is None else np.ascontiguousarray(leaf)
    return tensors


def config_of(model: ModelConfig, end: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose texts end with the token `end`.

    Raises:
      UserError: GPT-2's format cannot say what the model computes.
    """
    if model.soft_cap is not None:
        raise UserError(
            f"model.soft_cap is {model.soft_cap:g}, and GPT-2's format has no soft cap of attention scores: train with "
            "--config=configs/chat_gpt2.py, or go on from this run by --config=configs/finetune.py "
            "--config.init_from=RUN --config.model.soft_cap=0"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,  # not transformers', but llama.cpp's converter reads it
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.mlp_dim or None,
        "activation_function": "gelu_new",
        "resid_pdrop": model.dropout_rate,
        "attn_pdrop": model.dropout_rate,
        "embd_pdrop": 0.0,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "use_cache": True,
        "tie_word_embeddings": model.tie_head,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": dtype,
        OURS: {"use_bias": model.use_bias},
    }
