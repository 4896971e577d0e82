"""The end of a run that does not get better: so many evaluations in a row without a new lowest validation loss."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Evaluation(NamedTuple):
    """One evaluation of a run."""

    step: int
    loss: float


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The one of the lowest loss, the first of equals; one that is not finite never is."""
    return min((each for each in evaluations if math.isfinite(each.loss)), key=lambda each: each.loss, default=None)


def why_stop(evaluations: Sequence[Evaluation], patience: int) -> str | None:
    """One line that says why a run with these evaluations is to end; None if it is to go on.

    patience: how many evaluations in a row may bring no lower loss than the best before them; 0: any number.
    """
    best = best_of(evaluations)
    since = len(evaluations) - (0 if best is None else evaluations.index(best) + 1)
    if not patience or since < patience:
        return None
    seen = "none was finite" if best is None else f"the lowest is {best.loss:.4f}, of step {best.step}"
    return f"{since} evaluation{'' if since == 1 else 's'} brought no lower validation loss ({seen})"
