"""Answers of a trained model, for scripts: `python -m gpt_jax.sample --workdir=RUN [PROMPT ...]`.

Prompts come from the arguments, --prompts=FILE or a pipe: one a line, or JSON lines with a text under "prompt". Answers
go to standard output, with --json as JSON lines, all else to standard error. `gpt_jax.chat` talks.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from gpt_jax.cli import require_jax, run_main

if __name__ == "__main__":
    require_jax()  # before it is imported below

import contextlib
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from absl import flags

from gpt_jax.backend import print_device_error
from gpt_jax.config import BACKENDS, Field, text_problem
from gpt_jax.config_file import WHOLE
from gpt_jax.data.dialogue import Turn
from gpt_jax.data.tokenizer import decode
from gpt_jax.errors import UserError
from gpt_jax.inference.conversation import TooLong
from gpt_jax.inference.engine import DrawnToken, EngineFailed, Event, Request
from gpt_jax.inference.sampling import OPTION_FIELDS, SamplingOptions, choice_seed, finite
from gpt_jax.inference.sampling_flags import define_sampling_flags, options_of_flags
from gpt_jax.inference.served_run import ServedRun, open_run

FLAGS = flags.FLAGS
COUNT = Field(int, "answers to each prompt", 1, 1000)
MOST_TOGETHER = 32  # texts in one batch
_OPTIONS = [name for name in OPTION_FIELDS if name != "stop"]


class Answer(NamedTuple):
    """An answer to a prompt.

    choice: which of the --n. tokens: generated, without one that ends the answer. reason: stop or length.
    """

    prompt: str
    choice: int
    seed: int
    text: str
    tokens: list[DrawnToken]
    reason: str


def main(argv: Sequence[str]) -> int:
    try:
        with contextlib.ExitStack() as stack:
            answer_prompts(argv[1:], stack)
    except EngineFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        return print_device_error(error)
    return 0


def answer_prompts(arguments: Sequence[str], stack: contextlib.ExitStack) -> None:
    """Prints the answers to all prompts, in their order; a backend is in force until `stack` is closed."""
    check_flags()
    prompts = list(find_prompts(arguments))
    run = open_run(
        FLAGS.workdir,
        stack,
        backend=FLAGS.backend or "",
        slots=min(len(prompts) * FLAGS.n, MOST_TOGETHER),
        max_waiting=len(prompts) * FLAGS.n,
    )
    print(f"{run.description}; {run.backend}", file=sys.stderr, flush=True)
    options = options_of_flags(FLAGS, run.defaults)
    requests = [make_request(run, prompt, number, options) for number, prompt in enumerate(prompts, 1)]
    begun, count = time.perf_counter(), 0
    for found in answers(run, prompts, requests):
        count += len(found.tokens)
        print(as_json(run, found, options.logprobs) if FLAGS.json else as_text(found, len(prompts) * FLAGS.n == 1))
        sys.stdout.flush()  # a reader of the pipe sees each as it comes
    seconds = time.perf_counter() - begun
    rate = f"{count:,} tokens in {seconds:.1f} s, {count / seconds:,.1f} a second"
    print(f"{rate}, compilation included", file=sys.stderr)


def find_prompts(arguments: Sequence[str]) -> Iterator[str]:
    """The prompts of the command line, or else those of a pipe.

    Raises:
      UserError: there is none, or one that is not text.
    """
    given = [*([FLAGS.prompt] if FLAGS.prompt else []), *arguments]
    for number, text in enumerate(given, 1):
        if problem := text_problem(text):
            raise UserError(f"prompt {number} of the command line {problem}")
    if FLAGS.prompts:
        given += read_prompts(_lines_of_file(FLAGS.prompts), FLAGS.prompts)
    elif not given and not sys.stdin.isatty():
        given += read_prompts(sys.stdin, "standard input")
    if not given:
        raise UserError(
            "there is no prompt: give some as arguments, by --prompts=FILE or in a pipe (python -m gpt_jax.chat talks)"
        )
    yield from given


def _lines_of_file(name: str) -> Iterator[str]:
    with Path(name).open(encoding="utf-8-sig") as file:
        yield from file


def read_prompts(lines: Iterable[str], source: str) -> list[str]:
    """One prompt a line, empty ones left out; JSON lines where the first begins with a brace.

    Raises:
      UserError: a line that is not text, or no JSON object with a text under "prompt".
    """
    prompts: list[str] = []
    is_json = None
    try:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text:
                continue
            is_json = text.startswith("{") if is_json is None else is_json
            prompt = _prompt_of_json(text, f"{source}, line {number}") if is_json else text
            if problem := text_problem(prompt):
                raise UserError(f"{source}, line {number}: a prompt {problem}")
            prompts.append(prompt)
    except UnicodeDecodeError:
        raise UserError(f"{source} is not text in UTF-8") from None
    return prompts


def _prompt_of_json(text: str, place: str) -> Any:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON, as the first line is: {error}") from None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{place}: must be a JSON object with a text under "prompt", found {text[:80]!a}')
    return prompt


def make_request(run: ServedRun, prompt: str, number: int, options: SamplingOptions) -> Request:
    """The request for an answer; raises UserError for a prompt that the model does not see whole."""
    try:
        return run.request([Turn("user", prompt)], "", options)[0]
    except TooLong as error:
        raise UserError(f"prompt {number}: {error}") from None


def answers(run: ServedRun, prompts: Sequence[str], requests: Sequence[Request]) -> Iterator[Answer]:
    """--n answers to each prompt, in order; they are made side by side."""
    waiting = []
    for prompt, request in zip(prompts, requests, strict=True):
        seed = secrets.randbits(32) if request.options.seed is None else request.options.seed
        for choice in range(FLAGS.n):
            events: SimpleQueue[Event] = SimpleQueue()
            options = dataclasses.replace(request.options, seed=choice_seed(seed, choice))
            waiting.append((prompt, choice, options.seed, events))
            run.engine.submit(request._replace(options=options), events.put)
    for prompt, choice, seed, events in waiting:
        text, tokens = "", []
        while True:
            event = events.get()
            if event.error is not None:
                raise EngineFailed(event.error)
            text, tokens = text + event.text, [*tokens, *event.tokens]
            if event.reason is not None:
                break
        yield Answer(prompt, choice, seed, text.strip(), tokens, event.reason)


def as_text(answer: Answer, is_only: bool) -> str:
    """An answer for people; the prompt above it where there are several."""
    return answer.text if is_only else f"> {answer.prompt}\n{answer.text}\n"


def as_json(run: ServedRun, answer: Answer, alternatives: int) -> str:
    """An answer as a line of JSON; with its tokens where alternatives of them were asked for."""
    row: dict[str, Any] = {
        "prompt": answer.prompt,
        "choice": answer.choice,
        "text": answer.text,
        "finish_reason": answer.reason,
        "tokens": len(answer.tokens),
        "seed": answer.seed,
    }
    if alternatives:
        row["logprobs"] = [
            {
                "token": decode(run.tokenizer, [drawn.token]),
                "logprob": finite(drawn.logprob),
                "top": [[decode(run.tokenizer, [token]), finite(logprob)] for token, logprob in drawn.alternatives],
            }
            for drawn in answer.tokens
        ]
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    text = "A run: its folder, latest or best; @STEP behind it is another of its checkpoints."
    flags.DEFINE_string("workdir", None, text, required=True, **here)
    flags.DEFINE_string("prompt", "", "A question to answer; more of them as arguments.", **here)
    flags.DEFINE_string("prompts", "", 'A file of questions: one a line, or JSON lines with "prompt".', **here)
    flags.DEFINE(WHOLE, "n", 1, "Answers to each prompt.", **here)
    flags.DEFINE_bool("json", False, "Whether answers are JSON lines.", **here)
    flags.DEFINE_enum("backend", None, BACKENDS, "Instead of the config's.", **here)
    flags.DEFINE_multi_string("stop", None, "A text that ends an answer; may be given again.", **here)
    seed = "Of the first answer to each prompt; without it, another one each time."
    define_sampling_flags(flag_values, _OPTIONS, seed)


def check_flags() -> None:
    """Raises UserError for a flag with an impossible value."""
    options = options_of_flags(FLAGS, SamplingOptions())
    if problem := COUNT.problem(FLAGS.n):
        raise UserError(f"--n {problem}")
    if problem := text_problem(FLAGS.prompt):
        raise UserError(f"--prompt {problem}")
    if options.logprobs and not FLAGS.json:
        raise UserError("--logprobs is told in JSON alone: add --json")
    if not FLAGS.workdir:
        raise UserError("--workdir is empty: name the folder of a run")


if __name__ == "__main__":
    run_main(main, more="PROMPT", define=define_flags)
