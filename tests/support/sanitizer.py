"""A launch recorder on Triton's interpreter (TRITON_INTERPRET=1): a compute-sanitizer for a machine without a GPU.

    with Recorder(shuffle=0) as recorder:
        optimizer.step()
    recorder.assert_clean()
    recorder.launches[0].traffic(parameter.grad).loaded

It sees the real address of every access. So it finds the tensors behind pointers that a kernel reads from a table, and
not only those of arguments. The interpreter runs programs one after another, so that a race does not change the result.
Only the addresses show it.
"""

from __future__ import annotations

import gc
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import compress, product
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch.utils.weak import TensorWeakRef
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Program = tuple[int, ...]

SHOWN = 20  # lines of a failed assert_clean


class Traffic(NamedTuple):
    """Bytes loaded and stored, for every access of an element, and counting each byte once."""

    loaded: int
    stored: int
    loaded_once: int
    stored_once: int


class Accesses(NamedTuple):
    """The loads or the stores of a launch, one entry per element that the mask lets through."""

    addresses: Integers
    sizes: Integers  # 1, 2, 4 or 8 bytes
    programs: Integers  # in the order in which they ran, hence ascending

    def within(self, start: int, length: int) -> Accesses:
        inside = (self.addresses >= start) & (self.addresses < start + length)
        return Accesses(*(column[inside] for column in self))

    def owners(self, granule: int) -> tuple[Integers, Integers, Integers]:
        """The granules that were accessed, ascending, each with the first and the last program that accessed it."""
        counts = self.sizes // granule
        before = np.cumsum(counts) - counts
        granules = np.repeat(self.addresses // granule - before, counts) + np.arange(counts.sum())
        order = np.argsort(granules, kind="stable")  # keeps the programs of a granule ascending
        granules, programs = granules[order], np.repeat(self.programs, counts)[order]
        first = np.flatnonzero(np.diff(granules, prepend=granules[:1] - 1))
        last = np.append(first[1:], granules.size)[: first.size] - 1
        return granules[first], programs[first], programs[last]


def _granule(*sides: Accesses) -> int:
    """The largest power of two that divides every address and size, so that each access is whole granules."""
    bits = int(np.bitwise_or.reduce(np.concatenate([column for side in sides for column in side[:2]])))
    return bits & -bits or 1


def _traffic(loads: Accesses, stores: Accesses) -> Traffic:
    sides = loads, stores
    once = (side.owners(granule := _granule(side))[0].size * granule for side in sides)
    return Traffic(*(int(side.sizes.sum()) for side in sides), *once)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: Program
    programs: int  # those that ran: fewer than the grid has, under Recorder(only=...)
    loaded: int
    stored: int
    loaded_once: int
    stored_once: int
    atomics: int  # elements that are counted neither in loads nor in stores
    races: list[str]
    strays: list[str]
    loads: Accesses = field(repr=False)
    stores: Accesses = field(repr=False)

    def traffic(self, tensor: torch.Tensor) -> Traffic:
        """The accesses inside the tensor's storage. ``tensor`` may be any view of it."""
        where = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        return _traffic(self.loads.within(*where), self.stores.within(*where))

    def addresses(self, start: int, length: int) -> tuple[Integers, Integers]:
        """Byte offsets from ``start`` of the elements loaded and of the elements stored, ascending and distinct."""
        loaded, stored = (np.unique(x.within(start, length).addresses) - start for x in (self.loads, self.stores))
        return loaded, stored


class Memory:
    """The storages of ``tensors``, and the phantoms, by address. ``pointers``: arguments' names by address."""

    def __init__(
        self, tensors: Iterable[torch.Tensor], phantoms: list[tuple[int, int]], pointers: dict[int, str]
    ) -> None:
        ranges: dict[int, tuple[int, str, bool]] = {0: (0, "null", False)}
        for tensor in tensors:
            # Sparse and functional tensors have no storage and raise; that of fake and meta ones is no memory.
            with suppress(RuntimeError, NotImplementedError):
                if (storage := tensor.untyped_storage()).device.type == "cpu":
                    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
                    if start not in ranges or end > ranges[start][0]:
                        ranges[start] = end, f"{str(tensor.dtype)[6:]}{list(tensor.shape)}", False
        for start, length in phantoms:
            if any(start < end and x < start + length for x, (end, _, is_phantom) in ranges.items() if not is_phantom):
                raise ValueError(f"the phantom at {start:#x} overlaps a live tensor")
            ranges[start] = start + length, f"phantom[{length}]", True
        ordered = sorted(ranges.items())
        self.starts = np.array([start for start, _ in ordered], np.int64)
        # Storages may nest (from_blob). Of those that start at or before an address, the furthest end counts.
        self.ends = np.maximum.accumulate(np.array([end for _, (end, _, _) in ordered], np.int64))
        self.names = [name for _, (_, name, _) in ordered]
        self.phantom = np.array([is_phantom for _, (_, _, is_phantom) in ordered])
        for address, name in pointers.items():
            self.names[self.index(address)] = f"{name} {self.names[self.index(address)]}"

    def index(self, addresses: Any) -> Any:
        """The index of the last range that starts at or before each address. -1 for an address below zero."""
        return np.searchsorted(self.starts, addresses, "right") - 1

    def place(self, address: int) -> str:
        """The byte of the nearest range. It is negative or past the end if the address is in no range."""
        index = max(int(self.index(address)), 0)
        candidates = range(index, min(index + 2, len(self.names)))
        near = min(candidates, key=lambda i: max(int(self.starts[i]) - address, address - int(self.ends[i]) + 1))
        return f"byte {address - int(self.starts[near])} of {self.names[near]}"


def _live_tensors() -> Iterator[torch.Tensor]:
    things = gc.get_objects()
    # By type(): isinstance asks an object for its __class__, and lazy modules and proxies answer with work. All in C,
    # four times as fast as a loop.
    tensors = {each for each in set(map(type, things)) if issubclass(each, torch.Tensor)}
    return compress(things, map(tensors.__contains__, map(type, things)))


class _Programs:
    """A kernel that has a single program for GridExecutor, and runs the programs of the whole grid."""

    def __init__(self, recorder: Recorder, fn: Callable[..., None], grid: Any) -> None:
        self.recorder, self.fn, self.grid = recorder, fn, grid
        self.__signature__ = inspect.signature(fn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fn, name)  # __name__ and __globals__, in which the interpreter patches triton.language

    def __call__(self, **arguments: Any) -> None:
        grid = tuple(self.grid(arguments) if callable(self.grid) else self.grid)
        self.recorder._run(self.fn, (*grid, 1, 1)[:3], arguments)


class Recorder:
    """Records the launches of every ``@triton.jit`` kernel inside a ``with``.

    ``shuffle``: a seed. Programs run in an order drawn from it, which changes results only if programs depend on each
    other.
    ``poison``: the byte that fills masked-off lanes of a load without ``other`` (0xFF: NaN in every float type). A GPU
    leaves these lanes undefined. The interpreter makes them zero, and so does None.
    ``phantom``: (address, bytes) of tensors that do not exist. Loads from them give zero and stores are dropped, and
    both are recorded.
    ``only``: which programs run, a predicate on (x, y, z) or the ids themselves. With ids the grid is never walked, and
    ids outside a launch's grid are skipped.

    Accesses outside all live tensors and phantoms are strays. They are recorded and treated like those of a phantom.
    """

    def __init__(
        self,
        shuffle: int | None = None,
        poison: int | None = 0xFF,
        phantom: Iterable[tuple[int, int]] = (),
        only: Callable[[Program], bool] | Iterable[Program] | None = None,
    ) -> None:
        self.launches: list[Launch] = []
        self._random = None if shuffle is None else random.Random(shuffle)
        self._poison = poison
        self._phantoms = list(phantom)
        self._only = only if only is None or callable(only) else [(*program, 0, 0)[:3] for program in only]
        self._builder = interpreter.interpreter_builder

    def __enter__(self) -> Recorder:
        launch = GridExecutor.__call__

        def launch_recorded(executor: GridExecutor, *arguments: Any, **named: Any) -> None:
            programs = _Programs(self, executor.fn, executor.grid)
            with mock.patch.multiple(executor, fn=programs, grid=(1, 1, 1)):
                launch(executor, *arguments, **named)

        self._patches = ExitStack()
        # A test process has a million objects, and walking them took half of a recorded step. Those of before are
        # walked once: frozen, they are out of gc.get_objects, which each launch asks for the tensors made since.
        self._older = [TensorWeakRef(tensor) for tensor in _live_tensors()]
        gc.freeze()
        self._patches.callback(gc.unfreeze)
        self._patches.enter_context(mock.patch.object(GridExecutor, "__call__", launch_recorded))
        # Unmasked accesses, block pointers and descriptors all call the first two.
        loads_and_stores = {"create_masked_load": self._load, "create_masked_store": self._store}
        atomics = {"create_atomic_rmw": self._atomic_rmw, "create_atomic_cas": self._atomic_cas}
        for name, method in (loads_and_stores | atomics).items():
            self._patches.enter_context(mock.patch.object(self._builder, name, method))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def assert_clean(self) -> None:
        """Raises AssertionError with a list of races, stray accesses and atomics, or if nothing was launched."""
        assert self.launches, "no kernel was launched: is TRITON_INTERPRET=1 set before triton is imported?"
        lines = [line for launch in self.launches for line in launch.races + launch.strays]
        lines += [f"{launch.kernel}: {launch.atomics} atomics" for launch in self.launches if launch.atomics]
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        assert not lines, "\n".join(lines[:SHOWN] + more)

    def _order(self, grid: Program) -> list[Program]:
        if isinstance(self._only, list):
            programs = [x for x in self._only if all(i < n for i, n in zip(x, grid, strict=True))]
        else:
            programs = [x for x in product(*map(range, grid)) if self._only is None or self._only(x)]
        if self._random:
            self._random.shuffle(programs)
        return programs

    def _run(self, fn: Callable[..., None], grid: Program, arguments: dict[str, Any]) -> None:
        tensors = {name: x for name, x in arguments.items() if isinstance(x, tl.tensor) and x.dtype.is_ptr()}
        pointers = {int(x.handle.data[0]): name for name, x in tensors.items()}
        live = [*_live_tensors(), *(tensor for each in self._older if (tensor := each()) is not None)]
        self._kernel, self._memory = fn.__name__, Memory(live, self._phantoms, pointers)
        self._programs = self._order(grid)
        self._loads, self._stores = [np.empty((3, 0), np.int64)], [np.empty((3, 0), np.int64)]
        self._strays: list[str] = []
        self._atomics = 0
        self._builder.set_grid_dim(*grid)
        for position, program in enumerate(self._programs):
            self._position = position
            self._builder.set_grid_idx(*program)
            fn(**arguments)
        sides = [Accesses(*np.concatenate(columns, axis=1)) for columns in (self._loads, self._stores)]
        counts = len(self._programs), *_traffic(*sides), self._atomics
        self.launches.append(Launch(self._kernel, grid, *counts, list(self._races(*sides)), self._strays, *sides))

    def _races(self, loads: Accesses, stores: Accesses) -> Iterator[str]:
        granule = _granule(loads, stores)
        read, first_reader, last_reader = loads.owners(granule)
        written, first_writer, writer = stores.owners(granule)
        _, r, w = np.intersect1d(read, written, assume_unique=True, return_indices=True)
        # Several writers are a race already, so that readers are compared with one writer only.
        reader = np.where(first_reader[r] != writer[w], first_reader[r], last_reader[r])
        written_twice, read_too = ("written", written, first_writer, writer), ("read", written[w], reader, writer[w])
        for verb, granules, one, other in (written_twice, read_too):
            racing = one != other
            addresses = granules[racing] * granule
            # One line for each tensor and pair of programs, with the lowest address.
            rows = np.stack([self._memory.index(addresses), one[racing], other[racing]], 1)
            rows, where, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
            for (_, x, y), address, count in zip(rows, addresses[where], counts, strict=True):
                yield (
                    f"{self._kernel}: {self._memory.place(int(address))} is {verb} by program {self._programs[x]} and "
                    f"written by program {self._programs[y]} ({count * granule} bytes in all)"
                )

    def _reach(self, verb: str, pointers: TensorHandle, mask: Any, size: int) -> tuple[Booleans, Booleans, Integers]:
        """The lanes that are on, those of them whose memory exists, and rows for Accesses. Records the strays."""
        addresses = np.asarray(pointers.data).astype(np.int64)
        on = np.broadcast_to(np.asarray(mask, bool), addresses.shape)
        index = self._memory.index(addresses)
        known = (index >= 0) & (addresses <= self._memory.ends[index] - size)
        if (stray := addresses[on & ~known]).size:
            first, who = int(stray.min()), f"{self._kernel}: program {self._programs[self._position]}"
            what = f"{verb} {stray.size} elements of {size} bytes outside every tensor"
            self._strays.append(f"{who} {what}, the first at {first:#x}, {self._memory.place(first)}")
        rows = np.stack(np.broadcast_arrays(addresses[on], size, self._position))
        return on, on & known & ~self._memory.phantom[index], rows

    def _load(self, pointers: TensorHandle, mask: TensorHandle, other: Any, *rest: Any, **named: Any) -> TensorHandle:
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        on, real, rows = self._reach("loads", pointers, mask.data, dtype.itemsize)
        self._loads.append(rows)
        if other is None and self._poison is not None:
            poison = np.frombuffer(bytes([self._poison]) * dtype.itemsize, dtype)[0]
            other = TensorHandle(np.full(on.shape, poison, dtype), element)
        exists = TensorHandle(real, tl.int1)
        result = InterpreterBuilder.create_masked_load(self._builder, pointers, exists, other, *rest, **named)
        result.data[on & ~real] = 0
        return result

    def _store(self, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any, **named: Any) -> None:
        _, real, rows = self._reach("stores", pointers, mask.data, value.data.itemsize)
        self._stores.append(rows)
        exists = TensorHandle(real, tl.int1)
        InterpreterBuilder.create_masked_store(self._builder, pointers, value, exists, *rest, **named)

    def _atomic_rmw(self, op: Any, pointer: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        on, real, _ = self._reach("atomically changes", pointer, mask.data, value.data.itemsize)
        self._atomics += int(on.sum())
        exists = TensorHandle(real, tl.int1)
        return InterpreterBuilder.create_atomic_rmw(self._builder, op, pointer, value, exists, *rest)

    def _atomic_cas(self, pointer: TensorHandle, old: TensorHandle, new: TensorHandle, *rest: Any) -> TensorHandle:
        on, real, _ = self._reach("atomically changes", pointer, True, new.data.itemsize)
        self._atomics += on.size
        # The interpreter's function has no mask, so it gets only the lanes that exist.
        lanes = [TensorHandle(np.broadcast_to(x.data, on.shape)[real], x.dtype) for x in (pointer, old, new)]
        result = np.zeros(on.shape, old.data.dtype)
        result[real] = InterpreterBuilder.create_atomic_cas(self._builder, *lanes, *rest).data
        return TensorHandle(result, old.dtype.scalar)
