"""What goes wrong on one rank while all savings are on: it is killed in a step or in a save, its gradient is not
finite, or it was set up otherwise than the others."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    DyingWriter,
    assert_ranks_agree,
    assert_same_bits,
    die,
    needs_fsdp_on_a_cpu,
    whole,
)
from distributed_harness import outcomes, run
from savings_cases import ROWS, Cell, load, save
from torch.distributed.tensor import DTensor

pytestmark = [needs_fsdp_on_a_cpu, pytest.mark.slow, pytest.mark.usefixtures("bitsandbytes")]
SAVED, KILLED, END = 2, 4, 5
IN_THE_MIDDLE = "model.layers.0.mlp.up_proj.weight"  # layer 1 has moved when its gradient comes


def all_at_once() -> Cell:
    return Cell("FSDP2", ROWS["all of them"])


def at_its_gradient(cell: Cell, act: Any) -> None:
    """Have rank 1 call ``act(gradient)`` in backward, when that of one weight in the middle has been summed."""

    def acting(parameter: torch.Tensor, record: Any = cell._record) -> None:
        if dist.get_rank() == 1:
            act(parameter.grad)

    parameter = dict(cell.bare.named_parameters())[IN_THE_MIDDLE]
    hooks = parameter._post_accumulate_grad_hooks
    handle = parameter.register_post_accumulate_grad_hook(acting)
    hooks.move_to_end(handle.id, last=False)  # before the layer-wise update


def killed(folder: str, where: str) -> str:
    cell = all_at_once().train(range(SAVED))
    save(cell, f"{folder}/{SAVED}")
    cell.train(range(SAVED, KILLED))
    if where == "save":
        save(cell, f"{folder}/{KILLED}", DyingWriter)
        return "saved"
    at_its_gradient(cell, lambda gradient: die())
    cell.train(range(KILLED, END))
    return "stepped"


def resumed(folder: str) -> tuple[int, dict[str, Any]]:
    """From the newest complete checkpoint: one without ``.metadata`` is torso."""
    complete = [int(name) for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}/.metadata")]
    cell = all_at_once()
    load(cell, f"{folder}/{max(complete)}")
    return max(complete), cell.train(range(max(complete), END)).held()


def undisturbed() -> dict[str, Any]:
    return all_at_once().train(range(END)).held()


@pytest.mark.full
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_killed_rank_costs_what_was_not_saved_and_no_more(where: str, tmp_path: Any) -> None:
    """Half a layer-wise step that comes back; survivors that hang; int8 weights or 8-bit moments that a checkpoint
    does not bring back to the bit."""
    ends = outcomes(killed, 2, folder=str(tmp_path), where=where, timeout=90, patience=15)
    assert ends[1].killed
    assert ends[0].error, f"rank 0 {ends[0].value} as if nothing had happened"
    assert "still running" not in ends[0].error, ends[0].error + ends[0].output
    results = run(resumed, 2, folder=str(tmp_path))
    assert [step for step, _ in results] == [SAVED] * 2
    assert_same_bits(results[0][1], run(undisturbed, 2)[0], "resumed")


def with_nan() -> tuple[dict[str, Any], dict[str, Any], int]:
    """What the ranks hold before and after a step in which one shard of one gradient is not finite."""
    cell = all_at_once().train(range(1))
    before = cell.held()

    def spoil(gradient: torch.Tensor) -> None:
        assert isinstance(gradient, DTensor)
        gradient.to_local()[0, 0] = torch.nan

    at_its_gradient(cell, spoil)
    cell.train(range(1, 2))
    return before, cell.held(), int(cell.optimizer.skipped_updates)


def test_a_gradient_that_is_not_finite_on_one_rank_moves_its_weight_on_none() -> None:
    """Each rank decides by its own shard; NaN in a scale of int8 weights or in an absmax of 8-bit moments, which no
    later step gets rid of."""
    results = run(with_nan, 2)
    assert_ranks_agree([after for _, after, _ in results])
    before, after, _ = results[0]
    assert [skipped for _, _, skipped in results] == [1, 1]
    for name, value in after.items():
        if isinstance(value, torch.Tensor):
            assert value.isfinite().all(), f"{name} is not finite"
            if name.startswith(
                IN_THE_MIDDLE + "_"
            ):  # its codes, scales and zero points; moments of finite channels move
                assert torch.equal(value, before[name]), f"{name} moved"
            elif name.endswith((".weight", "weight_q")):
                assert not torch.equal(value, before[name]), f"{name} did not move"


DIFFERENCES = {
    "lr": lambda cell, group: group.update(lr=2e-2),
    "weight_decay": lambda cell, group: group.update(weight_decay=0.5),
}


def differing(what: str) -> tuple[str, bool]:
    cell = all_at_once()
    before = {name: whole(parameter) for name, parameter in cell.bare.state_dict().items()}
    if dist.get_rank() == 1:
        for group in cell.optimizer.param_groups:
            DIFFERENCES[what](cell, group)
    try:
        cell.train(range(1))
    except (ValueError, RuntimeError) as error:
        same = all(torch.equal(whole(value), before[name]) for name, value in cell.bare.state_dict().items())
        return str(error), same
    return "", False


@pytest.mark.parametrize("what", ["lr", pytest.param("weight_decay", marks=pytest.mark.full)])
def test_ranks_that_differ_are_told_so_within_backward(what: str) -> None:
    """Ranks that wait for each other for ever, or weights of which each rank's rows follow settings of their own."""
    for error, unchanged in run(differing, 2, what=what, timeout=60, patience=20):
        assert what in error, f"nobody was told: {error}"
        assert "rank" in error
        assert unchanged, "a weight has moved"
