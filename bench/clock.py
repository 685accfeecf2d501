"""Timing on a CPU and on a GPU by the same functions. Contenders take turns, and caches are emptied before each run.

A GPU is timed by events on its own clock. It is kept busy while the host enqueues the measured step, so that the host's
time does not count. Nor does it count in training, where the host runs ahead of the GPU. The host's time is measured
separately.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch

# More than last-level caches of today hold: 50 MB the L2 of an H100, 256 MB that of a large server processor.
FLUSHED_BYTES = 256 * 2**20
# How often the host's time is measured: a waiting launch, garbage collection or another process can double it.
HOST_ROUNDS = {"cpu": 1, "cuda": 5}
# The longest time in seconds that a GPU waits for the host to enqueue a step. 5,000 launches take about 40 ms.
LONGEST_HEAD_START = 0.1
COPIED_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}


def wait(device: str) -> None:
    """Wait until the device has done all of its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@cache
def _flush_buffer(device: str) -> torch.Tensor:
    """The memory that ``flush`` writes. Making it also brings a CPU's allocator into the state that training leaves.

    glibc returns freed memory to the system at once until a block of up to 32 MB has been freed. After that temporaries
    cost no page faults (apollo-torch's Mini over LLaMA-60M's matrices: 70 ms in a fresh process, 28 ms after).
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device=device)
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


def flush(device: str) -> None:
    """Write more bytes than the caches hold. On a GPU this returns before the writing is done."""
    _flush_buffer(device).zero_()


class Stopwatch:
    """A timer that is read twice: the first reading starts it and is 0.0, the second is the seconds since the first.

    pytest-benchmark takes it as ``timer``. The seconds are the device's. The second reading waits until a GPU has done
    the work that it was given between the two readings.
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
        """Forget a first reading that no second reading followed."""
        self._started = None

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def head_start(device: str, seconds: float) -> None:
    """Keep a GPU busy for about so many seconds, in which the host enqueues what comes next. Returns at once."""
    if device.startswith("cuda"):
        torch.cuda._sleep(int(seconds * 2e9))  # cycles: GPUs of today run at about 2 GHz


def host_seconds(run: Callable[[], object], device: str) -> float:
    """The host's time from the start of ``run`` on an idle device until it returns."""
    wait(device)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def seconds(run: Callable[[], object], device: str, ahead: float = 0.0) -> float:
    """The device's time of one run with cold caches. ``ahead``: the host's time, by which a GPU starts later."""
    head_start(device, min(2 * ahead + 5e-4, LONGEST_HEAD_START))
    flush(device)
    stopwatch = Stopwatch(device)
    stopwatch()
    run()
    return stopwatch()


class Times(NamedTuple):
    """Seconds of every contender: on the device one figure a round, on the host the median of HOST_ROUNDS."""

    device: dict[str, list[float]]
    host: dict[str, float]


class RunFailed(RuntimeError):
    """The contender ``name`` raised ``error`` while it was timed."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"{name} failed while it was timed: {error}")
        self.name, self.error = name, error


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> Times:
    """Times of every contender, on the device once a round. Raises RunFailed.

    The order rotates, so that another user of the machine slows all contenders alike, and so does the state in which
    the previous contender leaves the device.
    """
    times = Times({name: [] for name in runs}, {})
    names = list(runs)
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            try:
                if turn < 0:
                    on_host = [host_seconds(runs[name], device) for _ in range(HOST_ROUNDS[device.partition(":")[0]])]
                    times.host[name] = statistics.median(on_host)
                else:
                    times.device[name].append(seconds(runs[name], device, times.host[name]))
            except Exception as error:
                raise RunFailed(name, error) from error
    return times


def quartiles(values: list[float]) -> list[float]:
    """The first quartile, the median and the third quartile.

    >>> quartiles([3.0, 1.0, 2.0])
    [1.5, 2.0, 2.5]
    """
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of the ratio of both times in that round. What slows a whole round cancels.

    >>> median_ratio([1.0, 10.0, 3.0], [2.0, 20.0, 3.0])
    0.5
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of random bits that is far larger than the caches."""
    size = COPIED_BYTES[device.partition(":")[0]] // 2
    generator = torch.Generator(device).manual_seed(0)
    source = torch.randint(-(2**31), 2**31, (size // 8,), dtype=torch.int64, device=device, generator=generator)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, 10, device).device["copy"]
    return 2 * source.nbytes / statistics.median(times)


def rounded(value: float, digits: int = 4) -> float:
    """The value with few significant digits, because people read the results files.

    >>> rounded(0.0123456), rounded(123456.0)
    (0.01235, 123500.0)
    """
    return round(value, digits - 1 - math.floor(math.log10(abs(value)))) if value and math.isfinite(value) else value
