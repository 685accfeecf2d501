"""What a plan is kept for: ``Places`` notices whatever moves or changes between two steps, and lets gradients move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.core import device_backend, gpu
from apollo_triton.core.implicit_gradient import ImplicitGradient
from apollo_triton.engine.fingerprint import Places, places_of
from apollo_triton.int8.weight import Int8Weight


class Run:
    """Two square matrices and a bias in two groups, after a step, and where everything was then."""

    def __init__(self, **group):
        self.weights = [nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16)) for _ in range(2)]
        self.bias = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
        groups = [{"params": self.weights, "rank": 2, **group}, {"params": [self.bias]}]
        self.optimizer = APOLLOAdamW(groups)
        for parameter in (*self.weights, self.bias):
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.weight, self.state, self.given = self.weights[0], self.optimizer.state[self.weights[0]], {}
        self.groups = self.optimizer.param_groups
        self.places = Places(self.groups, self.optimizer.state, {})

    def found(self):
        return self.places.unless_moved(self.groups, self.optimizer.state, self.given)

    def gradients(self):
        return [each.grad.data_ptr() for each in (*self.weights, self.bias)]


def set_data(tensor, data):
    tensor.data = data


def at_the_same_place(run):
    run.state["exp_avg"] = run.state["exp_avg"].view(torch.int32)


def another_parameter(run):
    new = nn.Parameter(run.weight.data)
    new.grad = run.weight.grad
    run.optimizer.state[new] = run.optimizer.state.pop(run.weight)
    run.groups[0]["params"][0] = new


def misaligned(run):
    run.weight.grad = torch.ones(16 * 16 + 1, dtype=torch.bfloat16)[1:].view(16, 16)


def to_the_other_group(run):
    run.groups[1]["params"].insert(0, run.groups[0]["params"].pop())


def swapped_states(run):
    first, second = run.weights
    states = run.optimizer.state
    states[first], states[second] = states[second], states[first]


def given_as_factors(run):
    run.given[run.weight] = ImplicitGradient(torch.ones(3, 16), torch.ones(3, 16))


CHANGES = {
    "weight elsewhere": lambda run: set_data(run.weight, run.weight.data.clone()),
    "weight transposed where it is": lambda run: set_data(run.weight, run.weight.data.t()),
    "weight of another dtype where it is": lambda run: set_data(run.weight, run.weight.data.view(torch.float16)),
    "weight of fewer rows where it is": lambda run: set_data(run.weight, run.weight.data[:8]),
    "another parameter of the same memory": another_parameter,
    "gradient transposed": lambda run: set_data(run.weight.grad, run.weight.grad.data.t()),
    "gradient of fewer rows": lambda run: set_data(run.weight.grad, run.weight.grad.data[:8]),
    "gradient of another dtype": lambda run: set_data(run.weight.grad, run.weight.grad.view(torch.float16)),
    "gradient negated where it is read": lambda run: setattr(run.weight, "grad", torch._neg_view(run.weight.grad)),
    "gradient misaligned": misaligned,
    "no gradient": lambda run: setattr(run.weight, "grad", None),
    "gradient as factors": given_as_factors,
    "moment elsewhere": lambda run: set_data(run.state["exp_avg_sq"], run.state["exp_avg_sq"].clone()),
    "another moment where it was": at_the_same_place,
    "norm elsewhere": lambda run: set_data(run.state["update_norm"], run.state["update_norm"].clone()),
    "step elsewhere": lambda run: set_data(run.state["step"], torch.tensor(1.0)),
    "another seed": lambda run: run.state.update(seed=run.state["seed"] + 1),
    "a state of its own": lambda run: run.optimizer.state.update({run.weight: dict(run.state)}),
    "states swapped": swapped_states,
    "state gone": lambda run: run.optimizer.state.pop(run.weight),
    "state emptied": lambda run: run.state.clear(),
    "moment gone": lambda run: run.state.pop("exp_avg_sq"),
    "the last of the states one more": lambda run: run.optimizer.state[run.bias].update(projection=torch.ones(2, 16)),
    "the last of the states one less": lambda run: run.optimizer.state[run.bias].popitem(),
    "another group": to_the_other_group,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change):
    """Bug: kernels go on with an address, a shape or a dtype that is no more."""
    run = Run()
    assert run.found() == run.gradients()
    CHANGES[change](run)
    assert run.found() is None


@pytest.mark.parametrize("change", ["a state of its own", "states swapped", "state gone"])
def test_a_change_is_noticed_beside_states_of_others(change):
    """Bug: an engine of a part of the parameters, or a state that was made later, is looked at in the wrong order."""
    run = Run()
    run.groups = run.groups[:1]
    run.places = Places(run.groups, run.optimizer.state, {})
    assert run.found() == run.gradients()[:2]
    CHANGES[change](run)
    assert run.found() is None


def test_states_in_another_order_are_the_same():
    run = Run()
    states = run.optimizer.state
    states[run.weight] = states.pop(run.weight)
    assert run.found() == run.gradients()


def test_gradients_may_move():
    """Bug: a plan is made anew at every step, or a table is told an old address, or one of another parameter."""
    run = Run()
    kept = [each.grad for each in run.weights]
    for each in run.weights:
        each.grad = torch.ones_like(each)
    moved = run.found()
    assert moved == run.gradients()
    assert not {each.data_ptr() for each in kept} & {*moved}
    run.weights[1].grad = kept[0]
    assert run.found() == run.gradients()


def test_rows_of_a_gradient_further_apart_are_noticed():
    """Bug: strides are compared only with those of a contiguous tensor, and kernels read between the rows."""
    run = Run()
    for length in (32, 64):
        run.weight.grad = torch.ones(16, length, dtype=torch.bfloat16)[:, :16]
        assert run.found() is None
        run.places = Places(run.groups, run.optimizer.state, {})
        assert run.found() == run.gradients()


def test_a_gradient_that_is_never_formed_has_no_address():
    """Bug: the addresses of those behind it are those of others."""
    run = Run()
    given_as_factors(run)
    run.places = Places(run.groups, run.optimizer.state, run.given)
    assert run.found() == run.places.gradients == [0, *run.gradients()[1:]]
    run.given[run.weight] = ImplicitGradient(torch.ones(3, 16).bfloat16(), torch.ones(3, 16).bfloat16())
    assert run.found() is None


def test_a_refused_step_leaves_the_tables_with_what_they_were_told(monkeypatch):
    """Bug: gradients have moved before a step that is refused, and the next one reads where they were."""
    pytest.importorskip("triton")
    monkeypatch.setattr(device_backend, "_obstacle", lambda device: None)
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    run = Run()
    told = run.gradients()
    kept = [each.grad for each in run.weights]  # so that the new ones lie elsewhere
    for each in run.weights:
        each.grad = torch.ones_like(each)
    run.groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match="differs between parameter groups"):
        run.optimizer.step()
    run.groups[0]["max_grad_norm"] = None
    run.optimizer.step()
    assert told[:2] == [each.data_ptr() for each in kept]
    assert run.optimizer._engine._plan.tables[0].gradients.tolist() == run.gradients()[:2] != told[:2]


def other_rounding(weight):
    weight.stochastic_rounding = not weight.stochastic_rounding


INT8_CHANGES = {
    **{part: lambda w, part=part: setattr(w, part, getattr(w, part).clone()) for part in ("q", "scale", "zero")},
    "rounding": other_rounding,
}


@pytest.mark.parametrize("change", INT8_CHANGES)
def test_the_parts_of_an_int8_weight_are_looked_at(change):
    weight = Int8Weight.of(torch.ones(16, 16), group_size=16)
    weight.grad = torch.ones(16, 16)
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}])
    optimizer.step()
    places = Places(optimizer.param_groups, optimizer.state, {})
    arguments = optimizer.param_groups, optimizer.state, {}
    assert places.unless_moved(*arguments) == [weight.grad.data_ptr()]
    INT8_CHANGES[change](weight)
    assert places.unless_moved(*arguments) is None


def test_the_projection_of_svd_is_looked_at():
    run = Run(proj="svd")
    assert run.found() == run.gradients()
    set_data(run.state["projection"], run.state["projection"].double())
    assert run.found() is None


def test_8_bit_moments_are_looked_at():
    run = Run(rank=16, state_bits=8, min_8bit_size=0)
    assert run.found() == run.gradients()
    set_data(run.state["exp_avg_absmax"], run.state["exp_avg_absmax"].clone())
    assert run.found() is None


class Elsewhere(torch.Tensor):
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (16,), dtype=torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        raise NotImplementedError


def test_what_has_no_address_is_planned_anew():
    """Bug: a tensor subclass that keeps its numbers elsewhere is taken for one at address 0."""
    run = Run()
    run.bias.grad = Elsewhere()
    assert run.found() is None
    assert places_of(run.groups, run.optimizer.state, {}) is None
