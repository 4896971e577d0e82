"""Texts to evaluate, each with the source that its figures are told under."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from gpt_jax.data.corpus import read_corpus, split_dialogues
from gpt_jax.data.dialogue import Dialogue
from gpt_jax.data.reading import Reading
from gpt_jax.data.token_cache import sources_of
from gpt_jax.errors import UserError
from gpt_jax.log import Log

DEFAULT = "default"
_PARTS = {"quote": "quotes", "scene": "plays"}  # of the default corpus, by what the sources of its dialogues begin with

NamedTexts = Iterator[tuple[str, Dialogue]]


def all_texts(source: str, log: Log) -> NamedTexts:
    """All that a data source holds, training and validation; a row that cannot be read is an error.

    Raises:
      UserError: as `read_corpus`, or it holds nothing.
    """
    reading = Reading()
    for dialogue in read_corpus(source, reading):
        yield _label(source, dialogue), dialogue
    _tell(reading, log)
    if not reading.formats:
        raise UserError(f"data source {source!r} holds no dialogue and no text")


def validation_sources(config: ConfigDict) -> tuple[str, ...]:
    """The sources that a run's validation data is of, or is a part of."""
    own = config.data.get("validation", "")
    return (own,) if own else sources_of(config.data)


def validation_texts(
    config: ConfigDict, recorded: Mapping[str, int], log: Log, *, called: Callable[[str], str] = str
) -> NamedTexts:
    """The validation split of a run's data, read anew, so that it needs no cache.

    Args:
      recorded: the dialogues and bytes that it had when the run was trained, where that is known; another number now is
        told to `log`.
      called: gives the name that a source is told under.

    Raises:
      UserError: as `read_corpus`, or there is none now.
    """
    data = config.data
    choices: dict[str, Any] = {name: data[name] for name in ("tool_calls", "on_error") if name in data}
    reading = Reading(**choices)
    found = {"dialogues": 0, "bytes": 0}
    sources = validation_sources(config)
    fraction = 1.0 if data.get("validation") else data.validation_fraction
    for source in sources:
        for is_validation, dialogue in split_dialogues(read_corpus(source, reading), fraction):
            if is_validation:
                found["dialogues"] += 1
                found["bytes"] += sum(len(turn.text.encode()) for turn in dialogue.turns)
                yield called(_label(source, dialogue)), dialogue
    _tell(reading, log)
    title = " and ".join(map(repr, sources))
    if not found["dialogues"]:
        raise UserError(f"nothing of {title} is validation data of the run now: give --data=FILE")
    if any(recorded.get(name, count) != count for name, count in found.items()):
        both = (found, found | dict(recorded))
        now, then = (f"{each['dialogues']:,} dialogues of {each['bytes']:,} bytes" for each in both)
        log(f"warning: the validation data of {title} is {now}, and was {then} when the run was trained")


def _label(source: str, dialogue: Dialogue) -> str:
    part = _PARTS.get(dialogue.source.partition(":")[0]) if source == DEFAULT else None
    return f"{source}, {part}" if part else source


def _tell(reading: Reading, log: Log) -> None:
    for note in reading.notes():
        log(f"data: {note}")
