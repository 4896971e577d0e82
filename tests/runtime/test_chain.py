"""Recordings that stand for one are handed over as one, whatever is raised meanwhile: without a device."""

import pytest

from vk_kernels.errors import DeviceLostError, DeviceTimeoutError, ValidationError
from vk_kernels.runtime.command_buffer import Chain, TimedChain


class FakeQueue:
    def __init__(self, refusals=()):
        self.submitted, self.order, self.refusals = 7, [], dict(refusals)


class FakeRecorder:
    """A recording. before, after, wait: raised once, before or after it is handed over, or while it is waited for."""

    def __init__(self, queue, name, before=None, after=None, wait=None):
        self.queue, self.name, self.last_use = queue, name, 3
        self._before, self._after, self._wait = before, after, wait

    def submit(self):
        queue = self.queue
        if self._before:
            error, self._before = self._before, None
            raise error
        if self.name in queue.refusals:
            queue.submitted += 1  # another thread's, meanwhile
            raise queue.refusals[self.name]
        queue.submitted += 1
        self.last_use = queue.submitted
        queue.order.append(self.name)
        if self._after:
            raise self._after
        return self

    def wait(self):
        if self._wait:
            raise self._wait


KINDS = pytest.mark.parametrize("kind", [Chain, lambda recorders: TimedChain(recorders, lambda seconds: None)])
RAISED = [KeyboardInterrupt(), SystemExit(1), TimeoutError("a handler of SIGALRM"), MemoryError()]


def recorders(queue, **second):
    return [FakeRecorder(queue, "a"), FakeRecorder(queue, "b", **second), FakeRecorder(queue, "c")]


@KINDS
def test_in_order_and_the_last_is_returned(kind):
    queue = FakeQueue()
    found = recorders(queue)
    assert kind(found).submit() is found[-1]
    assert queue.order == ["a", "b", "c"]


@KINDS
@pytest.mark.parametrize("error", RAISED, ids=repr)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_rest_is_handed_over_whatever_is_raised(kind, error, when):
    queue = FakeQueue()
    with pytest.raises(type(error)) as caught:
        kind(recorders(queue, **{when: error})).submit()
    assert caught.value is error
    assert queue.order == ["a", "b", "c"]


@pytest.mark.parametrize("error", [*RAISED, DeviceTimeoutError("late"), ValidationError("said")], ids=repr)
def test_the_rest_is_handed_over_where_one_was_waited_for_in_vain(error):
    queue = FakeQueue()
    with pytest.raises(type(error)):
        TimedChain(recorders(queue, wait=error), lambda seconds: None).submit()
    assert queue.order == ["a", "b", "c"]


@KINDS
def test_nothing_runs_after_what_the_device_refuses(kind):
    queue = FakeQueue({"b": DeviceLostError("lost")})
    with pytest.raises(DeviceLostError, match="lost"):
        kind(recorders(queue)).submit()
    assert queue.order == ["a"]


@KINDS
def test_the_first_error_is_the_one_that_is_raised(kind):
    queue = FakeQueue({"c": DeviceLostError("lost")})
    with pytest.raises(KeyboardInterrupt):
        kind(recorders(queue, after=KeyboardInterrupt())).submit()
    assert queue.order == ["a", "b"]
