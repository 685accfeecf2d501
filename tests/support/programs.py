"""Runs programs in their own processes: with this checkout, on the CPU, on one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_program(
    *arguments: str, cwd: Path = ROOT, before: Sequence[str] = (), timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python with ``arguments``. ``before``: folders that come before the checkout on the path."""
    paths = os.pathsep.join([*before, str(ROOT), *(path for path in sys.path if path)])
    alone = {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | alone | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def installed(tool: str) -> Path:
    """The folder of a program with a stack of its own (the Makefile's TOOLS). Skips the test where it is missing."""
    folder = ROOT / ".venv" / "tools" / tool
    if not (folder / tool).is_dir():
        pytest.skip(f"{tool} is not in {folder}; make test-all installs it where this Python can run it")
    return folder


def ended_well(found: subprocess.CompletedProcess[str]) -> bool:
    """Whether ranks over gloo succeeded.

    PyTorch's gloo sometimes aborts a process at its end (pytorch/pytorch issue 190489). By then its work is done, and
    the test checks the result.
    """
    return found.returncode == 0 or "terminate called without an active exception" in found.stderr
