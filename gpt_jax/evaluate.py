"""Figures of models on data: `python -m gpt_jax.evaluate RUN [RUN ...] [--data=FILE ...]`; docs/evaluation.md has them.

`runs/find.py` says what RUN may be; hf:FOLDER is a GPT-2 of transformers. Without --data it is each run's own
validation data, all of it. The folder of a run is only read; results go to standard output, with --json as JSON, and
to --output.
"""

from gpt_jax.signals import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # before the imports, which take seconds

from gpt_jax.cli import require_jax, run_main

if __name__ == "__main__":
    require_jax()  # before it is imported below

import contextlib
import functools
import itertools
import operator
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from gpt_jax.backend import check_heads, describe, enter_backend, is_device_error
from gpt_jax.config import BACKENDS, TARGETS, Field, text_problem
from gpt_jax.config_file import WHOLE
from gpt_jax.data.corpus import check_source
from gpt_jax.data.names import is_hugging_face
from gpt_jax.errors import UserError
from gpt_jax.evaluation import questions
from gpt_jax.evaluation.encoding import Encoding
from gpt_jax.evaluation.likelihood import Likelihood, measure
from gpt_jax.evaluation.open_model import OpenedModel, open_model
from gpt_jax.evaluation.questions import Question
from gpt_jax.evaluation.results import as_json, as_tables, may_replace
from gpt_jax.evaluation.scorer import Scorer
from gpt_jax.evaluation.sources import NamedTexts, all_texts, validation_sources, validation_texts
from gpt_jax.model.gpt import GPT, ModelConfig
from gpt_jax.runs.find import find_run
from gpt_jax.storage.files import replacing, writing
from vk_kernels import VulkanError

FLAGS = flags.FLAGS
WINDOWS = Field(int, "tokens of a window, or windows of a batch", 1, 65536)
BETWEEN_LINES = 10.0  # seconds between two lines of progress


def main(argv: Sequence[str]) -> int:
    try:
        evaluate(argv[1:])
    except (RuntimeError, MemoryError) as error:
        if not is_device_error(error):
            raise
        way_out = " or --backend=xla, without Vulkan," if isinstance(error, VulkanError) else ""
        print(f"error: {describe(error)}; a smaller --batch_size{way_out} may help", file=sys.stderr)
        return 1
    return 0


def evaluate(names: Sequence[str]) -> None:
    """Evaluates each model in turn and tells what was found."""
    check_flags()
    asked = Asked(
        last_word={path: questions.read_last_words(path) for path in FLAGS.last_word},
        choices={path: questions.read_choices(path) for path in FLAGS.choices},
        reference=open_model(FLAGS.validation_of) if FLAGS.validation_of else None,
    )
    if asked.reference and asked.reference.data is None:
        raise UserError(f"--validation_of={FLAGS.validation_of} has no data of its own: give a run")
    for source in FLAGS.data:
        check_source(source)
    for name in names:
        check_model(name, has_work=bool(FLAGS.data or asked.reference or asked.last_word or asked.choices))
    results = []
    for name in names:
        with contextlib.ExitStack() as stack:
            results.append(evaluate_model(open_model(name), asked, stack))
    text = as_json(results)
    print(text if FLAGS.json else as_tables(results), end="" if FLAGS.json else "\n", flush=True)  # before a full disk
    if FLAGS.output:
        with writing(FLAGS.output), replacing(Path(FLAGS.output)) as file:
            file.write(text)


def check_model(name: str, *, has_work: bool) -> None:
    """Raises UserError for a model that is not there, or that has no data of its own and is given none."""
    if not is_hugging_face(name):
        find_run(name)
    elif not has_work:
        raise UserError(f"{name} has no data of its own: give --data=FILE or --validation_of=RUN")


class Asked(NamedTuple):
    """The questions to be answered, by file, and the run whose validation data is asked for."""

    last_word: dict[str, list[Question]]
    choices: dict[str, list[Question]]
    reference: OpenedModel | None


def evaluate_model(opened: OpenedModel, asked: Asked, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The figures of a model; its backend is in force until `stack` is closed."""
    config = opened.config
    backend = enter_backend(FLAGS.backend or config.backend, config.matmul_precision, stack)
    check_heads(config.model, backend)
    say(f"{opened.name}: {opened.description}; {backend}")
    stride = FLAGS.stride or config.model.block_size
    if stride > config.model.block_size:
        seen = f"{opened.name} sees {config.model.block_size} tokens at once"
        raise UserError(f"--stride is {stride}, and {seen}: lower it")
    encoding = Encoding(opened.tokenizer, config.model.vocab_size, opened.end_of_text)
    if FLAGS.prompts == questions.CHAT and not encoding.chat:
        raise UserError(f"--prompts=chat: the tokenizer of {opened.name} has no markers of turns, give --prompts=text")
    scorer = Scorer(GPT(ModelConfig.from_config(config.model)), opened.params, backend, FLAGS.batch_size)
    targets = FLAGS.targets or config.data.targets
    found: dict[str, Likelihood] = {}
    if texts := texts_to_measure(opened, asked):
        progress = Progress()
        found = measure(texts, encoding, scorer, stride=stride, targets=targets, progress=progress)
        say(f"{opened.name}: {progress}")
        for source, each in found.items():
            if not each.tokens:
                say(f"warning: {source}: nothing counts, targets are {targets} (--targets)")
    in_chat = questions.CHAT if encoding.chat else questions.TEXT
    return {
        "model": opened.name,
        "checkpoint": opened.description,
        "backend": str(backend),
        "block_size": config.model.block_size,
        "stride": stride,
        "batch_size": FLAGS.batch_size,
        "targets": targets,
        "likelihood": [{"source": source, **each.as_dict()} for source, each in found.items()],
        "total": functools.reduce(operator.add, found.values()).as_dict() if found else None,
        "last_word": [
            {"file": path, **questions.score_last_words(rows, encoding, scorer, FLAGS.prompts or questions.TEXT)}
            for path, rows in asked.last_word.items()
        ],
        "choices": [
            {"file": path, **questions.score_choices(rows, encoding, scorer, FLAGS.prompts or in_chat)}
            for path, rows in asked.choices.items()
        ],
    }


def texts_to_measure(opened: OpenedModel, asked: Asked) -> NamedTexts | None:
    """The texts of --data and --validation_of, or else the model's own validation data; None: questions alone count."""
    if FLAGS.data or asked.reference:
        texts = [all_texts(source, say) for source in FLAGS.data]
        if asked.reference:
            config = asked.reference.config
            twice = set(FLAGS.data) & set(validation_sources(config))  # two sets of texts, so two rows
            called = "{}, of the validation".format if twice else str
            texts.append(validation_texts(config, asked.reference.data, say, called=called))
        return itertools.chain.from_iterable(texts)
    if asked.last_word or asked.choices:
        return None
    return validation_texts(opened.config, opened.data or {}, say)


class Progress:
    """Says now and then how many tokens were scored, on standard error."""

    def __init__(self) -> None:
        self._begun = self._told = time.monotonic()
        self._tokens = 0

    def __call__(self, tokens: int) -> None:
        self._tokens = tokens
        if time.monotonic() - self._told > BETWEEN_LINES:
            self._told = time.monotonic()
            say(str(self))

    def __str__(self) -> str:
        seconds = time.monotonic() - self._begun
        return f"{self._tokens:,} tokens in {seconds:.1f} s, {self._tokens / seconds:,.0f} a second"


def say(line: str) -> None:
    """Prints a line that is no result."""
    print(line, file=sys.stderr, flush=True)


def define_flags(flag_values: flags.FlagValues = FLAGS) -> None:
    here = {"flag_values": flag_values}
    data = (
        "Data to evaluate, all of it: as config.data.source has it; may be given again. Default: the run's validation."
    )
    flags.DEFINE_multi_string("data", [], data, **here)
    flags.DEFINE_string("validation_of", "", "A run whose validation data is used for all models.", **here)
    last_word = 'A file of JSON lines, {"text"} or {"context", "target"}: the last word; may be given again.'
    flags.DEFINE_multi_string("last_word", [], last_word, **here)
    choices = 'A file of JSON lines, {"question" or "context", "choices", "answer"}; may be given again.'
    flags.DEFINE_multi_string("choices", [], choices, **here)
    prompts = "How questions are put. Default: last words as text, choices as chat where the tokenizer has the markers."
    flags.DEFINE_enum("prompts", None, questions.PROMPTS, prompts, **here)
    flags.DEFINE_enum("targets", None, TARGETS, "What counts. Default: what the run's own loss counts.", **here)
    flags.DEFINE(WHOLE, "stride", None, "Tokens that each window adds. Default: all that the model sees.", **here)
    flags.DEFINE(WHOLE, "batch_size", 8, "Windows computed together.", **here)
    flags.DEFINE_enum("backend", None, BACKENDS, "Instead of the config's.", **here)
    flags.DEFINE_bool("json", False, "Whether to print JSON.", **here)
    flags.DEFINE_string("output", "", "A file for the results, as JSON.", **here)


def check_flags() -> None:
    """Raises UserError for a flag with an impossible value."""
    for name in ("stride", "batch_size"):
        value = FLAGS[name].value
        if value is not None and (problem := WINDOWS.problem(value)):
            raise UserError(f"--{name} {problem}")
    for name in ("data", "last_word", "choices"):
        for text in FLAGS[name].value:
            if problem := text_problem(text):
                raise UserError(f"--{name} {problem}")
            if FLAGS[name].value.count(text) > 1:
                raise UserError(f"--{name}={text} is given twice: give it once")
    if problem := text_problem(FLAGS.output):
        raise UserError(f"--output {problem}")
    if FLAGS.output and not Path(FLAGS.output).absolute().parent.is_dir():
        raise UserError(f"--output={FLAGS.output}: there is no folder {Path(FLAGS.output).parent}")
    if FLAGS.output and not may_replace(Path(FLAGS.output)):
        found = f"--output={FLAGS.output} is a folder, or a file of something else that would be lost"
        raise UserError(f"{found}: give another name")


if __name__ == "__main__":
    run_main(main, arguments=["RUN"], more="RUN", define=define_flags)
