"""Text from a trained model, and a chat with it: `python -m gpt_jax.sample --workdir=RUN [--prompt=TEXT]`."""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from gpt_jax.cli import require_jax, run_main

if __name__ == "__main__":
    require_jax()  # before it is imported below

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from gpt_jax.backend import check_heads, enter_backend, require_devices
from gpt_jax.checkpoint import check_parameters, restore_parameters
from gpt_jax.config import BACKENDS, UserError, check, check_saved, text_problem
from gpt_jax.config_file import NUMBER, WHOLE
from gpt_jax.data.corpus import Turn
from gpt_jax.data.tokenizer import decode, encode_prompt, marker_ids
from gpt_jax.data.tokenizer import load as load_tokenizer
from gpt_jax.model.gpt import GPT, ModelConfig
from gpt_jax.runs.metrics import CONFIG_FILE, read_config
from gpt_jax.training.failures import describe, is_device_error
from gpt_jax.training.steps import init_params
from vk_kernels.errors import VulkanError

FLAGS = flags.FLAGS

COLDEST = 1e-6  # a softmax at lower temperatures is its argmax, and in f32 logits / temperature might overflow


class Sample(NamedTuple):
    """What the model answered to one prompt."""

    text: str
    tokens: int  # generated, the end marker included
    ended: bool  # by the model itself, not by the limit


def next_token(
    params: Any,
    tokens: jax.Array,
    last: jax.Array,
    key: jax.Array,
    *,
    model: GPT,
    temperature: float,
    top_k: int,
) -> jax.Array:
    """One token, int32 (B,), after position `last` (B,) of `tokens` (B, T).

    Drawn from the softmax of logits / temperature over the `top_k` largest (0: all); the largest if below COLDEST.
    """
    logits = model.apply({"params": params}, tokens, last, method="next_token_logits")  # (B, V)
    if temperature < COLDEST:
        return logits.argmax(axis=-1).astype(jnp.int32)
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest_kept, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature, axis=-1).astype(jnp.int32)


@functools.lru_cache(maxsize=8)
def make_sampler(
    model: GPT, temperature: float, top_k: int, jit: Callable[..., Any] = jax.jit
) -> Callable[..., jax.Array]:
    """`next_token` compiled by `jit`, for `generate`."""
    return jit(functools.partial(next_token, model=model, temperature=temperature, top_k=top_k))


def generate(
    sampler: Callable[..., jax.Array],
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    block_size: int,
    end_tokens: Sequence[int],
    max_tokens: int,
    key: jax.Array,
) -> list[list[int]]:
    """Continues each prompt (token ids) until one of `end_tokens` or `max_tokens`; the prompts run as one batch.

    A text longer than the block keeps its last `block_size` tokens in view.
    """
    texts = [list(prompt) for prompt in prompts]
    if not texts:
        return []
    starts = [len(text) for text in texts]
    width = min(block_size, max(starts) + max_tokens)
    open_rows = set(range(len(texts)))
    for i in range(max_tokens):
        views = [text[-width:] for text in texts]
        tokens = np.array([view + [0] * (width - len(view)) for view in views], np.int32)
        last = np.array([len(view) - 1 for view in views], np.int32)
        drawn = np.asarray(sampler(params, tokens, last, jax.random.fold_in(key, i)))
        for row in tuple(open_rows):
            texts[row].append(int(drawn[row]))
            if drawn[row] in end_tokens:
                open_rows.remove(row)
        if not open_rows:
            break
    return [text[start:] for text, start in zip(texts, starts, strict=True)]


def answer(
    sampler: Callable[..., jax.Array],
    params: Any,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Turn]],
    *,
    block_size: int,
    max_tokens: int,
    key: jax.Array,
) -> list[Sample]:
    """What the assistant says next in each conversation, whose last turn is the user's."""
    markers = marker_ids(tokenizer)
    generated = generate(
        sampler,
        params,
        [encode_prompt(tokenizer, turns) for turns in conversations],
        block_size=block_size,
        end_tokens=markers,  # any of them closes the assistant's turn
        max_tokens=max_tokens,
        key=key,
    )
    samples = []
    for ids in generated:
        ended = bool(ids) and ids[-1] in markers
        samples.append(Sample(decode(tokenizer, ids[:-1] if ended else ids), len(ids), ended))
    return samples


def load_for_sampling(workdir: Path) -> tuple[ConfigDict, Any, Tokenizer, str]:
    """Config, parameters, tokenizer and a description of a run's best checkpoint.

    Raises:
      UserError: the folder is no run, has no good checkpoint, or its files do not belong together.
    """
    file = workdir / CONFIG_FILE
    saved = read_config(workdir)
    if not saved:
        raise UserError(f"{workdir} is no run folder: it has no {CONFIG_FILE}")
    check_saved(saved, file)
    config = ConfigDict(saved)
    tokenizer = load_tokenizer(workdir / "tokenizer.json")
    vocabulary = tokenizer.get_vocab_size()
    if vocabulary > config.model.vocab_size:
        raise UserError(
            f"{workdir / 'tokenizer.json'} has {vocabulary} ids, and the model of {file} {config.model.vocab_size}: "
            "put back the tokenizer of the run"
        )
    params, description = restore_parameters(workdir)
    model = GPT(ModelConfig.from_config(config.model))
    check_parameters(params, jax.eval_shape(functools.partial(init_params, model, 0)), description)
    return config, params, tokenizer, description


def main(argv: Sequence[str]) -> int:
    try:
        with contextlib.ExitStack() as stack:
            chat(stack)
    except (RuntimeError, MemoryError) as error:
        if not is_device_error(error):
            raise
        way_out = "; --backend=xla answers without Vulkan" if isinstance(error, VulkanError) else ""
        print(f"error: {describe(error)}{way_out}", file=sys.stderr)
        return 1
    return 0


def chat(stack: contextlib.ExitStack) -> None:
    """Answers one prompt, or chats, as the flags say; a backend is in force until `stack` is closed."""
    check_flags()
    require_devices()
    config, params, tokenizer, description = load_for_sampling(Path(FLAGS.workdir))
    print(f"{description}; {'one answer' if FLAGS.prompt else 'an empty line starts anew, Ctrl-D ends'}")
    model = GPT(ModelConfig.from_config(config.model))
    temperature = config.sample.temperature if FLAGS.temperature is None else FLAGS.temperature
    top_k = config.sample.top_k if FLAGS.top_k is None else FLAGS.top_k
    backend = enter_backend(FLAGS.backend or config.backend, config.matmul_precision, stack)
    check_heads(config.model, backend)
    sampler = make_sampler(model, temperature, top_k, backend.jit)
    params = backend.put(params)
    key = jax.random.key(time.time_ns() % 2**32 if FLAGS.seed is None else FLAGS.seed)

    def reply(turns: Sequence[Turn]) -> str:
        [sample] = answer(
            sampler,
            params,
            tokenizer,
            [turns],
            block_size=config.model.block_size,
            max_tokens=FLAGS.max_tokens or config.sample.max_tokens,
            key=jax.random.fold_in(key, len(turns)),
        )
        return sample.text.strip()

    if FLAGS.prompt:
        print(reply([Turn("user", FLAGS.prompt)]))
        return
    turns: list[Turn] = []
    while True:
        try:
            said = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError:
            raise UserError("what was typed is not text in UTF-8") from None
        if not said:
            turns = []
            continue
        if problem := text_problem(said):
            raise UserError(f"what was typed {problem}")
        turns.append(Turn("user", said))
        turns.append(Turn("assistant", reply(turns)))
        print(f"gpt> {turns[-1].text}")


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    flags.DEFINE_string("workdir", None, "Run folder.", required=True, **here)
    flags.DEFINE_string("prompt", "", "A question to answer; without it, a chat.", **here)
    flags.DEFINE(NUMBER, "temperature", None, "Instead of the config's.", **here)
    flags.DEFINE(WHOLE, "top_k", None, "Instead of the config's; 0: all.", **here)
    flags.DEFINE(WHOLE, "max_tokens", None, "Instead of the config's.", **here)
    flags.DEFINE_enum("backend", None, BACKENDS, "Instead of the config's.", **here)
    flags.DEFINE(WHOLE, "seed", None, "Of the draw; without it, another one each time.", **here)


def check_flags() -> None:
    """Raises UserError for a flag whose value a config could not have either."""
    settings = {"temperature": "sample.temperature", "top_k": "sample.top_k", "max_tokens": "sample.max_tokens"}
    for flag, name in {**settings, "seed": "seed"}.items():
        if FLAGS[flag].value is not None:
            check(name, FLAGS[flag].value, called=f"--{flag}")
    if problem := text_problem(FLAGS.prompt):
        raise UserError(f"--prompt {problem}")
    if not FLAGS.workdir:
        raise UserError("--workdir is empty: name the folder of a run")


if __name__ == "__main__":
    run_main(main, define=define_flags)
