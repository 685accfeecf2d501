"""Streams that do not exist: who reads and writes which memory on which stream, and what is in no order.

    streams = Streams(["A", "B"])
    with streams:
        with streams.on("A"):
            optimizer.step()
    assert not streams.faults()

CPU tensors stand for memory of a device. Every operation of torch and every launch of a kernel counts as work of the
stream that is current. Kernels do not run: what one reads is what its arguments are, and what the addresses in its
table point to. A stream has a clock for each stream, of how much of its work is known to be done. To record an event
copies the clocks, and to wait for it takes the later ones. So an access is in order if the clocks know the one before.
"""

from __future__ import annotations

import bisect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from apollo_triton.kernels import table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_triton.core import gpu, streams


class Stream:
    """What ``core/streams.py`` asks of one."""

    def __init__(self, name):
        self.name, self.clock = name, {name: 0}

    def record_event(self):
        return dict(self.clock)

    def wait_event(self, event):
        self.clock |= {name: max(time, self.clock.get(name, 0)) for name, time in event.items()}

    def wait_stream(self, other):
        self.wait_event(other.record_event())


@dataclass
class Memory:
    tensor: torch.Tensor  # alive, so that no other memory takes its address
    made_on: Stream
    held: set[Stream] = field(default_factory=set)
    users: set[Stream] = field(default_factory=set)
    written: tuple[Stream, int] | None = None
    read: dict[Stream, int] = field(default_factory=dict)


class Streams(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.of = {name: Stream(name) for name in names}
        self.now = self.of[names[0]]
        self._memory, self._starts, self._faults = {}, [], []

    @contextmanager
    def on(self, name):
        before, self.now = self.now, self.of[name]
        yield self.now
        self.now = before

    def __enter__(self):
        self._patches = ExitStack()
        for module, name, new in (
            (streams, "current", lambda device: self.now),
            (streams, "hold", lambda tensor, stream: self._at(tensor).held.add(stream)),
            (gpu, "launch", self._launch),
        ):
            self._patches.enter_context(mock.patch.object(module, name, new))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patches.close()

    def faults(self, callers=()):
        """What is in no order, and what may be freed while a stream works on it. ``callers``: tensors that are not, as
        their owner orders what is done with them."""
        theirs = {tensor.untyped_storage().data_ptr() for tensor in callers}
        freed = [
            f"{tuple(each.tensor.shape)} of {each.made_on.name} may be freed under {stream.name}"
            for start, each in self._memory.items()
            if start not in theirs
            for stream in each.users - each.held - {each.made_on}
        ]
        return self._faults + freed

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = dict(zip((each.name for each in operation._schema.arguments), args, strict=False)) | (kwargs or {})
        self.now.clock[self.now.name] += 1
        for each in operation._schema.arguments:
            writes = each.alias_info is not None and each.alias_info.is_write
            for tensor in _tensors(given.get(each.name)):
                self._use(self._at(tensor), writes, operation)
        for tensor in _tensors(result):
            self._at(tensor)
        return result

    def _launch(self, kernel, grid, device, *arguments, **constants):
        self.now.clock[self.now.name] += 1
        name = kernel.fn.__name__
        for tensor in _tensors(arguments):
            self._use(self._at(tensor), tensor.dtype != torch.int64, name)
            if tensor.dtype == torch.int64 and tensor.shape[1:] == (table.FIELDS,):
                for row in tensor.tolist():
                    for column in (table.WEIGHT, table.EXP_AVG, table.EXP_AVG_SQ, table.UPDATE_NORM):
                        self._use_address(row[column.value], True, name)
                    if "sketch" in name or "project" in name:
                        self._use_address(row[table.PROJECTION.value], False, name)

    def _at(self, tensor):
        start = tensor.untyped_storage().data_ptr()
        if start not in self._memory:
            self._memory[start] = Memory(tensor, self.now)
            bisect.insort(self._starts, start)
        return self._memory[start]

    def _use_address(self, address, writes, what):
        index = bisect.bisect_right(self._starts, address) - 1
        if address and index >= 0:
            found = self._memory[self._starts[index]]
            if address < self._starts[index] + found.tensor.untyped_storage().nbytes():
                self._use(found, writes, what)

    def _use(self, memory, writes, what):
        now = self.now
        before = [("written", *memory.written)] if memory.written else []
        if writes:
            before += [("read", stream, time) for stream, time in memory.read.items()]
        for verb, stream, time in before:
            if now.clock.get(stream.name, 0) < time:
                verb_now = "writes" if writes else "reads"
                where = f"{tuple(memory.tensor.shape)}, which {stream.name} has {verb}"
                self._faults.append(f"{what} {verb_now} on {now.name}, in no order, {where}")
        memory.users.add(now)
        if writes:
            memory.written, memory.read = (now, now.clock[now.name]), {}
        else:
            memory.read[now] = now.clock[now.name]


def _tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
