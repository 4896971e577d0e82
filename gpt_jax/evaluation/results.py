"""The figures of models, as JSON and as tables."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpt_jax.tables import render

FORMAT_VERSION = 1  # of the JSON; raise it when what a field means changes
_TOTAL = "all of it"
_LIKELIHOOD = ("loss", "perplexity", "bits/byte", "tokens", "texts")
_QUESTIONS = ("acc", "acc_norm", "perplexity", "questions")

Results = Sequence[dict[str, Any]]  # a model each


def as_json(results: Results) -> str:
    """All that was found; what is not finite as the strings "NaN" and "Infinity", which `float` reads back."""
    models = [_spelled(result) for result in results]
    return json.dumps({"format_version": FORMAT_VERSION, "models": models}, indent=2, allow_nan=False) + "\n"


def may_replace(file: Path) -> bool:
    """Whether results may take the place of what is there: nothing, an empty file, other results, or a device."""
    if file.is_dir():
        return False
    if not file.is_file() or file.stat().st_size == 0:
        return True
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() == {"format_version", "models"}


def as_tables(results: Results) -> str:
    """A table of likelihoods and one of questions, where there are any; rows of one source or file are neighbours."""
    tables = []
    if rows := _neighbours(results, "likelihood", "source"):
        if len({each["source"] for _, each in rows}) > 1:
            rows += [(model, {**model["total"], "source": _TOTAL}) for model in results if model["total"]]
        cells = [[each["source"], model["model"], model["targets"], *_likelihood(each)] for model, each in rows]
        tables.append(render(["data", "model", "counted", *_LIKELIHOOD], cells, _LIKELIHOOD))
    rows = _neighbours(results, "last_word", "file") + _neighbours(results, "choices", "file")
    if rows:
        cells = [[each["file"], model["model"], *_question(each)] for model, each in rows]
        tables.append(render(["questions of", "model", *_QUESTIONS], cells, _QUESTIONS))
    return "\n\n".join(tables)


def _neighbours(results: Results, kind: str, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Models with an entry of theirs each, those of one name together."""
    pairs = [(model, each) for model in results for each in model[kind]]
    order = list(dict.fromkeys(each[name] for _, each in pairs))
    return sorted(pairs, key=lambda pair: order.index(pair[1][name]))


def _likelihood(found: dict[str, Any]) -> Iterable[str]:
    figures = (f"{found[name]:.4f}" for name in ("loss", "perplexity", "bits_per_byte"))
    return (*figures, f"{found['tokens']:,}", f"{found['documents']:,}")


def _question(found: dict[str, Any]) -> Iterable[str]:
    shares = (_share(found.get(name), found.get(f"{name}_stderr")) for name in ("acc", "acc_norm"))
    perplexity = f"{found['perplexity']:.4f}" if "perplexity" in found else "-"
    return (*shares, perplexity, f"{found['questions']:,}")


def _share(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _spelled(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_spelled(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
