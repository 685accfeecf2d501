"""What goes wrong on one rank: broken gradients, ranks that were set up differently, weights that cannot be had, and
ranks that are killed."""

from __future__ import annotations

import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    Collectives,
    DyingWriter,
    Weights,
    assert_close,
    assert_ranks_agree,
    assert_same_bits,
    die,
    local,
)
from distributed_harness import outcomes, run
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

APOLLO = {"rank": 2, "update_proj_gap": 5, "weight_decay": 0.05}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 16.0, "update_proj_gap": 5}

BROKEN = {
    "kept": ((10, 3), APOLLO, "0"),
    "projected": ((10, 3), APOLLO, "1"),
    "mini_kept": ((7, 7), MINI, "0"),
    "mini_projected": ((2, 7), MINI, "0"),
    "conv": ((6, 3, 2, 2), APOLLO, "0"),
    "bias": ((5,), {}, "0"),
    "embedding": ((33, 6), {}, "1"),
}
HEALTHY = {f"healthy_{name}": case for name, case in BROKEN.items()} | {"plain": ((10, 3), APOLLO, "plain")}
CASES = {"first": HEALTHY["healthy_kept"], **BROKEN, **HEALTHY}
VALUES = {3: (float("nan"), 0), 4: (float("inf"), -1), 6: (-float("inf"), 0)}  # by step: what, and in which element


def spoil(name, step, gradient):
    """One element, which a single rank holds; in the first or last piece, as the step has it."""
    if name in BROKEN and step in VALUES:
        value, place = VALUES[step]
        gradient.view(-1)[place] = value


def broken_gradients(options, mesh_shape, steps):
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None
    model = Weights(CASES, mesh, **options)
    history, skipped, norms = [], [], []
    for _ in range(steps):
        model.train_for(1, spoil)
        history.append(model.weights())
        skipped.append(int(model.optimizer.skipped_updates))
        norms.append(model.optimizer.gradient_norm)
    return {"history": history, "skipped": skipped, "norms": norms, "state": model.state()}


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(2, {"max_grad_norm": 0.05}, marks=pytest.mark.slow, id="2-clipped"),
        pytest.param(2, {}, marks=pytest.mark.full, id="2-plain"),
        pytest.param(3, {"max_grad_norm": 0.05}, marks=pytest.mark.full, id="3-clipped"),
        pytest.param(3, {}, marks=pytest.mark.full, id="3-plain"),
    ],
)
def test_a_broken_gradient_of_one_rank_moves_the_weight_on_no_rank(world, options):
    """Each rank decides by its own shard: half of a weight moves, counts differ, NaN enters a sum that another weight
    shares, or the global norm, after which nothing moves again."""
    results = run(broken_gradients, world, options=options, mesh_shape=(world,), steps=9)
    expected = broken_gradients(options, (), 9)
    for result in results:
        assert result["skipped"] == expected["skipped"] == [0, 0, 7, 14, 14, 21, 21, 21, 21]
        for step in range(1, 9):
            for name in CASES:
                before, after = result["history"][step - 1][name], result["history"][step][name]
                stays = name in BROKEN and step + 1 in VALUES
                assert torch.equal(before, after) == stays, f"{name} at step {step + 1}"
        for name, value in result["state"].items():
            assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name
        if options:
            for step, (norm, other, plain) in enumerate(
                zip(result["norms"], results[0]["norms"], expected["norms"], strict=True), 1
            ):
                assert torch.equal(norm, other), f"ranks clip by different norms at step {step}"
                torch.testing.assert_close(norm, plain, rtol=1e-6, atol=0)
    assert_ranks_agree([result["history"][-1] | result["state"] for result in results])
    assert_close(results[0]["history"][-1], expected["history"][-1], 1e-6, "after broken gradients")
    assert_close(results[0]["state"], expected["state"], 2e-6, "state after broken gradients")


def cases_that_differ(what, rank):
    """Weights and options of a rank, which are those of the others but for one thing on the last rank."""
    cases = {"a": ((10, 3), APOLLO, "0"), "b": ((7, 7), APOLLO, "1"), "c": ((5,), {}, "0"), "d": ((7, 7), APOLLO, "0")}
    options = {"lr": torch.tensor(1e-2) if what == "lr as a tensor" else 1e-2}
    if rank != 1:
        return cases, options
    groups = {
        "rank": {"rank": 1},
        "scale": {"scale": 2.0},
        "scale_type": {"scale_type": "tensor"},
        "update_proj_gap": {"update_proj_gap": 6},
        "distribution": {"distribution": "rademacher"},
        "proj_type": {"proj_type": "reverse_std"},
    }
    constructor = {
        "lr": {"lr": 2e-2},
        "lr as a tensor": {"lr": torch.tensor(2e-2)},
        "betas": {"betas": (0.8, 0.999)},
        "eps": {"eps": 1e-7},
        "weight_decay of a dense group": {"weight_decay": 0.3},
        "seed": {"seed": 5},
        "max_grad_norm": {"max_grad_norm": 0.1},
        "disable_nl": {"disable_nl": True},
    }
    if what in groups:
        cases = {
            name: (shape, group | groups[what] if group else {}, cut) for name, (shape, group, cut) in cases.items()
        }
    options |= constructor.get(what, {})
    if what == "order":
        cases = {name: cases[name] for name in ("a", "d", "b", "c")}
    if what == "shapes":
        cases["b"] = ((7, 8), APOLLO, "1")
    if what == "one more":
        cases["e"] = ((3, 10), APOLLO, "0")
    if what == "placements":
        cases["d"] = ((7, 7), APOLLO, "1")
    return cases, options


def set_up_differently():
    """What came of each difference on this rank, one after another in one world."""
    return {what: set_up_with(what) for what in DIFFERENCES}


def set_up_with(what):
    print(what, flush=True)  # the harness shows it should the ranks hang here
    cases, options = cases_that_differ(what, dist.get_rank())
    model = Weights(cases, init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    before = [local(parameter.detach()).clone() for parameter in model.parameters()]
    model.set_gradients()
    if what == "a gradient missing" and dist.get_rank() == 1:
        model.b.grad = None
    try:
        model.optimizer.step()
    except ValueError as error:
        text = str(error)
    else:
        text = ""
    after = [local(parameter.detach()) for parameter in model.parameters()]
    unchanged = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    return text, unchanged, any(len(state) for state in model.optimizer.state.values())


DIFFERENCES = [
    "rank",
    "scale",
    "scale_type",
    "update_proj_gap",
    "distribution",
    "proj_type",
    "lr",
    "betas",
    "eps",
    "weight_decay of a dense group",
    "seed",
    "max_grad_norm",
    "disable_nl",
    "order",
    "shapes",
    "one more",
    "placements",
    "lr as a tensor",
    "a gradient missing",
]


@pytest.mark.slow
def test_ranks_that_differ_are_told_so_before_anything_changes():
    """A rank that waits for ever for a collective that the others never enter, or sums of things that do not belong
    together; an error on one rank alone, which leaves the others waiting."""
    for rank, results in enumerate(run(set_up_differently, 3, timeout=60, patience=20)):
        for what, (text, unchanged, has_state) in results.items():
            assert text, f"{what}: rank {rank} was told nothing"
            assert unchanged, f"{what}: rank {rank} moved"
            assert not has_state, f"{what}: rank {rank} kept state of a step that was refused"


def after_a_refusal():
    """The user mends the difference, and trains."""
    cases, options = cases_that_differ("lr", dist.get_rank())
    model = Weights(cases, init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    model.set_gradients()
    with pytest.raises(ValueError, match="lr"):
        model.optimizer.step()
    for group in model.optimizer.param_groups:
        group["lr"] = 1e-2
    return model.train_for(8).everything()


def test_training_goes_on_once_the_difference_is_mended():
    """An agreement that is asked for once only, or remembered as reached although it failed; traces of the refusal."""
    results = run(after_a_refusal, 2)
    assert_ranks_agree(results)
    cases, options = cases_that_differ("nothing", 0)
    assert_close(results[0], Weights(cases, **options).train_for(8).everything(), 1e-6, "mended")


def planned_anew_alone():
    """On one rank only, after betas and rate have changed on all, as OneCycleLR changes them."""
    model = Weights(cases_that_differ("nothing", 0)[0], init_device_mesh("cpu", (2,))).train_for(2)
    for group in model.optimizer.param_groups:
        group.update(betas=(0.8, 0.99), lr=2e-2)
    if dist.get_rank() == 0:
        state = model.optimizer.state[model.a]
        state["exp_avg"] = state["exp_avg"].clone()
    return model.train_for(2).everything()


def test_a_rank_that_plans_anew_asks_nobody_what_schedulers_have_changed():
    """It would wait in a comparison for ranks that wait for it in the step's sums."""
    assert_ranks_agree(run(planned_anew_alone, 2, timeout=60))


REFUSED = {
    "svd": ((10, 3), {"rank": 2, "proj": "svd"}, "0", {}, "svd"),
    "svd of experts": ((3, 6, 4), {"rank": 2, "proj": "svd"}, "1", {}, "svd"),
    "kernel dimension": ((6, 3, 2, 2), {"rank": 2}, "2", {}, "kernel|convolution"),
    "partial": ((10, 3), {"rank": 2}, "p", {}, "[Pp]artial"),
    "partial and dense": ((5,), {}, "p", {}, "[Pp]artial"),
    "capturable": ((10, 3), {"rank": 2}, "0", {"capturable": True}, "capturable"),
    "rank above the width": ((10, 3), {"rank": 4}, "0", {}, "rank 4"),
}


def refused():
    """The errors of making an optimizer or of its first step, one case after another in one world."""
    return {case: refused_in(case) for case in REFUSED}


def refused_in(case):
    print(case, flush=True)  # the harness shows it should the ranks hang here
    shape, group, cut, options, _ = REFUSED[case]
    try:
        model = Weights(
            {"fine": ((7, 7), MINI, "0"), "w": (shape, group, cut)}, init_device_mesh("cpu", (2,)), **options
        )
        model.train_for(1)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_refusals_name_the_parameter():
    """A factorisation of each shard by itself, a partial sum taken for a weight: wrong results without an error."""
    for texts in run(refused, 2, timeout=60, patience=20):
        for case, text in texts.items():
            assert re.search(REFUSED[case][-1], text), f"{case}: {text or 'it was accepted'}"
            name = r"parameter 0 \('fine'\)" if case == "capturable" else r"parameter 1 \('w'\)"
            assert re.search(name, text), f"{case}: {text}"


SURVIVORS = {"a": ((10, 3), APOLLO, "0"), "b": ((10, 3), APOLLO, "1"), "c": ((7, 7), MINI, "1"), "d": ((5,), {}, "0")}
SAVED, KILLED, END = 5, 8, 14


def save(model, folder, writer=dcp.FileSystemWriter):
    weights, state = get_state_dict(model, model.optimizer)
    dcp.save({"model": weights, "optimizer": state, "steps": model.steps}, storage_writer=writer(folder))


def killed(folder, where):
    model = Weights(SURVIVORS, init_device_mesh("cpu", (dist.get_world_size(),))).train_for(SAVED)
    save(model, f"{folder}/{SAVED}")
    model.train_for(KILLED - SAVED)
    if where == "save":
        save(model, f"{folder}/{KILLED}", DyingWriter)
        return "saved"
    model.set_gradients()
    with Collectives(die if dist.get_rank() == 1 else None):
        model.optimizer.step()  # rank 1 dies when it has computed what it was to send
        model.optimizer.step()
    return "stepped"


def resumed(folder):
    """From the newest complete checkpoint: one without ``.metadata`` is torso."""
    complete = [int(name) for name in os.listdir(folder) if os.path.exists(f"{folder}/{name}/.metadata")]
    model = Weights(SURVIVORS, init_device_mesh("cpu", (dist.get_world_size(),)))
    weights, state = get_state_dict(model, model.optimizer)
    saved = {"model": weights, "optimizer": state, "steps": 0}
    dcp.load(saved, checkpoint_id=f"{folder}/{max(complete)}")
    set_state_dict(model, model.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    model.steps = saved["steps"]
    return max(complete), model.train_for(END - model.steps).everything()


def undisturbed():
    return Weights(SURVIVORS, init_device_mesh("cpu", (dist.get_world_size(),))).train_for(END).everything()


@pytest.mark.slow
@pytest.mark.parametrize("where", [pytest.param("step", marks=pytest.mark.full), "save"])
def test_a_killed_rank_costs_what_was_not_saved_and_no_more(where, tmp_path):
    """Survivors that hang in a collective, a checkpoint that needs the ranks that wrote it, a resumed run that differs
    from an undisturbed one."""
    ends = outcomes(killed, 3, folder=str(tmp_path), where=where, timeout=90, patience=15)
    assert ends[1].killed
    for rank in (0, 2):
        assert ends[rank].error, f"rank {rank} {ends[rank].value} as if nothing had happened"
        assert "still running" not in ends[rank].error, ends[rank].error + ends[rank].output
    results = run(resumed, 3, folder=str(tmp_path))
    assert [step for step, _ in results] == [SAVED] * 3
    assert_ranks_agree([values for _, values in results])
    assert_same_bits(results[0][1], run(undisturbed, 3)[0], "resumed")
