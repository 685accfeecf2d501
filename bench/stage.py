"""A stage of the benchmarks: a program of its own, with a time limit, that keeps what it has measured so far."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from .results_file import ROOT

GPU_SECONDS = 8 * 60
CPU_SECONDS = 45 * 60
DONE, FAILED, CUT_OFF = "done", "failed", "cut off"


@dataclass(frozen=True)
class Stage:
    """``python -m bench.<module> <arguments>``. ``resumes``: it keeps rows of an earlier run, unless given --fresh."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    seconds: float = CPU_SECONDS
    resumes: bool = True


def run(stage: Stage, fresh: bool) -> str:
    """Run a stage until it ends or reaches its time limit. Returns DONE, FAILED or CUT_OFF."""
    command = [sys.executable, "-m", f"bench.{stage.module}", *stage.arguments]
    print(f"\n== {stage.name}: python {' '.join(command[1:])}", flush=True)
    command += ["--fresh"] if fresh and stage.resumes else []
    started = time.perf_counter()
    outcome, problem = DONE, ""
    # The libraries print many warnings, which matter only if the stage fails.
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stderr=errors, start_new_session=True)
        try:
            if process.wait(stage.seconds):
                outcome, problem = FAILED, f"it failed (exit code {process.returncode})"
        except subprocess.TimeoutExpired:
            outcome, problem = CUT_OFF, f"it was stopped after {_limit(stage.seconds)}"
        finally:
            if process.poll() is None:  # together with its workers, which would keep running
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if problem:
            errors.seek(0)
            print("".join(errors.readlines()[-5:]), end="")
            print(f"-- {stage.name}: {problem}; its rows so far are kept", flush=True)
    print(f"-- {time.perf_counter() - started:.0f} s", flush=True)
    return outcome


def _limit(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
