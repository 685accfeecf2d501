"""The examples run as a reader would run them, in processes of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from distributed_cases import needs_fsdp_on_a_cpu
from programs import ended_well, run_program

pytest.importorskip("transformers")

SIZES = {"hidden": 24, "layers": 1, "length": 16, "batch": 6, "rank": 4, "schedule": 12, "report": 1}


def pretrain(ranks: int, folder: Path, *options: str) -> tuple[int, str]:
    """The exit status and the output of ``torchrun examples/fsdp2_pretrain.py``."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    small = [f"--{name}={value}" for name, value in SIZES.items()]
    example = ["examples/fsdp2_pretrain.py", "--folder", str(folder), *small, *options]
    found = run_program(*torchrun, *example, timeout=200)
    return 0 if ended_well(found) else found.returncode, found.stdout + found.stderr


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step +(\d+) +loss ([\d.]+)$", output, re.MULTILINE)}


@needs_fsdp_on_a_cpu
def test_pretraining_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Batches that depend on the number of ranks, a learning rate or a state that starts anew, a torso of a save taken
    for a checkpoint."""
    status, whole = pretrain(1, tmp_path / "whole", "--steps", "8")
    assert status == 0, whole
    folder = tmp_path / "parts"
    status, first = pretrain(2, folder, "--steps", "4")
    assert status == 0, first
    (folder / "unfinished").mkdir()  # as a save leaves it whose process was killed
    (folder / "unfinished" / "__0_0.distcp").write_bytes(b"torso")
    status, second = pretrain(3, folder, "--steps", "8")
    assert status == 0, second
    expected, found = losses(whole), losses(first) | losses(second)
    assert sorted(losses(second)) == [5, 6, 7, 8], second
    assert sorted(found) == sorted(expected) == list(range(1, 9))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=2e-4), f"step {step}"
    assert expected[8] < expected[1] - 0.3, "it does not learn"
    assert [path.name for path in folder.iterdir()] == ["step-8"]


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    """Ranks with unequal shares, whose mean of means is another loss."""
    status, output = pretrain(2, tmp_path, "--batch", "3")
    assert status != 0
    assert "--batch 3 cannot be shared by 2 ranks" in output
    assert not list(tmp_path.iterdir())
