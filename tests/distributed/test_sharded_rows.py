"""One second moment a row of sharded weights: rows that are cut between ranks, along their columns, or both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import Weights, assert_close, assert_ranks_agree, assert_same_bits, local, needs_uneven_strides
from distributed_harness import run
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

ROW = {"second_moment": "row", "weight_decay": 0.1}
# Shape, and the cut on meshes of one and of two dimensions.
CASES = {
    "rows": ((33, 24), "0", "00"),  # uneven
    "columns": ((24, 34), "1", "01"),
    "uneven": ((8, 5), "1", "10"),
    "few": ((5, 1), "1", "r1"),  # a rank has none of the columns
    "stacked": ((3, 4, 6), "1", "0r"),
    "coded": ((6, 3072), "1", "01"),  # whole blocks of 256 on every rank
    "bias": ((7,), "0", "0r"),
}
full, slow = pytest.mark.full, pytest.mark.slow
EIGHT = {"state_bits": 8, "min_8bit_size": 4096}


def build(mesh_shape, names=tuple(CASES), **options):
    """Weights on a mesh of CPUs; an empty shape means plain tensors."""
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None
    cuts = {name: CASES[name][len(mesh_shape)] if mesh_shape else "plain" for name in names}
    return Weights({name: (CASES[name][0], ROW, cuts[name]) for name in names}, mesh, **EIGHT, **options)


def spoil(name, step, gradient):
    """One element, which one rank has, at the third step."""
    if step == 3:
        gradient.view(-1)[-1] = float("inf")


def trained(mesh_shape, names=tuple(CASES), **options):
    """Everything after two steps, after one with an infinity on one rank, and after one more; and what is held here."""
    model = build(mesh_shape, names, **options)
    predicted = {row.name: row.state_bytes for row in model.optimizer.summary().rows}
    found = {"two": model.train_for(2).everything()}
    held = {}
    for name, parameter in model.named_parameters():
        state = model.optimizer.state[parameter]
        held[name] = sum(local(value).nbytes for value in state.values() if isinstance(value, torch.Tensor))
    found["three"] = model.train_for(1, spoil).everything()
    return found | {"four": model.train_for(1).everything(), "held": held, "predicted": predicted}


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        pytest.param((2,), {"max_grad_norm": 0.5}, marks=slow),
        pytest.param((3,), {}, marks=full),
        pytest.param((2, 2), {}, marks=[full, needs_uneven_strides]),
    ],
    ids=str,
)
def test_ranks_have_the_moments_of_a_single_process(mesh_shape, options):
    """A mean over a rank's columns alone, sums of rows of other ranks, an infinity that one rank sees, a state that is
    cut where it is whole."""
    results = run(trained, torch.Size(mesh_shape).numel(), mesh_shape=mesh_shape, timeout=200, **options)
    expected = trained((), **options)
    for result in results:
        assert result["held"] == result["predicted"]
        assert_same_bits(result["two"] | steps_of(result["three"]), result["three"], "an infinity")
    for steps in ("two", "four"):
        assert_ranks_agree([result[steps] for result in results])
        assert {name: value.shape for name, value in named(results[0][steps], "exp_avg_sq")} == {
            f"{name}.exp_avg_sq": (shape[0], *[1] * (len(shape) - 1)) for name, (shape, *_) in CASES.items()
        }
        without_codes = [
            {key: value for key, value in found.items() if not key.startswith("coded")}
            for found in (results[0][steps], expected[steps])
        ]
        assert_close(*without_codes, 1e-5, f"{mesh_shape}, {steps}")
        assert_close(results[0][steps], expected[steps], 1e-2, f"{mesh_shape}, {steps}")


def named(values, suffix):
    return [(key, value) for key, value in values.items() if key.endswith(f".{suffix}")]


def steps_of(values):
    return dict(named(values, "step"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, and do not take CPU tensors")
def test_kernels_add_up_rows_over_ranks():
    """Row sums that are read in parts where they come whole, a norm that is added to one of another rank."""
    pytest.importorskip("triton")
    names = ("rows", "columns", "uneven", "bias")
    results = run(trained, 2, mesh_shape=(2,), names=names, backend="triton", timeout=240)
    expected = trained((), names)
    assert_ranks_agree([result["four"] for result in results])
    assert_close(results[0]["four"], expected["four"], 1e-5, "two ranks")


def save(mesh_shape, folder):
    model = build(mesh_shape).train_for(2)
    dcp.save(state_of(model), checkpoint_id=folder)
    return model.everything(), model.train_for(2).everything()


def load(mesh_shape, folder):
    model = build(mesh_shape)
    state = state_of(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, model.optimizer, state["optimizer"])
    model.steps = 2
    return model.everything(), model.train_for(2).everything()


def state_of(model):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, model.optimizer)}


@pytest.mark.parametrize(
    ("origin", "destinations"),
    [
        pytest.param((2,), [()], marks=slow),
        pytest.param((2,), [(4,), (2, 2)], marks=[full, needs_uneven_strides]),
        pytest.param((2, 2), [(2,), ()], marks=[full, needs_uneven_strides]),
    ],
    ids=str,
)
def test_sharded_checkpoints_load_on_another_number_of_ranks(origin, destinations, tmp_path):
    """Placements that a sharded checkpoint saves in part, or reads as those of the weight."""
    folder = str(tmp_path)
    saved, end = run(save, torch.Size(origin).numel(), mesh_shape=origin, folder=folder, timeout=120)[0]
    for destination in destinations:
        world = max(1, torch.Size(destination).numel())
        results = run(load, world, mesh_shape=destination, folder=folder, timeout=120)
        for loaded, resumed in results:
            assert_same_bits(loaded, saved, f"on {destination}")
            assert_close(resumed, end, 1e-2, f"resumed on {destination}")
        assert_ranks_agree([resumed for _, resumed in results])
