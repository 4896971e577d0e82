"""Lifetimes of the arrays that a call returns: whether they were donated since, and whether anything refers to them."""

import sys
from collections.abc import Sequence
from itertools import compress
from typing import Any


class DonationState:
    """Donation state shared by the arrays that one call returned in the same memory.

    donated: set when they are donated again, which makes all of them invalid together.
    all_alive: cleared when one of them is deleted by itself.
    """

    __slots__ = ("all_alive", "donated")

    def __init__(self, donated: bool = False):
        self.donated, self.all_alive = donated, True


def referenced_elsewhere(objects: Sequence[Any]) -> list[Any]:
    """The objects that something besides this list or tuple refers to; the caller has the only reference to that.

    All of them where reference counts do not tell, so that none is taken for free.
    """
    if _BASE_REFCOUNT is None:
        return list(objects)
    counts = list(map(sys.getrefcount, objects))
    if counts.count(_BASE_REFCOUNT) == len(counts):
        return []
    return list(compress(objects, map(_BASE_REFCOUNT.__lt__, counts)))


def _calibrate() -> int | None:
    """The count of an object that only a list or a tuple refers to; None where counts do not follow references.

    They do not in every Python: a runtime may defer them, borrow a reference or make an object immortal.
    """
    in_list = [object() for _ in range(3)]
    counts = {*map(sys.getrefcount, in_list), *map(sys.getrefcount, (object(), object()))}
    again = [in_list[1]]
    with_another = list(map(sys.getrefcount, in_list))
    again.clear()
    after = list(map(sys.getrefcount, in_list))
    base = min(counts)
    follows = counts == {base} and with_another == [base, base + 1, base] and after == [base] * 3
    return base if follows else None


_BASE_REFCOUNT = _calibrate()
