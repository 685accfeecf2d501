"""What an optimizer's step needs besides time: launches, and memory above weights, gradients and state."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .clock import wait

_COPIES = ("Memcpy", "Memset")
_MARK = "the step that counts"


def launches(step: Callable[[], object], device: str) -> int | None:
    """How many kernels a step launches on a GPU, by PyTorch's profiler. None on a CPU, which launches none."""
    if not device.startswith("cuda"):
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        wait(device)
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # torch.optim labels each step, and the label is mirrored to the device. It is no launch.
    return sum(not event.name.startswith(_COPIES) and not event.is_user_annotation for event in on_device)


class Extra:
    """The peak of memory while ``measured`` runs, above what was allocated when this object was made.

    A GPU's allocator counts it. On a CPU the profiler lists every allocation made inside ``profiled``, so that what an
    optimizer keeps beside its state counts too.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._profiler: Any = None
        self._peak = 0
        if device.startswith("cuda"):
            gc.collect()
            wait(device)
            self._before = torch.cuda.memory_allocated(device)

    @contextlib.contextmanager
    def profiled(self) -> Iterator[None]:
        """A ``with`` for making the optimizer and its first step."""
        if self._device.startswith("cuda"):
            yield
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as self._profiler:
            yield

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """A ``with`` for the step that counts, inside ``profiled``."""
        if self._device.startswith("cuda"):
            wait(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            wait(self._device)
            self._peak = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            with record_function(_MARK):
                yield

    @property
    def peak(self) -> int:
        """The peak in bytes, including the state."""
        if self._profiler is None:
            return self._peak
        events = self._profiler.profiler.kineto_results.events()
        started = min(event.start_ns() for event in events if event.name() == _MARK)
        allocations = (event for event in events if event.name() == "[memory]")
        memory = sorted(allocations, key=lambda event: event.start_ns())
        before = sum(event.nbytes() for event in memory if event.start_ns() < started)
        during = (event.nbytes() for event in memory if event.start_ns() >= started)
        return max(itertools.accumulate(during, initial=before))
