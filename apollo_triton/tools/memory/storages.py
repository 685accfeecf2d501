"""Every storage that is alive while a program runs, by the part of a training that it belongs to.

The same mode follows real tensors, fake ones and those of the meta device, so a prediction without memory and a run
that allocates are counted by one piece of code.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...core.dtensors import local
from ...int8.weight import Int8Weight

ALLOCATION = 512  # bytes: CUDA's caching allocator rounds every request up to a multiple


@dataclass(eq=False)
class _Label:
    part: str


class _Allocation(NamedTuple):
    size: int
    label: _Label  # one object for the life of a storage, so that a late mark counts at the peak too


Moments = list[list[_Allocation]]


def by_part(allocations: Iterable[_Allocation]) -> dict[str, int]:
    """The bytes of each part that has any."""
    sizes: Counter[str] = Counter()
    for allocation in allocations:
        sizes[allocation.label.part] += allocation.size
    return {part: size for part, size in sizes.items() if size}


class Storages(TorchDispatchMode):
    """Follows every storage that is made, resized and freed while the mode is on.

    ``part`` is that of what is made from now on; ``mark`` says of tensors that they belong to another one. It may come
    late: what is marked counts in its last part at every moment that it was alive.
    ``torch.distributed._tools.mem_tracker`` finds the same totals. This class keeps the list of storages at the peak.

    ``rounding``: each storage takes a multiple of so many bytes.

    >>> with Storages("made") as storages:
    ...     kept = torch.ones(1024)
    ...     _ = kept + 1  # freed at once
    >>> storages.parts_at_peak()
    {'made': 8192}
    """

    def __init__(self, part: str, rounding: int = ALLOCATION) -> None:
        super().__init__()
        self.part = part
        self._rounding = rounding
        self._alive: dict[int, _Allocation] = {}  # by address, which a storage keeps until it is freed
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._ignored: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._at_peak: list[_Allocation] = []
        self._size = self._peak_size = 0
        self._moments: Moments | None = None
        self._has_grown = False
        self._pauses = 0
        self._mode: Any = None

    def __enter__(self) -> Storages:
        self._mode = active_fake_mode()
        self._resize = resize = torch.UntypedStorage.resize_  # which no dispatch mode sees

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            self._resized(storage, size)
            return resize(storage, size)

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    @property
    def size(self) -> int:
        """The bytes that are alive now."""
        return self._size

    def parts_at_peak(self) -> dict[str, int]:
        """The bytes of each part when there were most in all, without parts that had none."""
        self._note_peak()
        return by_part(self._at_peak)

    def forget_peak(self) -> None:
        """The peak is to be found among what comes now, with all that is alive."""
        self._peak_size, self._at_peak = 0, []

    def keep_moments(self) -> Moments:
        """From here on, keep what is alive whenever something is about to be freed, in the list that is returned."""
        self._note_peak()
        self._moments = []
        return self._moments

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """What is made within this context belongs to ``part``."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made within this context is not followed, unless it is watched later."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these tensors' memory."""
        for storage in (storage for tensor in tensors for storage in storages_of(tensor)):
            address = storage._cdata  # another storage may have it, once this one is freed
            self._ignored[address] = weakref.ref(storage, lambda _, address=address: self._ignored.pop(address))

    def mark(self, tensors: Iterable[Tensor], part: str) -> None:
        """These tensors' memory belongs to ``part``, whenever it was made."""
        for tensor in tensors:
            for storage in storages_of(tensor):
                self._watch(storage)
                if (allocation := self._alive.get(storage._cdata)) is not None:
                    allocation.label.part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(_is_wrapper(kind) for kind in types):
            return NotImplemented  # it calls again with its parts
        result = self.call(func, args, kwargs or {})
        # DTensor finds out shapes by calls in a fake mode of its own, which allocate nothing. None: an update in real
        # or meta tensors amid a fake mode.
        if not self._pauses and active_fake_mode() in (self._mode, None):
            self.seen(func, args, kwargs or {}, result)
            for value in tree_leaves(result):
                if isinstance(value, Tensor) and not _is_wrapper(type(value)):
                    self._watch(value.untyped_storage())
        return result

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation. A subclass may run it elsewhere."""
        return func(*args, **kwargs)

    def counts(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage is on the device that is followed. A subclass may leave others out."""
        return True

    def seen(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operation has run, whose results are not watched yet. A subclass may mark what it knows by it."""

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._ignored or address in self._alive or not self.counts(storage):
            return
        self._alive[address] = _Allocation(self._rounded(storage.nbytes()), _Label(self.part))
        self._size += self._alive[address].size
        self._has_grown = True
        self._watched[address] = weakref.ref(storage, lambda _: self._freed(address))

    def _rounded(self, size: int) -> int:
        return -(-size // self._rounding) * self._rounding

    def _note_peak(self) -> None:
        """Called before anything gets smaller, since most are alive then."""
        if self._has_grown and self._moments is not None:
            self._moments.append(list(self._alive.values()))
        self._has_grown = False
        if self._size > self._peak_size:
            self._peak_size, self._at_peak = self._size, list(self._alive.values())

    def _freed(self, address: int) -> None:
        self._note_peak()
        del self._watched[address]
        self._size -= self._alive.pop(address).size

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        allocation = self._alive.get(storage._cdata)
        if allocation is not None:
            self._note_peak()
            self._size += self._rounded(size) - allocation.size
            self._has_grown = True
            self._alive[storage._cdata] = _Allocation(self._rounded(size), allocation.label)


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages of a plain, sharded or int8 tensor on this rank."""
    here: Any = local(tensor)
    parts = (here.q, here.scale, here.zero) if isinstance(here, Int8Weight) else (here,)
    return [part.untyped_storage() for part in parts]


def _is_wrapper(kind: type) -> bool:
    """Whether tensors of a class hold other tensors, as ``DTensor`` does."""
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor)
