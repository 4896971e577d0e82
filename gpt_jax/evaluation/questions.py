"""Questions with one right answer: the last word of a text, and one of several choices, by likelihood.

The figures are those that lm-evaluation-harness gives the same names: `acc` counts a question whose right choice has
the largest sum of log-probabilities, `acc_norm` one where that sum over the characters of the choice is the largest;
for last words, `acc` counts those whose every token is the likeliest, and `perplexity` is exp of the mean loss of a
word.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_jax.config import text_problem
from gpt_jax.data.batches import MASKED
from gpt_jax.errors import UserError
from gpt_jax.evaluation.encoding import Encoding
from gpt_jax.evaluation.likelihood import exponential
from gpt_jax.evaluation.scorer import Scorer
from gpt_jax.evaluation.windows import Window

CHAT, TEXT = "chat", "text"
PROMPTS = (CHAT, TEXT)  # how a question is put: as a user's turn, or as text that goes on
_WIDTHS = 16  # a file's windows are as wide as its longest, up to a multiple of this

_LAST_WORD = re.compile(r"(.*\S\s+)(\S+)\s*", re.DOTALL)


class Question(NamedTuple):
    """A context and what may follow it. right: the place of what does. place: of the question, for messages."""

    context: str
    choices: tuple[str, ...]
    right: int
    place: str


def read_last_words(path: str) -> list[Question]:
    """The questions of a file of JSON lines, `{"text": ...}` or `{"context": ..., "target": ...}` each.

    Raises:
      UserError: there is no such file, or a line is none of these.
    """
    return _read(path, _last_word)


def read_choices(path: str) -> list[Question]:
    """The questions of a file of JSON lines: `question`, `context` or both, `choices`, and `answer`, the right one's
    place from 0 on.

    Raises:
      UserError: there is no such file, or a line is none of these.
    """
    return _read(path, _choices)


def score_last_words(questions: Sequence[Question], encoding: Encoding, scorer: Scorer, prompts: str) -> dict[str, Any]:
    """acc and perplexity of last words; prompts: one of PROMPTS."""
    windows, cut = _windows(questions, encoding, scorer.block_size, prompts)
    most = max(int((window.targets != MASKED).sum()) for window in windows)
    scored = list(scorer.losses_and_hits(windows, _width(windows, scorer.block_size), most))
    nats = [float(losses.astype(np.float64).sum()) for losses, _ in scored]
    return {
        "questions": len(questions),
        **_accuracy("acc", [hit for _, hit in scored]),
        "perplexity": exponential(float(np.mean(nats))),
        "contexts_cut": cut,
    }


def score_choices(questions: Sequence[Question], encoding: Encoding, scorer: Scorer, prompts: str) -> dict[str, Any]:
    """acc and acc_norm of choices; prompts: one of PROMPTS."""
    windows, cut = _windows(questions, encoding, scorer.block_size, prompts)
    scored = scorer.losses(windows, _width(windows, scorer.block_size))
    right, right_by_length = [], []
    for question in questions:
        likelihoods = np.array([-next(scored)[1].astype(np.float64).sum() for _ in question.choices])
        lengths = np.array([len(choice) for choice in question.choices])
        right.append(int(likelihoods.argmax()) == question.right)
        right_by_length.append(int((likelihoods / lengths).argmax()) == question.right)
    return {
        "questions": len(questions),
        **_accuracy("acc", right),
        **_accuracy("acc_norm", right_by_length),
        "contexts_cut": cut,
    }


def _accuracy(name: str, hits: Sequence[bool]) -> dict[str, float | None]:
    """A share and its standard error, which one question alone does not have."""
    share, count = float(np.mean(hits)), len(hits)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
    return {name: share, f"{name}_stderr": error}


def _windows(
    questions: Sequence[Question], encoding: Encoding, block_size: int, prompts: str
) -> tuple[list[Window], int]:
    """A window for each choice of each question, and of how many contexts the beginning does not fit."""
    windows, cut = [], 0
    for question in questions:
        context, continuations = _tokens(question, encoding, prompts)
        for ids in continuations:
            if len(ids) > block_size:
                raise UserError(
                    f"{question.place}: an answer of {len(ids)} tokens, and the model sees {block_size} at once"
                )
            whole = np.array([*context, *ids][-block_size - 1 :], np.int32)
            targets = np.where(np.arange(len(whole)) < len(whole) - len(ids), MASKED, whole)
            windows.append(Window(whole[:-1], targets[1:].astype(np.int32)))
        cut += len(context) + max(map(len, continuations)) > block_size + 1
    return windows, cut


def _tokens(question: Question, encoding: Encoding, prompts: str) -> tuple[list[int], list[list[int]]]:
    """The context and each choice. In text, what is blank between them belongs to the choice, as BPE has it."""
    if prompts == CHAT:
        return encoding.question(question.context), [encoding.text(choice) for choice in question.choices]
    context = question.context.rstrip()
    blank = question.context[len(context) :] or " "
    return encoding.text(context) or [encoding.start], [encoding.text(blank + choice) for choice in question.choices]


def _width(windows: Sequence[Window], block_size: int) -> int:
    longest = max(len(window.inputs) for window in windows)
    return min(block_size, -(-longest // _WIDTHS) * _WIDTHS)


# ---- files


def _read(path: str, parse: Callable[[dict[str, Any], str], Question]) -> list[Question]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path} {'is a folder, no file' if file.is_dir() else 'does not exist'}: give JSON lines")
    questions = [parse(row, place) for row, place in _rows(file)]
    if not questions:
        raise UserError(f"{path} holds no question: give JSON lines")
    return questions


def _rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with file.open(encoding="utf-8-sig") as lines:
        number = 0
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{file}:{number}: found {line.strip()[:60]!a} where a JSON object must be")
                yield row, f"{file}:{number}"
        except UnicodeDecodeError:
            raise UserError(f"{file}:{number + 1} or below is not text in UTF-8: save it as that") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not valid JSON ({error}): one object a line") from None


def _text(row: dict[str, Any], name: str, place: str) -> str:
    if problem := text_problem(row[name]):
        raise UserError(f"{place}: {name} {problem}")
    if not row[name].strip():
        raise UserError(f"{place}: {name} is empty")
    return row[name]


def _last_word(row: dict[str, Any], place: str) -> Question:
    if "context" in row and "target" in row:
        return Question(_text(row, "context", place), (_text(row, "target", place).strip(),), 0, place)
    if "text" not in row:
        raise UserError(f'{place}: has neither "text" nor "context" and "target", found {_names(row)}')
    parts = _LAST_WORD.fullmatch(_text(row, "text", place))
    if parts is None:
        raise UserError(f"{place}: text has one word, and the last of two or more is asked for: {row['text'][:60]!a}")
    return Question(parts[1], (parts[2],), 0, place)


def _choices(row: dict[str, Any], place: str) -> Question:
    contexts = [_text(row, name, place) for name in ("context", "question") if name in row]
    choices, answer = row.get("choices"), row.get("answer")
    if not contexts:
        raise UserError(f'{place}: has neither "question" nor "context", found {_names(row)}')
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f'{place}: "choices" must be a list of two texts or more, found {_short(choices)}')
    texts = tuple(_text({"choice": choice}, "choice", place).strip() for choice in choices)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise UserError(
            f'{place}: "answer" must be the place of the right choice, 0 to {len(texts) - 1}, found {_short(answer)}'
        )
    return Question("\n".join(contexts), texts, answer, place)


def _names(row: dict[str, Any]) -> str:
    return _short(", ".join(row)) if row else "nothing"


def _short(value: Any) -> str:
    return ascii(value)[:80]
