"""Many small jobs over the cores of the host, each in a process of its own, so that none can end the others.

A kernel's compiler may crash or hang, and an illegal access makes a process's CUDA device useless. Triton compiles on
one core and keeps the result on disk: what these processes compile, the next ones load.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

import torch

# A server without a CUDA context has imported what jobs need, and forks them. The rehearsal forks from itself. The
# modules that start jobs are not preloaded: a job imports its own again, as the main one.
START_METHOD = "forkserver"
PRELOADED = ["torch._dynamo", "apollo_triton.backends.triton.verbs", "apollo_triton.tools.validate.runs"]
PRELOADED += [f"bench.gpu_check.{name}" for name in ("changes", "races", "shapes")]
LONGEST_JOB = 30.0  # seconds: less than a stage has, or a job that hangs would end it and have no row

Job = TypeVar("Job")


class Done(NamedTuple, Generic[Job]):
    """A job with what it returned, or with why it did not."""

    job: Job
    result: Any
    problem: str = ""


def cores() -> int:
    """How many jobs run at a time: the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(
    function: Callable[[Job], Any], jobs: Iterable[Job], workers: int | None = None, seconds: float = LONGEST_JOB
) -> Iterator[Done[Job]]:
    """``function(job)`` of every job, as each ends. A job that raises, dies, or takes longer than ``seconds`` has a
    ``problem``. Function, jobs and results must be picklable."""
    context: Any = multiprocessing.get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    waiting = list(jobs)[::-1]
    running: dict[Connection, tuple[Job, Any, float]] = {}
    ending = []  # giving back a CUDA context takes a while, in which the next job begins
    try:
        while waiting or running:
            while waiting and len(running) < (workers or cores()):
                job = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, function, job), daemon=True)
                process.start()
                theirs.close()
                running[ours] = job, process, time.monotonic() + seconds
            ready = wait(list(running), timeout=1.0)
            late = [each for each, (_, _, deadline) in running.items() if time.monotonic() > deadline]
            for connection in dict.fromkeys([*ready, *late]):
                assert isinstance(connection, Connection)
                job, process, _ = running.pop(connection)
                ending.append(process)
                yield _done(job, process, connection, seconds)
    finally:
        for _, process, _ in running.values():
            process.kill()
        for process in ending:
            process.join()


def _done(job: Job, process: Any, connection: Connection, seconds: float) -> Done[Job]:
    try:
        if not connection.poll():
            process.kill()
            return Done(job, None, f"it took longer than {seconds:g} seconds")
        return Done(job, *connection.recv())
    except EOFError:  # it ended without a word
        process.join()
        return Done(job, None, f"its process ended with exit code {process.exitcode}")
    finally:
        connection.close()


def _work(connection: Connection, function: Callable[[Job], Any], job: Job) -> None:
    torch.set_num_threads(1)  # there are as many of these as cores
    try:
        outcome = function(job), ""
    except Exception as error:
        outcome = None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    connection.send(outcome)
