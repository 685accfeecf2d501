"""examples/fsdp2_pretrain.py: on one rank in this process, and under torchrun as a reader would run it."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_cases import needs_fsdp_on_a_cpu
from programs import ROOT, ended_well, run_program
from recipe_cases import Run
from torch.testing._internal.distributed.fake_pg import FakeStore

pytest.importorskip("transformers")

SIZES = {"hidden": 24, "layers": 1, "length": 16, "batch": 6, "rank": 4, "schedule": 12, "report": 1}


SMALL = [f"--{name}={value}" for name, value in SIZES.items()]


def pretrain(ranks: int, *options: str) -> str:
    """What ``torchrun examples/fsdp2_pretrain.py`` prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    found = run_program(*torchrun, "examples/fsdp2_pretrain.py", *SMALL, *options, timeout=200)
    output = found.stdout + found.stderr
    assert ended_well(found), output
    return output


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the one rank that torchrun would start."""
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step +(\d+) +loss ([\d.]+)$", output, re.MULTILINE)}


# Wide enough for groups of 128 codes, and a batch that four ranks can share.
ALL_SAVINGS = ("--layerwise", "--int8", "--state-bits=8", "--hidden=64", "--batch=12")


@needs_fsdp_on_a_cpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "savings"),
    [
        ((1, 1, 1), ()),
        pytest.param((1, 2, 3), (), marks=pytest.mark.full),
        pytest.param((1, 2, 4), ALL_SAVINGS, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_pretraining_goes_on_on_another_number_of_ranks(
    ranks: tuple[int, int, int], savings: tuple[str, ...], tmp_path: Path, run: Run, alone: None
) -> None:
    """Batches that depend on the number of ranks, a learning rate or a state that starts anew, a torso of a save taken
    for a checkpoint; codes or moments that another number of ranks reads otherwise."""

    def train(on: int, *options: str) -> str:
        options = (*options, *savings)
        return run(*SMALL, *options, name="fsdp2_pretrain") if ranks == (1, 1, 1) else pretrain(on, *options)

    folder = tmp_path / "parts"
    whole = train(ranks[0], f"--folder={tmp_path / 'whole'}", "--steps=8")
    first = train(ranks[1], f"--folder={folder}", "--steps=4")
    (folder / "unfinished").mkdir()  # as a save leaves it whose process was killed
    (folder / "unfinished" / "__0_0.distcp").write_bytes(b"torso")
    second = train(ranks[2], f"--folder={folder}", "--steps=8")
    expected, found = losses(whole), losses(first) | losses(second)
    assert sorted(losses(second)) == [5, 6, 7, 8], second
    assert sorted(found) == sorted(expected) == list(range(1, 9))
    for step, loss in expected.items():
        # A gradient that rounds otherwise flips codes and so a few draws of stochastic rounding.
        assert found[step] == pytest.approx(loss, abs=5e-3 if savings else 2e-4), f"step {step}"
    assert expected[8] < expected[1] - 0.3, "it does not learn"
    assert [path.name for path in folder.iterdir()] == ["step-8"]


def test_ranks_share_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that two ranks have, or none; batches that depend on the number of ranks."""
    example = runpy.run_path(str(ROOT / "examples" / "fsdp2_pretrain.py"))
    monkeypatch.setattr(sys, "argv", ["fsdp2_pretrain.py", "--folder=run", *SMALL])
    options = example["parse_options"]()

    def first_batch(rank: int, ranks: int) -> torch.Tensor:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            step, tokens = next(example["batches"](options, 0, torch.device("cpu")))
        finally:
            dist.destroy_process_group()
        assert step == 1
        return tokens

    whole = first_batch(0, 1)
    assert whole.shape == (SIZES["batch"], SIZES["length"])
    assert whole.unique(dim=0).shape == whole.shape
    for ranks in (2, 3):
        for rank in range(ranks):
            assert torch.equal(first_batch(rank, ranks), whole[rank::ranks])


def test_a_batch_that_the_ranks_cannot_share_is_refused(
    tmp_path: Path, run: Run, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks with unequal shares, whose mean of means is another loss."""
    begin = dist.init_process_group
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend: begin("fake", rank=0, world_size=2, store=FakeStore())
    )
    try:
        with pytest.raises(SystemExit, match="--batch 3 cannot be shared by 2 ranks"):
            run(*SMALL, f"--folder={tmp_path / 'run'}", "--batch=3", name="fsdp2_pretrain")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "run").exists()
