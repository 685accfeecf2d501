"""The small examples on other people's loops: plain, Accelerate, PyTorch Lightning. Each learns, and each goes on from
its checkpoint as if it had never stopped."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate_states import forget_accelerate
from programs import ROOT, ended_well, run_program

pytest.importorskip("transformers")

Run = Callable[..., dict[int, float]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run an example in this process, in a folder of its own; the losses that it printed."""
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Accelerate leaves its settings there
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def run_example(name: str, *options: str) -> dict[int, float]:
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        forget_accelerate()
        found = re.findall(r"^step +(\d+) +loss ([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
        return {int(step): float(loss) for step, loss in found}

    monkeypatch.chdir(tmp_path)
    yield run_example
    forget_accelerate()


def same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_plain_loop(run: Run) -> None:
    """A part of the state that is not saved, batches that are seen twice, a schedule that starts again."""
    whole = run("plain_loop", "--steps=20", "--checkpoint=whole.pt")
    first = run("plain_loop", "--steps=10", "--checkpoint=parts.pt")
    second = run("plain_loop", "--steps=20", "--checkpoint=parts.pt")
    assert first | second == whole
    assert list(second) == [20]
    assert whole[20] < 5  # ln 256 is 5.5
    saved = [torch.load(name, weights_only=True) for name in ("whole.pt", "parts.pt")]
    assert same_weights(saved[0]["model"], saved[1]["model"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_plain_loop_with_updates_in_the_backward_pass(run: Run) -> None:
    """Two updates a step, or a step that moves what hooks have moved."""
    run("plain_loop", "--steps=6", "--checkpoint=backward.pt", "--in-backward")
    run("plain_loop", "--steps=6", "--checkpoint=step.pt", "--accumulate=1")
    # --accumulate quietly became 1 there.
    run("plain_loop", "--steps=3", "--checkpoint=backward3.pt", "--in-backward", "--accumulate=3")
    run("plain_loop", "--steps=3", "--checkpoint=step3.pt", "--accumulate=3")
    for one, other in (("backward", "step"), ("backward3", "step3")):
        saved = [torch.load(f"{name}.pt", weights_only=True)["model"] for name in (one, other)]
        assert same_weights(*saved)
    assert not same_weights(saved[1], torch.load("step.pt", weights_only=True)["model"])


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_accelerate_loop(run: Run) -> None:
    """An optimizer, a scheduler or a place in the data that Accelerate does not bring back."""
    pytest.importorskip("accelerate")
    from safetensors.torch import load_file

    whole = run("accelerate_loop", "--steps=20", "--folder=whole")
    first = run("accelerate_loop", "--steps=10", "--folder=parts")
    second = run("accelerate_loop", "--steps=20", "--folder=parts")
    assert first | second == whole
    assert whole[20] < 5
    assert same_weights(*(load_file(f"{name}/model.safetensors") for name in ("whole", "parts")))


@pytest.mark.full
def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    """An optimizer that Accelerate cannot prepare for DDP, or a second process that is not one of two."""
    pytest.importorskip("accelerate")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    example = [str(ROOT / "examples" / "accelerate_loop.py"), "--steps=20", "--precision=no"]
    found = run_program(*launch, *example, cwd=tmp_path, timeout=200, ACCELERATE_USE_CPU="true")
    assert ended_well(found), found.stderr[-4000:]
    losses = re.findall(r"^step +(\d+) +loss ([\d.]+)$", found.stdout, re.MULTILINE)
    assert [int(step) for step, _ in losses] == [10, 20]  # of one rank alone
    assert float(losses[1][1]) < 5
    assert (tmp_path / "accelerate_loop" / "random_states_1.pkl").exists()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightning_module(precision: str, run: Run) -> None:
    """An optimizer step that loses Lightning's closure or its clipping, a state that is not brought back."""
    pytest.importorskip("lightning")
    options = [f"--precision={precision}"]
    whole = run("lightning_module", "--steps=12", "--folder=whole", *options)
    run("lightning_module", "--steps=6", "--folder=parts", *options)
    second = run("lightning_module", "--steps=12", "--folder=parts", *options)
    assert second == whole
    assert whole[12] < 5.2
    saved = [torch.load(f"{name}/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "parts")]
    assert same_weights(*saved)
