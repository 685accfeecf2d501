"""Checkpoints of sharded training: saved on N ranks, loaded on M ranks or in one process, and gone on with exactly."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import Weights, assert_close, assert_ranks_agree, assert_same_bits, needs_uneven_strides
from distributed_harness import run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

APOLLO = {"rank": 2, "update_proj_gap": 3, "weight_decay": 0.05}
MINI = {"rank": 1, "scale_type": "tensor", "scale": "auto", "update_proj_gap": 3, "distribution": "rademacher"}
SAVED, END = 5, 9  # refreshes lie before the save and after it

SHAPES = {
    "tall": ((10, 3), APOLLO),
    "wide": ((3, 10), APOLLO),
    "flat": ((2, 7), MINI),
    "square": ((7, 7), MINI),
    "experts": ((3, 6, 4), APOLLO),
    "bias": ((5,), {}),
    "embedding": ((33, 6), {}),
}


CUTS = {0: ["plain"] * 3, 1: ["0", "1", "r"], 2: ["01", "1r", "00"]}
# torch distributes no uneven strided shard from a full tensor: the moments of "01" where dimension 0 is projected.
CUTS_FROM_FULL = CUTS | {2: ["r0", "1r", "00"]}


def cases_of(cuts):
    """Each shape at some placements; a name says the shape and a number, and not the placement, which may change."""
    cases = {}
    for name, (shape, group) in SHAPES.items():
        for number, cut in enumerate(cuts):
            cases[f"{name}_{number}"] = (shape, group, cut if len(shape) > 1 or "1" not in cut else "r" * len(cut))
    return cases | {"norm": ((5,), {}, "plain")}


def build(mesh_shape, cuts=CUTS, **options):
    """Weights on a mesh; an empty shape means plain tensors."""
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None
    return Weights(cases_of(cuts[len(mesh_shape)]), mesh, **options)


def uninterrupted():
    return build(()).train_for(END).everything()


def save(mesh_shape, folder):
    """Train, save with torch.distributed.checkpoint, and go on to the end."""
    model = build(mesh_shape).train_for(SAVED)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, model.optimizer)}
    dcp.save(state, checkpoint_id=folder)
    saved = model.everything()
    return saved, model.train_for(END - SAVED).everything()


def load(mesh_shape, folder):
    """Load into fresh weights of another seed's optimizer, and go on to the end."""
    model = build(mesh_shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, model.optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, model.optimizer, state["optimizer"])
    model.steps = SAVED
    loaded = model.everything()
    return loaded, model.train_for(END - SAVED).everything()


def size(mesh_shape):
    return max(1, torch.Size(mesh_shape).numel())


full, slow = pytest.mark.full, pytest.mark.slow
JOURNEYS = [
    pytest.param((2,), [(2,), ()], marks=full),  # in make test with all savings, test_savings_resume.py
    pytest.param((2, 2), [()], marks=[slow, needs_uneven_strides]),
    pytest.param((2,), [(3,)], marks=full),
    pytest.param((2,), [(2, 2)], marks=[full, needs_uneven_strides]),
    pytest.param((2, 2), [(2, 2), (3,)], marks=[full, needs_uneven_strides]),
    pytest.param((), [(3,)], marks=full),
]


@pytest.mark.parametrize(("origin", "destinations"), JOURNEYS, ids=str)
def test_saved_on_some_ranks_and_loaded_on_others(origin, destinations, tmp_path):
    """State that is local to a rank under one global name (the last writer wins), moments of the wrong global shape,
    an update_norm or step that starts anew, a projection whose epoch does, group keys that do not come back."""
    results = run(save, size(origin), mesh_shape=origin, folder=str(tmp_path / "saved"))
    saved, end = results[0]
    assert_ranks_agree([result[1] for result in results])
    assert_close(end, uninterrupted(), 1e-6, "the run that saved")
    for destination in destinations:
        results = run(load, size(destination), mesh_shape=destination, folder=str(tmp_path / "saved"))
        assert_ranks_agree([result[0] for result in results])
        assert_ranks_agree([result[1] for result in results])
        loaded, resumed = results[0]
        assert_same_bits(loaded, saved, f"loaded on {destination}")
        if destination == origin:
            assert_same_bits(resumed, end, f"resumed on {destination}")
        assert_close(resumed, end, 1e-6, f"resumed on {destination}")


def plain_dictionaries(mesh_shape, folder):
    """``optimizer.state_dict()`` through ``torch.save`` of each rank for itself."""
    model = build(mesh_shape, max_grad_norm=0.1).train_for(SAVED)
    path = f"{folder}/rank{dist.get_rank()}.pt"
    torch.save({"model": model.state_dict(), "optimizer": model.optimizer.state_dict()}, path)
    in_memory = copy.deepcopy(model.optimizer.state_dict())
    end = model.train_for(END - SAVED).everything()
    resumed = []
    for optimizer_state in (torch.load(path)["optimizer"], in_memory):
        fresh = build(mesh_shape, max_grad_norm=0.1)
        fresh.load_state_dict(torch.load(path)["model"])
        fresh.optimizer.load_state_dict(optimizer_state)
        fresh.steps = SAVED
        resumed.append(fresh.train_for(END - SAVED).everything())
    return end, resumed


@pytest.mark.parametrize(
    "mesh_shape",
    [pytest.param((2,), marks=slow), pytest.param((3,), marks=full),
     pytest.param((2, 2), marks=[full, needs_uneven_strides])],
    ids=str,
)  # fmt: skip
def test_plain_state_dicts_of_each_rank_resume_exactly(mesh_shape, tmp_path):
    """``load_state_dict`` that casts or copies local parts only, or takes a DTensor's global shape for a wrong one;
    state that still shares memory with the optimizer it came from."""
    results = run(plain_dictionaries, size(mesh_shape), mesh_shape=mesh_shape, folder=str(tmp_path))
    assert_ranks_agree([result[0] for result in results])
    for end, resumed in results:
        for each in resumed:
            assert_same_bits(each, end, "resumed")


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def save_full(mesh_shape, path):
    model = build(mesh_shape).train_for(SAVED)
    full = get_model_state_dict(model, options=FULL), get_optimizer_state_dict(model, model.optimizer, options=FULL)
    if dist.get_rank() == 0:
        torch.save(full, path)
    return model.everything(), model.train_for(END - SAVED).everything()


def load_full(mesh_shape, path):
    model = build(mesh_shape, CUTS_FROM_FULL)
    weights, state = torch.load(path)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, model.optimizer, state, options=options)
    model.steps = SAVED
    return model.everything(), model.train_for(END - SAVED).everything()


@pytest.mark.parametrize(
    ("world", "destinations"),
    [pytest.param(2, [(2, 2), ()], marks=slow), pytest.param(3, [(3,), (), (2, 2)], marks=full)],
    ids=str,
)
def test_one_full_file_loads_sharded_and_unsharded(world, destinations, tmp_path):
    """A consolidated state whose moments were gathered in another order than their channels."""
    path = str(tmp_path / "full.pt")
    saved, end = run(save_full, world, mesh_shape=(world,), path=path)[0]
    for name, value in torch.load(path)[1]["state"]["tall_0"].items():
        expected = saved[f"tall_0.{name}"]
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, name
    for destination in destinations:
        results = run(load_full, size(destination), mesh_shape=destination, path=path)
        assert_ranks_agree([result[1] for result in results])
        assert_same_bits(results[0][0], saved, f"full, on {destination}")
        assert_close(results[0][1], end, 1e-6, f"full, resumed on {destination}")


def wrong_state(mesh_shape):
    """Loads state of other shapes, and says what came of it."""
    donor = Weights({"w": ((10, 3), {**APOLLO, "rank": 3}, "0")}, init_device_mesh("cpu", mesh_shape)).train_for(2)
    model = Weights({"w": ((10, 3), APOLLO, "0")}, init_device_mesh("cpu", mesh_shape)).train_for(2)
    before = model.everything()
    state = donor.optimizer.state_dict()
    state["param_groups"] = model.optimizer.state_dict()["param_groups"]
    try:
        model.optimizer.load_state_dict(state)
    except ValueError as error:
        return str(error), before, model.everything()
    return "", before, model.everything()


def test_state_of_another_rank_of_projection_is_refused():
    """Moments of the right local but a wrong global shape, or the other way round, loaded without a word."""
    for error, before, after in run(wrong_state, 2, mesh_shape=(2,)):
        assert "parameter 0 ('w') of shape (10, 3): its state 'exp_avg' has shape (10, 3), not (10, 2)" in error
        assert_same_bits(after, before, "after the refusal")


def saved_and_reloaded_low_precision(mesh_shape, folder):
    model = build(mesh_shape, state_dtype=torch.bfloat16).train_for(SAVED)
    dcp.save({"optimizer": get_optimizer_state_dict(model, model.optimizer)}, checkpoint_id=folder)
    fresh = build(mesh_shape, state_dtype=torch.bfloat16)
    state = {"optimizer": get_optimizer_state_dict(fresh, fresh.optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(fresh, fresh.optimizer, state["optimizer"])
    return model.state(), fresh.state(), *cast_and_replaced(mesh_shape)


def cast_and_replaced(mesh_shape):
    """Loads state that was cast to float64, of experts that are cut between them, and puts foreign moments in."""
    mesh = init_device_mesh("cpu", mesh_shape)
    cases = {"w": ((10, 3), APOLLO, "0"), "svd": ((4, 6, 5), {"rank": 2, "proj": "svd", "update_proj_gap": 9}, "0")}
    model, fresh = Weights(cases, mesh).train_for(2), Weights(cases, mesh)
    state_dict = copy.deepcopy(model.optimizer.state_dict())
    for state in state_dict["state"].values():
        state |= {name: value.double() for name, value in state.items() if isinstance(value, torch.Tensor)}
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.optimizer.load_state_dict(state_dict)
    fresh.steps = model.steps
    end, resumed, errors = model.train_for(3).everything(), fresh.train_for(3).everything(), []
    moments = fresh.optimizer.state[fresh.w]["exp_avg"]
    for foreign in (moments.half(), moments.full_tensor()):
        fresh.optimizer.state[fresh.w]["exp_avg"] = foreign
        with pytest.raises(ValueError, match="exp_avg") as caught:
            fresh.train_for(1)
        errors.append(str(caught.value))
    return end, resumed, errors


@pytest.mark.slow
def test_dtypes_of_state_survive(tmp_path):
    """bfloat16 moments that come back as float32, float32 norms rounded to the dtype of the weight, other dtypes that
    come in; moments of another dtype or of the whole weight read as this rank's."""
    results = run(saved_and_reloaded_low_precision, 2, mesh_shape=(2,), folder=str(tmp_path / "low"))
    for saved, loaded, end, resumed, errors in results:
        assert_same_bits(resumed, end, "cast")
        assert_same_bits(end, results[0][2], "svd of experts on each rank")
        assert "'exp_avg' has dtype torch.float16" in errors[0]
        assert "'exp_avg' has placements whole, not (Shard(dim=0),)" in errors[1]
        assert_same_bits(loaded, saved, "bfloat16")
        assert saved["tall_0.exp_avg"].dtype == loaded["tall_0.exp_avg"].dtype == torch.bfloat16
        assert loaded["tall_0.update_norm"].dtype == loaded["tall_0.step"].dtype == torch.float32
