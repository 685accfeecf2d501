"""Stops the making of a model that would take too many Python objects, too much memory or too long.

On the meta device weights take no memory, but modules, lists and names do, and a config may ask for any number of them.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.nn.modules import module

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MOST_MODULES = 500_000  # modules and parameters; DeepSeek-V3 as one module an expert has 130,000
MOST_BYTES = 4 << 30
MOST_SECONDS = 120  # a thousand layers of GPT-2, 13,000 modules, take 8


class TooLarge(ValueError):
    """What a bound has stopped."""


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Raise TooLarge, which begins with ``what``, if the block passes a bound.

    Modules are counted everywhere. Memory and time are watched in the main thread of a POSIX system, where no other
    alarm is set.
    """
    thread, made = threading.get_ident(), 0

    def count(owner: Any, name: str, part: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > MOST_MODULES and threading.get_ident() == thread:
            raise TooLarge(f"{what} has more than {MOST_MODULES:,} modules and weights: look at its counts")

    hooks = [
        module.register_module_module_registration_hook(count),
        module.register_module_parameter_registration_hook(count),
    ]
    stop = _watch(what)
    try:
        yield
    finally:
        stop()
        for hook in hooks:
            hook.remove()


def _watch(what: str) -> Callable[[], None]:
    """Look at memory and time ten times a second. Returns what ends it."""
    usable = resource is not None and threading.current_thread() is threading.main_thread()
    if not usable or signal.getitimer(signal.ITIMER_REAL)[0] or signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        return lambda: None
    before, start = _bytes(), time.monotonic()

    def look(*_: Any) -> None:
        if _bytes() - before > MOST_BYTES:
            raise TooLarge(f"{what} takes more than {MOST_BYTES} bytes to build: look at its counts")
        if time.monotonic() - start > MOST_SECONDS:
            raise TooLarge(f"{what} takes more than {MOST_SECONDS} seconds to build: look at its counts")

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)

    def stop() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    return stop


def _bytes() -> int:
    """The memory of this process: what it has where Linux says so, else the most that it has had."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
