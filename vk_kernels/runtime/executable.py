"""Executable: a `program.Program` on a device, bound to buffers, recorded once and submitted often.

It works on its inputs where they are. A recording is bound to the buffers it was made with: as long as a caller comes
back with the same ones, as a training loop does with its donated state, a call is one queue submit.

For a driver with a watchdog, which gives a device up when one submission takes long, `Device.submit_ms` cuts a program
into several. Stages, which end at barriers, are submitted one by one in its first two calls, and timed in the second,
when kernels are compiled and memory is in place. From then on consecutive stages are one submission as long as they
took no longer together; a stage that took longer is one alone. Where the cuts are changes no result.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from vk_kernels.errors import OutOfMemoryError
from vk_kernels.runtime import dispatch_plan
from vk_kernels.runtime.array import Array, ArrayType
from vk_kernels.runtime.command_buffer import Chain, TimedChain
from vk_kernels.runtime.lifetime import DonationState, referenced_elsewhere
from vk_kernels.runtime.memory import Buffer
from vk_kernels.runtime.program import Command, Program, find_barriers

if TYPE_CHECKING:
    from vk_kernels.runtime.command_buffer import CommandRecorder, Timing
    from vk_kernels.runtime.device import Device
    from vk_kernels.runtime.kernel import Kernel

# Kept by an executable: for other buffers, and so that a call need not wait for the one before.
RECORDINGS = 4


def group_stages(seconds: Sequence[float], limit: float) -> list[int]:
    """The first stage of each submission: as many stages are one as take `limit` seconds, one at least."""
    firsts, spent = [0], 0.0
    for stage, taken in enumerate(seconds):
        if stage > firsts[-1] and spent + taken > limit:
            firsts.append(stage)
            spent = 0.0
        spent += taken
    return firsts


class _Recording:
    """A recorded program with the buffers that it is bound to.

    inputs: None where an input has a slot: a private buffer that host arrays are copied into.
    slots: each with its memory as the host sees it (`Buffer.mapped`).
    outputs: without those in an input's memory. results: the arrays that callers get for them.
    """

    def __init__(
        self,
        recorder: "CommandRecorder | Chain",
        inputs: list[Buffer | None],
        slots: dict[int, tuple[Buffer, np.ndarray | None]],
        outputs: Sequence[Buffer],
        types: Sequence[ArrayType],
    ):
        self.recorder = recorder
        self.inputs, self.slots = inputs, slots
        self.outputs, self.types = outputs, types
        self.renew()

    @property
    def lost(self) -> bool:
        """Whether an output was donated: its memory is another program's now. Not where all results are alive."""
        return any(buffer.donated for buffer in self.outputs)

    def renew(self) -> None:
        """Makes new results in the same memory."""
        self.donation = DonationState()
        self.results = list(map(Array, self.outputs, self.types, repeat(self.donation)))


class Executable:
    """A program on a device: its kernels, its arena and its recordings. Not for two threads at once."""

    def __init__(
        self, device: "Device", program: Program, types: Sequence[ArrayType], unused: frozenset[int] = frozenset()
    ):
        """types: of the outputs that are not aliases. unused: inputs that calls do not pass, as no command needs them.

        Raises FeatureError for what the device lacks, OutOfMemoryError where it has no room.
        """
        self.device, self.program, self._types, self._unused = device, program, types, unused
        self._kernels = [_kernel(device, command) for command in program.commands]
        self.barriers = find_barriers(
            [command.operands for command in program.commands],
            [kernel.writable for kernel in self._kernels],
            [command.disjoint_writes for command in program.commands],
        )
        self.arena: list[Buffer] = []
        try:
            self._find_or_make_arena()
            self._constants = [device.upload(array) for array in program.constants]
        except OutOfMemoryError as error:
            needed = f"a program takes {_total_bytes(program):,} bytes with its arguments"
            raise OutOfMemoryError(f"{needed}: {error}") from None
        stages = [0, *(i for i, barrier in enumerate(self.barriers) if barrier and i)]
        self._cuts = stages if device.submit_ms else [0]  # the commands that submissions begin with
        self._timed_runs = 0 if device.submit_ms and len(stages) > 1 else None  # until it is known where to cut
        self._sizes = [array.nbytes for array in program.inputs]
        self._aliases = [program.aliases.get(j) for j in range(len(program.outputs))]
        self._aliased = frozenset(program.aliases.values())
        self._last: list[Buffer | None] = [None] * len(program.inputs)  # that the last call was bound to
        self._recordings: deque[_Recording] = deque(maxlen=RECORDINGS)  # by use, the last used last
        self._copied: set[int] = set()  # inputs that come in other memory each time: copied into a slot
        self._misses: Counter[int] = Counter()
        device.executables.add(self)

    def _find_or_make_arena(self) -> list[Buffer]:
        """The arena's blocks, made at first, and when `make_room` has dropped them: it keeps nothing between calls."""
        arena = self.arena
        if not arena:
            whole, block = self.program.arena_bytes, self.program.arena_block
            sizes = [min(block, whole - start) for start in range(0, whole, block)]
            arena = self.arena = [self.device.buffer(size, sliced=True) for size in sizes]
        return arena

    def __call__(self, arguments: Mapping[int, Buffer | np.ndarray]) -> list[Array]:
        """Submits the program; returns at once the outputs that are not in an input's memory, computed or not.

        arguments: by number; a buffer on the device, or a host array, which is uploaded. For an aliased input a buffer,
        or no entry if it is the last call's.

        Raises ValueError for an argument of another size than the input's, and for two inputs in the same memory, one
        of which is an output's.
        """
        recording = self._find_or_record(self._bind(arguments))
        if recording.slots:
            self._fill_slots(recording.slots, arguments)
        recording.recorder.submit()
        self._last = recording.inputs
        if not recording.donation.all_alive:  # a caller deleted one
            recording.renew()
        return recording.results.copy()

    def _fill_slots(
        self, slots: Mapping[int, tuple[Buffer, np.ndarray | None]], arguments: Mapping[int, Buffer | np.ndarray]
    ) -> None:
        """Brings the arguments that have a slot there: host arrays at once, buffers as a submission of copies."""
        copies, wait = [], self.device.queue.wait
        for i, (slot, mapped) in slots.items():
            x = arguments[i]
            if isinstance(x, Buffer):
                if x.size != self._sizes[i]:
                    raise self._wrong_size(i, x.size)
                copies.append((x, slot))
                continue
            if x.nbytes != self._sizes[i]:
                raise self._wrong_size(i, x.nbytes)
            if mapped is None:
                slot.write(x)
            else:
                wait(slot.last_use)
                mapped[...] = x
        self._copy(copies)

    def _wrong_size(self, i: int, found: int) -> ValueError:
        """The error for an argument of `found` bytes: no kernel may read past the end of what it is given."""
        array = self.program.inputs[i]
        return ValueError(f"input {i} of the program is {array}, {array.nbytes:,} bytes, found {found:,} bytes")

    def _copy(self, copies: Sequence[tuple[Buffer, Buffer]]) -> None:
        if copies:
            with self.device.pooled_recorder() as recorder:
                for source, target in copies:
                    recorder.copy(source, target)
                recorder.submit()

    def _bind(self, arguments: Mapping[int, Buffer | np.ndarray]) -> list[Buffer | None]:
        """The buffers that a recording for a call is bound to; None where it has a slot.

        The last call's list if nothing changed: to compare it by identity is quicker.
        """
        bound = self._last
        for i, x in arguments.items():
            buffer = x.owner if isinstance(x, Buffer) and i not in self._copied else None
            if bound[i] is not buffer:
                if buffer is not None and x.size != self._sizes[i]:
                    raise self._wrong_size(i, x.size)
                bound = bound.copy() if bound is self._last else bound
                bound[i] = buffer
            if i in self._aliased:
                buffer.donated = True
        return bound

    def _find_or_record(self, bound: list[Buffer | None]) -> _Recording:
        """A recording for these buffers: the longest unused one that is free, else a new one."""
        for recording in [x for x in self._recordings if not x.donation.all_alive and x.lost]:
            self._recordings.remove(recording)
        fitting = [x for x in self._recordings if x.inputs is bound or x.inputs == bound]
        full = len(self._recordings) == RECORDINGS
        is_done = self.device.queue.is_done
        for recording in fitting:
            # Slots that the device still reads, and outputs that a caller holds, are better left alone.
            is_free = full or not recording.slots or is_done(recording.recorder.last_use)
            if is_free and not referenced_elsewhere(recording.results):
                break
        else:
            recording = self._evict_held_outputs(fitting[0]) if full and fitting else self._record(bound)
        if not self._recordings or recording is not self._recordings[-1]:
            if recording in self._recordings:  # unless `make_room` came in between
                self._recordings.remove(recording)
            self._recordings.append(recording)
        return recording

    def make_room(self) -> None:
        """Drops the arena and all recordings, and with them inputs and outputs that nobody else has.

        The next call makes anew what it needs.
        """
        self._recordings.clear()
        self.arena = []
        self._last = [buffer if i in self._aliased else None for i, buffer in enumerate(self._last)]

    def release_donated(self) -> None:
        """Drops the recordings that are bound to the last call's donated buffers, and with them the buffers."""
        last, self._last = self._last, [None] * len(self._last)
        for recording in list(self._recordings):
            if any(recording.inputs[i] is last[i] for i in self._aliased):
                self._recordings.remove(recording)

    def _evict_held_outputs(self, recording: _Recording) -> _Recording:
        """Moves the results that callers hold into other memory; returns the recording, with new results."""
        kept = [array for array in referenced_elsewhere(recording.results) if not array.is_deleted()]
        moves = [(array, self.device.buffer(array.buffer.size)) for array in kept]
        self._copy([(array.buffer, target) for array, target in moves])
        for array, target in moves:
            array.move_to(target)
        recording.renew()
        return recording

    def _record(self, bound: list[Buffer | None]) -> _Recording:
        """Makes a recording for these buffers, and keeps it."""
        self._check_apart(bound)
        self._count_misses(bound)
        if any(bound[i] is not None for i in self._copied):
            bound = [None if i in self._copied else x for i, x in enumerate(bound)]
        inputs = self.program.inputs
        slots_for = [i for i, x in enumerate(bound) if x is None and i not in self._unused]
        buffers = {i: self.device.buffer(inputs[i].nbytes) for i in slots_for}
        slots = {i: (slot, slot.mapped(inputs[i].dtype, inputs[i].shape)) for i, slot in buffers.items()}
        outputs = [
            self.device.buffer(array.nbytes) if alias is None else None
            for array, alias in zip(self.program.outputs, self._aliases, strict=True)
        ]
        recorder = self._recorded([buffers.get(i) or x for i, x in enumerate(bound)], outputs)
        made = _Recording(recorder, bound, slots, [x for x in outputs if x is not None], self._types)
        self._recordings.append(made)
        return made

    def _count_misses(self, bound: Sequence[Buffer | None]) -> None:
        """Has an input that comes in other memory each time copied: it is not worth a recording each time."""
        last = self._recordings[-1].inputs if self._recordings else bound
        for i, (buffer, before) in enumerate(zip(bound, last, strict=True)):
            if i not in self._aliased and buffer is not None and buffer is not before:
                self._misses[i] += 1
                if self._misses[i] > RECORDINGS:
                    self._copied.add(i)

    def _recorded(self, inputs: Sequence[Buffer], outputs: Sequence[Buffer | None]) -> "CommandRecorder | Chain":
        recorders = []
        for start, end in self._submissions():
            recorder = self.device.new_recorder(hazards=False, replay=True)
            self._fill(recorder, inputs, outputs, start, end)
            recorder.end()
            recorders.append(recorder)
        if self._timed_runs is not None:
            return TimedChain(recorders, self._learn)
        return recorders[0] if len(recorders) == 1 else Chain(recorders)

    def _submissions(self) -> list[tuple[int, int]]:
        """(first command, behind the last) of each."""
        return list(zip(self._cuts, [*self._cuts[1:], len(self.program.commands)], strict=True))

    def _learn(self, seconds: list[float]) -> None:
        """Cuts anew by the seconds that each stage took, once the stages are warm."""
        self._timed_runs += 1
        if self._timed_runs == 2:
            self._cuts = [self._cuts[stage] for stage in group_stages(seconds, 1e-3 * self.device.submit_ms)]
            self._timed_runs = None
            self._recordings.clear()

    def cut_after(self, groups: Sequence[Sequence[int]]) -> None:
        """Has each group of outputs done with a submission of its own, as soon as its last command is: their `last_use`
        tells which. Before the first call."""
        if self._timed_runs is not None:
            return  # cut by time anyway
        number = {("output", j): k for k, group in enumerate(groups) for j in group}
        last: dict[int, int] = {}
        for i, command in enumerate(self.program.commands):
            for place in command.operands:
                if (place.space, place.index) in number:
                    last[number[place.space, place.index]] = i
        ends = {i + 1 for i in last.values()} - {len(self.program.commands)}
        self._cuts = sorted({0} | ends)

    def _check_apart(self, bound: Sequence[Buffer | None]) -> None:
        given = Counter(id(x) for x in bound if x is not None)
        for i in sorted(self._aliased):
            if given[id(bound[i])] > 1:
                raise ValueError(
                    f"input {i}, {self.program.inputs[i]}, is donated, and passed a second time in the same call: "
                    "pass a copy"
                )

    def record(self, recorder: "CommandRecorder", inputs: Sequence[Buffer], outputs: Sequence[Buffer | None]) -> None:
        """Records the program among other commands, on buffers or slices that the caller cares for.

        outputs: None where one is in an input's memory.
        """
        self._fill(recorder, inputs, outputs, 0, len(self.program.commands))

    def _fill(
        self,
        recorder: "CommandRecorder",
        inputs: Sequence[Buffer],
        outputs: Sequence[Buffer | None],
        start: int,
        end: int,
    ) -> None:
        """Records the commands from `start` to `end`, all of them compiled by then."""
        arena, block = self._find_or_make_arena(), self.program.arena_block
        spaces = {"input": inputs, "output": outputs, "constant": self._constants}
        for i in range(start, end):
            command, kernel = self.program.commands[i], self._kernels[i]
            if self.barriers[i] and i > start:
                recorder.barrier()
            operands = [
                arena[place.index // block].slice(place.index % block, place.nbytes)
                if place.space == "arena"
                else spaces[place.space][place.index]
                for place in command.operands
            ]
            recorder.dispatch(kernel, operands, command.push_constants, command.groups, command.label)

    def time(self, arguments: Mapping[int, Buffer | np.ndarray]) -> list["Timing"]:
        """Device time of each command, run one at a time; the arguments, by number, stay as they are."""
        inputs: list[Buffer | None] = [None] * len(self.program.inputs)
        for i, x in arguments.items():
            found = x.size if isinstance(x, Buffer) else x.nbytes
            if found != self._sizes[i]:
                raise self._wrong_size(i, found)
            inputs[i] = self.device.buffer(x.size) if isinstance(x, Buffer) else self.device.upload(x)
        self._copy([(x, inputs[i]) for i, x in arguments.items() if isinstance(x, Buffer)])
        outputs = [
            None if j in self.program.aliases else self.device.buffer(array.nbytes)
            for j, array in enumerate(self.program.outputs)
        ]
        timings = []
        for start, end in self._submissions():
            count = sum(0 not in command.groups for command in self.program.commands[start:end])
            recorder = self.device.new_recorder(hazards=False, timestamps=max(count, 1))
            self._fill(recorder, inputs, outputs, start, end)
            timings += recorder.submit().timings()
        return timings


def _total_bytes(program: Program) -> int:
    made = [array for j, array in enumerate(program.outputs) if j not in program.aliases]
    return program.arena_bytes + sum(x.nbytes for x in (*program.inputs, *made, *program.constants))


def _kernel(device: "Device", command: Command) -> "Kernel":
    if isinstance(command.kernel, dispatch_plan.Dispatch):
        return dispatch_plan.kernel_of(device, command.kernel)
    return device.kernel_from_spirv(command.kernel, command.label)
