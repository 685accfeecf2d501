"""A broken ``state_dict`` is refused whole, by name, or it is loaded and training continues from it.

The kernels get addresses. So a tensor of another dtype, layout or size than they take for granted would be read and
written beyond its end.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache

import pytest
import torch
from broken_state import at, broken, everything, make, paths, same, train, ways
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

STEPS = 2
READ_BY_KERNELS = {
    "exp_avg", "exp_avg_sq", "exp_avg_q", "exp_avg_sq_q", "exp_avg_absmax", "exp_avg_sq_absmax", "update_norm",
    "projection", "step", "seed",
}  # fmt: skip
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@cache
def good():
    with torch.device("cpu"):
        optimizer, _ = make(steps=STEPS, backend="reference")
        return optimizer.state_dict()


@cache
def untouched(backend):
    """An optimizer that has other state, and what it is made of; loading that is refused leaves it as it is."""
    optimizer, named = make(seed=1, steps=1, backend=backend)
    return optimizer, named, everything(optimizer)


@st.composite
def faults(draw, of=None):
    path = draw(st.sampled_from([path for path in paths(good()) if of is None or path[-1] in of]))
    return path, draw(st.sampled_from(ways(at(good(), path))))


def load(state_dict, path, backend="reference"):
    """The optimizer that has loaded it, None if it was refused."""
    optimizer, named, before = untouched(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer.load_state_dict(state_dict)
        except ValueError as error:
            assert same(everything(optimizer), before), "it changed"
            check_message(str(error), path)
            return None
    untouched.cache_clear()
    return optimizer, named


def check_message(message, path):
    """It names what is wrong, on one line of bounded length."""
    assert len(message) < 1500
    assert "\n" not in message
    if path[0] == "param_groups" and len(path) > 1:
        assert "group" in message
    if path[0] == "state" and len(path) > 2:
        names = {
            "exp_avg": ("exp_avg", "exp_avg_sq", "AdamW"),
            "exp_avg_sq": ("exp_avg_sq", "exp_avg_q"),  # of two forms, either may be the wrong one
            "seed": ("seed", "AdamW"),
        }.get(path[2], (path[2],))
        assert "parameter group" in message
        assert any(name in message for name in names)


def check_fault(fault):
    path, way = fault
    loaded = load(broken(good(), path, way), path)
    if loaded is None:
        return
    optimizer, named = loaded
    train(optimizer, named, STEPS)
    assert all(parameter.isfinite().all() for parameter in named.values())
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, named, STEPS + 1)


@given(faults())
@settings(max_examples=60, **QUICK)
@example((("state", 3, "step"), 29))
@example((("state", 0), 0))
@example((("param_groups", 0, "param_names"), 4))
@example((("param_groups", 0, "lr"), "meta"))
@example((("param_groups", 0, "lr"), "NaN"))
@example((("param_groups", 0, "weight_decay"), 24))
@example((("state", 0, "seed"), 13))
@example((("state", 5, "exp_avg_absmax"), "torch.float16"))
@example((("state", 4, "projection"), "torch.float64"))
def test_one_fault(fault):
    check_fault(fault)


def run_with(check, examples):
    """``check`` with faults in what kernels read, by a new function, since hypothesis decorates one only once."""

    @given(faults(READ_BY_KERNELS))
    @settings(max_examples=examples, **QUICK)
    def run(fault):
        check(fault)

    run()


@pytest.mark.parametrize("examples", [30, pytest.param(3000, marks=pytest.mark.full)])
def test_one_fault_in_what_kernels_read(examples):
    """Tensors of the state, by which the process would die."""
    run_with(check_fault, examples)


def trained(run):
    """The weights before a step and after it."""
    optimizer, named = run
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    train(optimizer, named, STEPS)
    return {name: (before[name], parameter.detach()) for name, parameter in named.items()}


def assert_alike(one, other):
    """Two backends went the same way, up to the order of float32 sums and the rounding of weights that hardly move."""
    for name, (start, end) in one.items():
        assert (other[name][1] - end).norm() <= 1e-4 * (end - start).norm() + 2**-23 * end.norm(), name


def check_on_kernels(fault):
    """Refused by both, or read alike by both."""
    path, way = fault
    state_dict = broken(good(), path, way)
    runs = [load(state_dict, path, backend) for backend in ("reference", "triton")]
    assert (runs[0] is None) == (runs[1] is None)
    if runs[0] is not None:
        assert_alike(*(trained(run) for run in runs))


@pytest.mark.slow
@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.full)])
def test_one_fault_on_the_kernels(examples):
    pytest.importorskip("triton")
    run_with(check_on_kernels, examples)


KERNELS = [
    ("exp_avg_sq", "torch.float16"),
    ("exp_avg", "torch.bfloat16"),
    ("projection", "column-major"),
    ("update_norm", "torch.float64"),
    ("exp_avg_absmax", "torch.float16"),
    ("exp_avg", "expanded"),
    ("exp_avg_sq", "strided"),
]


@pytest.mark.slow
def test_what_is_loaded_is_read_alike_by_both_backends():
    """All of these at once, each in every state that has such a tensor: memory of the process overwritten, moments read
    as halves of other numbers, P read in another order."""
    pytest.importorskip("triton")
    state_dict = copy.deepcopy(good())
    for name, way in KERNELS:
        for index, state in good()["state"].items():
            if name in state and state[name].dtype != torch.uint8:
                state_dict = broken(state_dict, ("state", index, name), way)
    runs = [load(state_dict, ("state",), backend) for backend in ("reference", "triton")]
    assert_alike(*(trained(run) for run in runs))
