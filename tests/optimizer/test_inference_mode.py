"""``torch.inference_mode``: what is made under it cannot be changed outside. Some code wraps all of a checkpoint's
loading in it, or all of a loop that makes its own gradients."""

from __future__ import annotations

import pytest
import torch
from broken_state import everything, make, same, train
from tiers import INTERPRETER_FULL
from torch import nn

from apollo_triton import APOLLOAdamW


@pytest.mark.parametrize("backend", INTERPRETER_FULL, indirect=True)
def test_what_is_loaded_under_it_trains_on(backend):
    """Bug: the next step ended half-way in "Inplace update to inference tensor"."""
    saved, named = make(steps=2)
    loaded, others = make()
    with torch.no_grad():
        for name, parameter in named.items():
            others[name].copy_(parameter)
    with torch.inference_mode():
        loaded.load_state_dict(saved.state_dict())
    for optimizer, parameters in ((saved, named), (loaded, others)):
        train(optimizer, parameters, 2)
    assert all(torch.equal(named[name], others[name]) for name in named)


@pytest.mark.parametrize("backend", INTERPRETER_FULL, indirect=True)
def test_a_step_under_it_is_a_step(backend):
    """Bug: the state and the scratch memory that it made could not be written to by the next step."""
    optimizer, named = make()
    expected, others = make()
    with torch.inference_mode():
        train(optimizer, named, 0)
    train(expected, others, 0)
    for each, parameters in ((optimizer, named), (expected, others)):
        train(each, parameters, 1)
    assert all(torch.equal(named[name], others[name]) for name in named)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "update_norm", "step"])
def test_state_that_was_made_under_it_is_refused_by_name(name):
    """Bug: PyTorch's own error came when a part of the step was done."""
    optimizer, named = make(steps=1)
    with torch.inference_mode():
        optimizer.state[named["up"]][name] = optimizer.state[named["up"]][name].clone()
    before = everything(optimizer)
    with pytest.raises(ValueError, match=rf"parameter 0 \('up'\).* its state '{name}' .*torch.inference_mode"):
        train(optimizer, named, 1)
    assert same(everything(optimizer), before)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, named, 1)


def test_a_weight_that_was_made_under_it_is_refused_by_name():
    with torch.inference_mode():
        weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"parameter 0 .*torch.inference_mode"):
        APOLLOAdamW([{"params": [weight], "rank": 2}])
