"""8-bit moments in checkpoints: older names and shapes, floats there and codes here, codes that were cast."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from kernel_cases import drawn
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.core.moments_8bit import dequantize_blockwise, quantize_blockwise

SHAPES = {"low": (300, 20), "experts": (2, 40, 20), "mini": (600, 5), "dense": (40, 256), "vector": (300,)}
GROUPS = [(("low", "experts"), {"rank": 16}), (("mini",), {"rank": 1}), (("dense", "vector"), {})]
MOMENTS = ("exp_avg", "exp_avg_sq")


def make(steps=0, seed=0, **options):
    named = {name: nn.Parameter(drawn(shape, seed)) for name, shape in SHAPES.items()}
    groups = [{"params": [(name, named[name]) for name in names], **keys} for names, keys in GROUPS]
    optimizer = APOLLOAdamW(groups, lr=1e-2, **({"state_bits": 8, "min_8bit_size": 257} | options))
    train(optimizer, named, 0, steps)
    return optimizer, named


def train(optimizer, named, first, steps):
    for step in range(first, first + steps):
        for index, parameter in enumerate(named.values()):
            parameter.grad = drawn(parameter.shape, 100 * step + index)
        optimizer.step()


def of_an_older_version(optimizer):
    """What older versions saved: codes under the names of floats, absmaxes in a row, vectors and rank 1 in 8 bits too.
    Also the floats that these codes stand for."""
    state_dict, floats = copy.deepcopy(optimizer.state_dict()), {}
    for key, state in state_dict["state"].items():
        for name in MOMENTS:
            if f"{name}_q" in state:
                state[name] = state.pop(f"{name}_q")
                if key == 3:  # the dense matrix
                    assert state[f"{name}_absmax"].shape == (40, 1)
                    state[f"{name}_absmax"] = state[f"{name}_absmax"].view(-1)
            else:
                signed = name == "exp_avg"
                state[name], state[f"{name}_absmax"] = quantize_blockwise(state[name], signed)
                floats[key, name] = dequantize_blockwise(state[name], state[f"{name}_absmax"], signed)
    return state_dict, floats


def test_checkpoints_of_older_versions_load(bitsandbytes):
    """Codes read as numbers, absmaxes of another shape refused, moments that are 8-bit where no new ones would be and
    the next sharded save has another form."""
    optimizer, _ = make(steps=2)
    saved, floats = of_an_older_version(optimizer)
    other, _ = make(seed=1)
    with pytest.warns(UserWarning, match=r"the 8-bit moments of mini, vector become float32 \(mini: its rank is below"):
        other.load_state_dict(saved)
    for index, (mine, theirs) in enumerate(zip(optimizer.state.values(), other.state.values(), strict=True)):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            expected = floats.get((index, name), value)
            assert torch.equal(torch.as_tensor(theirs[name]), torch.as_tensor(expected)), name
            assert getattr(theirs[name], "shape", ()) == getattr(value, "shape", ()), name


def test_a_state_of_an_older_version_that_was_put_in_by_hand_steps_on(bitsandbytes):
    """As ``ZeroRedundancyOptimizer`` and unpickling do it: the kernels' dtype read from a name that is not there."""
    optimizer, named = make(steps=2)
    other, copies = make(seed=1)
    for parameter, theirs in zip(copies.values(), named.values(), strict=True):
        parameter.data.copy_(theirs.data)
        other.state[parameter] = copy.deepcopy(optimizer.state[theirs])
    state = other.state[copies["low"]]
    for name in MOMENTS:
        state[name] = state.pop(f"{name}_q")
        of_dense = other.state[copies["dense"]]
        of_dense[f"{name}_absmax"] = of_dense[f"{name}_absmax"].view(-1)
    for each in ((optimizer, named), (other, copies)):
        train(*each, 2, 2)
    for parameter, theirs in zip(copies.values(), named.values(), strict=True):
        assert torch.equal(parameter, theirs)
    assert "exp_avg" not in state
    assert state["exp_avg_q"].dtype == torch.uint8
    assert of_dense["exp_avg_absmax"].shape == of_dense["exp_avg_sq_absmax"].shape == (40, 1)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_floats_become_8_bit_where_new_moments_would_be(state_dtype, bitsandbytes):
    """Four times the memory that was asked for; moments of all experts in one row of blocks; values that are rounded to
    ``state_dtype`` first."""
    optimizer, _ = make(steps=2, state_bits=32)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group |= {"state_bits": 8, "state_dtype": state_dtype}
    other, copies = make(seed=1)
    with pytest.warns(UserWarning, match="the moments of low, experts, dense were saved in floats, and are rounded"):
        other.load_state_dict(saved)
    for name, parameter in copies.items():
        state, floats = other.state[parameter], optimizer.state_dict()["state"][[*copies].index(name)]
        for moment in MOMENTS:
            if name in ("mini", "vector"):
                assert torch.equal(state[moment], floats[moment].to(getattr(torch, state_dtype)))
                continue
            matrices = floats[moment] if name == "experts" else floats[moment][None]
            q, absmax = (
                torch.stack(each)
                for each in zip(*(quantize_blockwise(m, moment == "exp_avg") for m in matrices), strict=True)
            )
            assert torch.equal(state[f"{moment}_q"], q.view(floats[moment].shape))
            assert torch.equal(state[f"{moment}_absmax"].flatten(), absmax.flatten())
    train(other, copies, 2, 1)


@pytest.mark.parametrize("gradients", ["drawn", "zero"])
def test_codes_that_were_cast_to_floats_are_refused(gradients, bitsandbytes):
    """torch.distributed.checkpoint copies what it finds under a name into what is there: codes into float32. The code
    of 0 is 127, which over a second moment of 0 would be a step of 1e8."""
    optimizer, named = make(steps=2 * (gradients == "drawn"))
    if gradients == "zero":
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    saved, _ = of_an_older_version(optimizer)
    state = saved["state"][2]
    for name in MOMENTS:
        state[name] = state[name].float()
        del state[f"{name}_absmax"]
    other, _ = make(seed=1)
    with pytest.raises(ValueError, match=r"parameter 2 \('mini'\).*codes of 8-bit moments.*dcp_to_torch_save"):
        other.load_state_dict(saved)
    assert not other.state


def test_what_is_rounded_to_bfloat16_is_not_said_to_be_the_same(bitsandbytes):
    """Values that are said to be exact, and are not."""
    saved, floats = of_an_older_version(make(steps=1)[0])
    for group in saved["param_groups"]:
        group["state_dtype"] = "bfloat16"
    other, copies = make(seed=1, state_dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"mini, vector become bfloat16 .*rounded to it") as told:
        other.load_state_dict(saved)
    assert not any("the same" in str(each.message) for each in told)
    assert torch.equal(other.state[copies["mini"]]["exp_avg"], floats[2, "exp_avg"].bfloat16())


def test_both_forms_at_once_are_refused(bitsandbytes):
    """What ``set_optimizer_state_dict`` makes of a full dictionary whose form is not this run's. Either may be that."""
    optimizer, _ = make(steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in MOMENTS:
        saved["state"][0][name] = torch.zeros(300, 16)
    other, _ = make(seed=1)
    with pytest.raises(ValueError, match=r"\('low'\).*'exp_avg', moments in floats, and 'exp_avg_q'.*load_state_dict"):
        other.load_state_dict(saved)
    assert not other.state


def test_state_bits_that_change_nothing_are_said(bitsandbytes):
    """Savings that a user counts on and does not have; a warning where some moments are 8-bit."""
    group = {"params": [("mini", nn.Parameter(torch.ones(600, 64)))], "rank": 1}
    with pytest.warns(UserWarning, match=r"changes nothing: .*\(mini: its rank is below 16\); leave it out"):
        APOLLOAdamW([group], state_bits=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        APOLLOAdamW([group, {"params": [("dense", nn.Parameter(torch.ones(40, 256)))]}], state_bits=8)
