"""The README.md of an exported model: what it is, how to use it, and the figures of its run."""

import dataclasses
import json
from typing import Any

import jax
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.data.dialogue import ASSISTANT, END, USER
from gpt_jax.data.names import HUGGING_FACE, is_hugging_face
from gpt_jax.data.token_cache import sources_of
from gpt_jax.model.lora import LoraConfig
from gpt_jax.runs.content import make_facts
from gpt_jax.runs.formats import format_duration, format_number
from gpt_jax.runs.load import RunData
from gpt_jax.runs.markdown import one_line, render_blocks


@dataclasses.dataclass(frozen=True)
class Exported:
    """A checkpoint of a run, as `inference.load_model` reads it, and what the run says of itself.

    description: which checkpoint it is. trained: whether its parameters are what the run trained, and not what its
    adapters stand beside.
    """

    config: ConfigDict
    params: Any
    tokenizer: Tokenizer
    description: str
    run: RunData
    trained: bool = True


def model_card(exported: Exported, dtype: str) -> str:
    """The card, in Markdown with the front matter of the Hugging Face hub; dtype: of the weights."""
    run = exported.run
    name = one_line(run.info.get("name") or run.workdir.resolve().name)
    sections = {
        "Use": _use(exported.config.model.block_size),
        "What a text looks like": (
            f"A conversation is `{USER}`question`{ASSISTANT}`answer`{END}`, with nothing between; the chat template of "
            "the tokenizer writes it so. A system text stands before the first question, with a blank line between. An "
            f"answer ends with any of the three markers, which is in `generation_config.json`."
        ),
        "Model": render_blocks(make_facts(_model(exported, dtype))),
        **({"Training": render_blocks(make_facts(_training(run)))} if exported.trained else {}),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"{_front_matter(exported)}\n# {name}\n\nA GPT-2 trained with gpt_jax.\n\n{body}\n"


def _front_matter(exported: Exported) -> str:
    """The facts that the hub reads; JSON is YAML."""
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "conversational"],
    }
    config = exported.config
    sources = sources_of(config.data) if exported.trained and "data" in config else ()
    if datasets := [source.split(":")[1] for source in sources if is_hugging_face(source)]:
        facts["datasets"] = datasets
    donor = _name_on_hub(str(config.get("init_from", "")))
    if donor and donor.count("/") <= 1:
        facts["base_model"] = donor
    rows = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in facts.items())
    return f"---\n{rows}---\n"


def _without_folder(name: str) -> str:
    """A file, folder or name of the hub without where it lies on this machine."""
    name = one_line(name)
    return name if _name_on_hub(name) else name.rpartition("/")[2]


def _name_on_hub(name: str) -> str:
    """The name after 'hf:' of what lies on the hub; empty for all else, and for a folder."""
    rest = name.removeprefix(HUGGING_FACE) if is_hugging_face(name) else ""
    return "" if rest.startswith((".", "/", "~")) else rest


def _use(block_size: int) -> str:
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where these files are
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
messages = [{{"role": "user", "content": "Who is there?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt)[0, prompt["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

It sees {block_size:,} tokens, question and answer together."""


def _model(exported: Exported, dtype: str) -> list[tuple[str, Any]]:
    model = exported.config.model
    return [
        ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(exported.params)):,}"),
        ("shape", f"{model.num_layers} layers of {model.num_heads} heads, {model.embed_dim} wide"),
        ("vocabulary", f"{model.vocab_size:,} tokens, byte-level BPE"),
        ("weights", dtype),
        ("exported from", one_line(exported.description).replace(f"{exported.run.workdir.resolve()}/", "")),
    ]


def _data(data: dict[str, Any] | None) -> str | None:
    """The data that a run was trained on, and how much was kept for validation, without folders of this machine."""
    if not data:
        return None
    sources = sources_of(ConfigDict(data))
    weights = data.get("weights") or [None] * len(sources)
    told = [
        _without_folder(source) + ("" if weight is None else f" (weight {weight:g})")
        for source, weight in zip(sources, weights, strict=True)
    ]
    own = data.get("validation")
    return ", ".join(told) + (f"; validation on {_without_folder(own)}" if own else "")


def _amount(found: Any) -> str | None:
    """How much a split holds; None where run.json has it otherwise, as older versions did."""
    return ", ".join(f"{count:,} {of}" for of, count in found.items()) if isinstance(found, dict) else None


def _training(run: RunData) -> list[tuple[str, Any]]:
    info, config = run.info, run.config
    device = info.get("device") or {}
    _, losses = run.series("validation", "loss")
    first_steps, train = run.series("train", "loss")
    adapters = LoraConfig.from_config(ConfigDict(config))
    versions = ", ".join(f"{package} {version}" for package, version in (info.get("versions") or {}).items())
    return [
        ("run", info.get("run_id")),
        ("data", _data(config.get("data"))),
        *((f"{split} data", _amount(found)) for split, found in (info.get("data") or {}).items()),
        ("started from", _without_folder(config.get("init_from") or "") or None),
        ("trained", adapters and f"adapters (LoRA) of rank {adapters.rank}, merged into what they stand beside"),
        ("steps", f"{run.last_step:,} of {config.get('num_steps', 0):,}, batches of {config.get('batch_size')}"),
        ("training loss", f"{format_number(train[0])} to {format_number(train[-1])}" if len(first_steps) else None),
        (
            "validation loss",
            f"{format_number(losses[0])} to {format_number(losses[-1])}, lowest {format_number(losses.min())}"
            if len(losses)
            else None,
        ),
        ("time", format_duration(info["elapsed_seconds"]) if info.get("elapsed_seconds") else None),
        ("hardware", device and f"{device.get('count')} x {device.get('kind')} ({device.get('platform')})"),
        ("backend", info.get("backend")),
        ("computed in", config["model"].get("dtype")),
        ("versions", versions),
    ]
