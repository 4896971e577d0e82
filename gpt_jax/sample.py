"""Text from a trained model, and a chat with it: `python -m gpt_jax.sample --workdir=RUN [--prompt=TEXT]`."""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from gpt_jax.cli import require_jax, run_main

if __name__ == "__main__":
    require_jax()  # before it is imported below

import contextlib
import sys
import time
from collections.abc import Sequence

import jax
from absl import flags

from gpt_jax.backend import check_heads, describe, enter_backend, is_device_error, require_devices
from gpt_jax.config import BACKENDS, check, text_problem
from gpt_jax.config_file import NUMBER, WHOLE
from gpt_jax.data.dialogue import Turn
from gpt_jax.errors import UserError
from gpt_jax.inference.generate import answer, make_sampler
from gpt_jax.inference.load import load_for_sampling
from gpt_jax.model.gpt import GPT, ModelConfig
from gpt_jax.runs.find import find_run
from vk_kernels import VulkanError

FLAGS = flags.FLAGS


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
    config, params, tokenizer, description = load_for_sampling(*find_run(FLAGS.workdir))
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
    text = "A run: its folder, latest or best; @STEP behind it is another of its checkpoints."
    flags.DEFINE_string("workdir", None, text, required=True, **here)
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
