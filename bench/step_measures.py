"""What one step of an optimizer takes besides time: launches, and memory above weights, gradients and state."""

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
    """How many kernels a step starts on a GPU, by PyTorch's profiler; None on a CPU, where there is no such thing."""
    if not device.startswith("cuda"):
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        wait(device)
    on_device = [each for each in profiler.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    # torch.optim's own label on a step is mirrored to the device, and is no launch.
    return sum(not each.name.startswith(_COPIES) and not each.is_user_annotation for each in on_device)


class Extra:
    """Peak bytes, above what was allocated when this was made, while ``measured`` runs.

    A GPU's allocator counts them. On a CPU the profiler lists every allocation of everything run by ``profiled``, so
    what an optimizer keeps beside its state counts too.
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
        """Around the making of the optimizer and its first step."""
        if self._device.startswith("cuda"):
            yield
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as self._profiler:
            yield

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Around the step that counts, inside of ``profiled``."""
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
        """In bytes, state included."""
        if self._profiler is None:
            return self._peak
        events = self._profiler.profiler.kineto_results.events()
        started = min(event.start_ns() for event in events if event.name() == _MARK)
        memory = sorted((each for each in events if each.name() == "[memory]"), key=lambda each: each.start_ns())
        before = sum(each.nbytes() for each in memory if each.start_ns() < started)
        during = (each.nbytes() for each in memory if each.start_ns() >= started)
        return max(itertools.accumulate(during, initial=before))
