"""Hugging Face's Trainer as it is: by the string apollo_adamw, and given the optimizer itself (trainer_program.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_cases import needs_fsdp_on_a_cpu
from programs import ended_well, run_program

from apollo_triton import cli

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


FAST = "by_its_string"
REPETITIONS = (
    "resumed",
    "layer_by_layer",
    "directly",
    "attached",
    "accumulated_in_bfloat16",
    "compiled",
    "as_transformers_tests_it",
)


@pytest.mark.slow
@pytest.mark.parametrize("program", [FAST, *(pytest.param(each, marks=pytest.mark.full) for each in REPETITIONS)])
def test_a_trainer_that_nothing_patches(program: str, tmp_path: Path) -> None:
    found = run_program("-m", "apollo_triton.compat", "tests/support/trainer_program.py", program, str(tmp_path))
    assert found.returncode == 0, found.stderr[-4000:]


@pytest.mark.full
def test_a_converted_checkpoint_goes_on_as_with_apollo_torch(tmp_path: Path) -> None:
    """Groups of another order, a schedule that begins again, files that the Trainer misses in the new folder."""
    pytest.importorskip("apollo_torch")
    program = "tests/support/trainer_program.py"
    found = run_program(program, "of_apollo_torch", str(tmp_path))
    assert found.returncode == 0, found.stderr[-4000:]
    assert cli.main(["convert", str(tmp_path / "checkpoint-4"), str(tmp_path / "converted")]) == 0
    found = run_program("-m", "apollo_triton.compat", program, "converted", str(tmp_path))
    assert found.returncode == 0, found.stderr[-4000:]


def two_processes(program: str, folder: Path) -> str:
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "2"]
    found = run_program(
        "-m", "apollo_triton.compat", *torchrun, "tests/support/trainer_program.py", program, str(folder)
    )
    assert ended_well(found), found.stderr[-4000:]
    return found.stdout


@pytest.mark.full
def test_two_processes_of_torchrun_inherit_the_stand_in(tmp_path: Path) -> None:
    """DDP: torchrun starts the processes, which no call of ours prepares."""
    assert two_processes("by_its_string", tmp_path).count("'train_loss'") == 1  # the first of two speaks


@pytest.mark.full
@needs_fsdp_on_a_cpu
def test_fsdp2_through_accelerate(tmp_path: Path) -> None:
    """The optimizer is made of whole weights, and Accelerate puts the sharded ones into its groups."""
    assert "sharded and resumed" in two_processes("sharded", tmp_path)


@pytest.mark.full
@needs_fsdp_on_a_cpu
def test_every_saving_under_fsdp2_through_accelerate(tmp_path: Path) -> None:
    """Accelerate finds weights by their addresses, sends them from the first rank part by part, and saves them; the
    callback's hooks are on the sharded weights."""
    pytest.importorskip("bitsandbytes")
    assert "saved memory and resumed" in two_processes("sharded_savings", tmp_path)
