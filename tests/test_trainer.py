"""Hugging Face's Trainer as it is: by the string apollo_adamw, and given the optimizer itself (trainer_program.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    return subprocess.run(
        [sys.executable, "-m", "apollo_triton.compat", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "program", ["by_its_string", "resumed", "layer_by_layer", "directly", "accumulated_in_bfloat16"]
)
def test_a_trainer_that_nothing_patches(program: str, tmp_path: Path) -> None:
    found = run("tests/trainer_program.py", program, str(tmp_path))
    assert found.returncode == 0, found.stderr[-4000:]


def test_two_processes_of_torchrun_inherit_the_stand_in(tmp_path: Path) -> None:
    """DDP: torchrun starts the processes, which no call of ours prepares."""
    command = ["torchrun", "--standalone", "--nproc-per-node", "2", "tests/trainer_program.py", "by_its_string"]
    found = run(*command, str(tmp_path))
    aborted = "terminate called without an active exception" in found.stderr  # gloo's own (test_examples.py)
    assert found.returncode == 0 or aborted, found.stderr[-4000:]
    assert found.stdout.count("'train_loss'") == 1, found.stdout  # the first of two speaks
