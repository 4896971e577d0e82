"""Reference counts say whether a caller still holds what a call returned, or nothing is taken for free."""

import sys

import pytest

from vk_kernels.runtime import lifetime
from vk_kernels.runtime.lifetime import referenced_elsewhere


class Thing:
    pass


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("which", [(), (0,), (1, 2), (0, 1, 2)])
def test_what_something_else_refers_to_is_told_from_what_nothing_does(kind, which):
    objects = kind(Thing() for _ in range(3))
    by_others = {"some": [objects[i] for i in which]}
    assert [id(x) for x in referenced_elsewhere(objects)] == [id(objects[i]) for i in which]
    by_others.clear()
    assert referenced_elsewhere(objects) == []


def test_an_attribute_a_closure_and_a_local_are_references():
    objects, holder = [Thing(), Thing(), Thing(), Thing()], Thing()
    holder.kept, local = objects[0], objects[1]
    kept = (lambda x: lambda: x)(objects[2])
    assert referenced_elsewhere(objects) == [holder.kept, local, kept()]


COUNT = sys.getrefcount


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: 2**32 - 1,  # immortal
        lambda x: 1,  # counts that are deferred
        lambda x: 2 * COUNT(x),  # more than one each
        lambda x: id(x) % 7919,  # nothing that means anything
    ],
)
def test_nothing_is_taken_for_free_where_counts_do_not_follow_references(odd, monkeypatch):
    assert lifetime._calibrate() is not None
    monkeypatch.setattr(sys, "getrefcount", odd)
    assert lifetime._calibrate() is None
    monkeypatch.setattr(lifetime, "_BASE_REFCOUNT", lifetime._calibrate())
    objects = [Thing(), Thing()]
    assert referenced_elsewhere(objects) == objects
