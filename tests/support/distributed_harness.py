"""Runs a module-level function on N ranks of a gloo process group, each in its own process, and returns their results.

    results = run(worker, 4, steps=30)          # worker(steps=30) on four ranks; a list in the order of the ranks
    ends = outcomes(worker, 2, timeout=30)      # the same, if a rank is meant to fail or to be killed

Importing torch takes two seconds per process. So each pytest process has one process, the nursery, which imports torch
and the test module once and forks the ranks of each call. The ranks start within milliseconds, share nothing with
earlier calls, and may hang or be killed without harm to later ones. The nursery runs no tensor operation and starts no
thread, so that it can be forked safely. Nothing waits for long: collectives give up after ``patience`` seconds and a
call after ``timeout`` seconds. Once a rank has failed, the others have a few seconds left. A failure names the rank,
the traceback and the output.

The optimizer is ``optimizer_class()``. With ``DISTRIBUTED_STAND_IN=adamw`` it is PyTorch's AdamW, so that everything
except APOLLO can be tested: what still fails then is in the harness or in PyTorch.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds that ranks have left once another one has failed
_nursery: tuple[subprocess.Popen, Connection] | None = None
_log = tempfile.TemporaryFile()  # the nursery's own error output  # noqa: SIM115


class RankFailed(AssertionError):
    """A rank did not return. The message has the tracebacks of all ranks that failed."""


@dataclass
class Outcome:
    """How one rank ended.

    ``value`` is what it returned. If it did not return, ``error`` says why, and ``killed`` whether by a signal that the
    harness did not send. ``output`` is the end of what it printed.
    """

    value: Any = None
    error: str = ""
    killed: bool = False
    output: str = ""


def run(function: Callable[..., Any], world: int, **options: Any) -> list[Any]:
    """What ``function`` returned on each rank. Raises RankFailed with the tracebacks of all ranks that failed."""
    ends = outcomes(function, world, **options)
    failed: dict[str, list[int]] = {}  # most often all ranks fail alike: each text is printed once
    for rank, end in enumerate(ends):
        if end.error:
            failed.setdefault(f"{end.error}\n{end.output}".strip(), []).append(rank)
    if failed:
        texts = [f"ranks {ranks} of {world}: {text}" for text, ranks in failed.items()]
        raise RankFailed("\n".join([f"{function.__name__} failed", *texts]))
    return [end.value for end in ends]


def outcomes(
    function: Callable[..., Any], world: int, timeout: float = 120.0, patience: float = 40.0, **arguments: Any
) -> list[Outcome]:
    """How ``function(**arguments)`` ended on each rank. ``patience``: seconds until a collective gives up."""
    global _nursery
    for _ in range(2):  # a nursery that has ended is replaced once
        if _nursery is None:
            _nursery = _start()
        pipe = _nursery[1]
        request = (function.__code__.co_filename, function.__name__, arguments, world, timeout, patience)
        try:
            pipe.send_bytes(pickle.dumps(request))
            if pipe.poll(timeout + GRACE + 60):
                return pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            pass
        _stop()
    _log.seek(0)
    complaints = _log.read().decode(errors="replace")[-3000:]
    raise RankFailed(f"{function.__name__}: the process that forks the ranks died or hung\n{complaints}")


def _start() -> tuple[subprocess.Popen, Connection]:
    ours, theirs = Pipe()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if Path("/sys/class/net/lo").exists():
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may not resolve
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=_log,
    )
    theirs.close()
    return process, ours


@atexit.register
def _stop() -> None:
    global _nursery
    if _nursery is not None:
        process, pipe = _nursery
        pipe.close()
        process.kill()
        process.wait()
    _nursery = None


# ---- in the nursery and in its ranks


def _serve(pipe: Connection) -> None:
    """Answer requests until pytest has ended."""
    while True:
        try:
            path, name, arguments, world, timeout, patience = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            function = getattr(_module(path), name)
        except BaseException:  # pytest's Skipped is not an Exception
            ends = [Outcome(error=traceback.format_exc())] * world
        else:
            with tempfile.TemporaryDirectory() as folder:
                ends = _call(function, arguments, world, timeout, patience, Path(folder))
        pipe.send_bytes(pickle.dumps(ends))


def _module(path: str) -> Any:
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    if "transformers" in sys.modules:  # which imports a model when it is made: 1.4 seconds, in each rank
        importlib.import_module("transformers.models.llama.modeling_llama")
    return sys.modules[name]


def _call(function: Any, arguments: Any, world: int, timeout: float, patience: float, folder: Path) -> list[Outcome]:
    """Fork the ranks, wait for their outcomes, and end all of them together.

    A rank that ended early would close connections from which others may still read.
    """
    processes: dict[Connection, tuple[int, int]] = {}
    for rank in range(world):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            _rank(function, arguments, rank, world, timeout, patience, folder, Connection(writing, readable=False))
        os.close(writing)
        processes[Connection(reading, writable=False)] = (rank, process)
    ends: dict[int, Outcome] = {}
    waiting = dict(processes)
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            rank, process = waiting.pop(pipe)
            try:
                ends[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ends[rank] = Outcome(error="died without an error, as if killed", killed=True)
            if ends[rank].error:
                deadline = min(deadline, time.monotonic() + max(GRACE, patience if ends[rank].killed else 0))
    for rank, process in waiting.values():
        ends[rank] = Outcome(error="still running when the time was up; its traceback is below")
        os.kill(process, signal.SIGUSR1)  # faulthandler writes the traceback
    if waiting:
        time.sleep(0.5)
    for pipe, (rank, process) in processes.items():
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        pipe.close()
        if ends[rank].error:
            ends[rank].output = (folder / f"output{rank}").read_text(errors="replace")[-3000:]
    return [ends[rank] for rank in range(world)]


def _rank(
    function: Any,
    arguments: Any,
    rank: int,
    world: int,
    timeout: float,
    patience: float,
    folder: Path,
    pipe: Connection,
) -> None:
    """Run one rank. It does not return."""
    signal.alarm(int(timeout) + 60)  # ends this rank if the nursery dies
    output = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    faulthandler.enable(file=2, all_threads=True)  # a crash in native code shows where each thread was
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        limit = timedelta(seconds=patience)
        dist.distributed_c10d.default_pg_timeout = limit  # also for groups that meshes make
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        dist.init_process_group("gloo", f"file://{folder}/store", timeout=limit, rank=rank, world_size=world)
        answer = pickle.dumps(Outcome(function(**arguments)))
    except BaseException:
        answer = pickle.dumps(Outcome(error=traceback.format_exc()))
    pipe.send_bytes(answer)
    while True:
        signal.pause()


# ---- shared by the tests of sharding, in pytest and on the ranks


def optimizer_class() -> Any:
    import torch

    import apollo_triton

    if os.environ.get("DISTRIBUTED_STAND_IN") != "adamw":
        return apollo_triton.APOLLOAdamW

    class StandIn(torch.optim.AdamW):
        """PyTorch's AdamW with the arguments of our constructor. It ignores group keys that it does not know."""

        gradient_norm = None
        skipped_updates = 0

        def __init__(self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), **options: Any) -> None:
            super().__init__(params, lr, betas, weight_decay=options.get("weight_decay", 0.0), foreach=False)

    return StandIn


if __name__ == "__main__":
    import distributed_harness  # by the name that pytest uses, so that pytest can unpickle outcomes
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.optim
    import torch.distributed.tensor.debug
    import torch.distributed.tensor.parallel  # noqa: F401

    # What is loaded when it is first used: here, and not in each rank.
    from apollo_triton import *  # noqa: F403

    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401

    distributed_harness._serve(Connection(int(sys.argv[1])))
