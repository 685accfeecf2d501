"""Time on a CPU and on a GPU by one set of functions: contenders take turns, and caches are emptied before each.

A GPU is timed by events on its own clock. It is kept busy while the host enqueues what is measured, so that the host's
time does not count, as it does not in training, where the host runs ahead. The host's time is taken apart from that.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch

# More than any last-level cache of the day has: 50 MB an H100's L2, 256 MB a large server processor's.
FLUSHED_BYTES = 256 * 2**20
# Of the host's time, which a launch that waits, a collection of garbage or another process can double.
HOST_ROUNDS = {"cpu": 1, "cuda": 5}
# Of a GPU that waits for the host to enqueue a step, in seconds; 5,000 launches take about 40 ms.
LONGEST_HEAD_START = 0.1
COPIED_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@cache
def _flush_buffer(device: str) -> torch.Tensor:
    """And, once, a CPU's allocator as any training leaves it. glibc gives freed memory back to the system at once until
    a block of up to 32 MB was freed; temporaries then stop costing page faults (apollo-torch's Mini over LLaMA-60M's
    matrices: 70 ms in a fresh process, 28 ms after)."""
    torch.empty(31 * 2**20, dtype=torch.uint8, device=device)
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


def flush(device: str) -> None:
    """Write more bytes than the caches hold; on a GPU this returns before it is done."""
    _flush_buffer(device).zero_()


class Stopwatch:
    """A timer that is read twice: the first reading starts it and is 0.0, the second is the seconds since.

    What pytest-benchmark takes as ``timer``. Seconds are the device's: between the readings a GPU does what it was
    given, and the second reading waits for it.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device.startswith("cuda")
        self._started: float | torch.cuda.Event | None = None

    def __call__(self) -> float:
        now = self._now()
        if self._started is None:
            self._started = now
            return 0.0
        started, self._started = self._started, None
        if isinstance(now, float):
            assert isinstance(started, float)
            return now - started
        now.synchronize()
        return started.elapsed_time(now) / 1e3  # type: ignore[union-attr,arg-type]

    def reset(self) -> None:
        """Forget a first reading that was never followed by a second."""
        self._started = None

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def head_start(device: str, seconds: float) -> None:
    """Keep a GPU busy for about so long, and return at once: by then the host has enqueued what comes next."""
    if device.startswith("cuda"):
        torch.cuda._sleep(int(seconds * 2e9))  # cycles, of about 2 GHz on GPUs of the day


def host_seconds(run: Callable[[], object], device: str) -> float:
    """Until ``run`` returns, started on an idle device."""
    wait(device)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def seconds(run: Callable[[], object], device: str, ahead: float = 0.0) -> float:
    """One run with cold caches, on the device's clock; ``ahead`` is the host's time, by which a GPU starts later."""
    head_start(device, min(2 * ahead + 5e-4, LONGEST_HEAD_START))
    flush(device)
    stopwatch = Stopwatch(device)
    stopwatch()
    run()
    return stopwatch()


class Times(NamedTuple):
    """Seconds of every contender: on the device in every round, and on the host the median of HOST_ROUNDS."""

    device: dict[str, list[float]]
    host: dict[str, float]


class RunFailed(RuntimeError):
    """The contender ``name`` raised ``error`` while it was timed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name} failed while it was timed: {error}")
        self.name, self.error = name, error


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> Times:
    """Times of every contender, on the device once a round. The order rotates, so that another user of the machine, and
    what a neighbour leaves behind, slow all alike. Raises RunFailed."""
    times = Times({name: [] for name in runs}, {})
    names = list(runs)
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                if turn < 0:
                    each = [host_seconds(runs[name], device) for _ in range(HOST_ROUNDS[device.partition(":")[0]])]
                    times.host[name] = statistics.median(each)
                else:
                    times.device[name].append(seconds(runs[name], device, times.host[name]))
            except Exception as error:
                raise RunFailed(name, error) from error
    return times


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third.

    >>> quartiles([3.0, 1.0, 2.0])
    [1.5, 2.0, 2.5]
    """
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of the two times in that round: what slows a whole round cancels.

    >>> median_ratio([1.0, 10.0, 3.0], [2.0, 20.0, 3.0])
    0.5
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy that is far larger than the caches; on random bits."""
    size = COPIED_BYTES[device.partition(":")[0]] // 2
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randint(-(2**31), 2**31, (size // 8,), dtype=torch.int64, device=device, generator=generator)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 10, device).device["copy"]
    return 2 * source.nbytes / statistics.median(times)


def rounded(value: float, digits: int = 4) -> float:
    """To significant digits: a result file is read by people.

    >>> rounded(0.0123456), rounded(123456.0)
    (0.01235, 123500.0)
    """
    return round(value, digits - 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else value
