"""Bad input: an error that names the argument or parameter and what is allowed, and nothing has changed.

What is changed between steps is in tests/layerwise/test_refusals.py, for every way to handle gradients.
"""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from torch import nn
from unchanged import assert_unchanged, snapshot

from apollo_triton import APOLLOAdamW


@pytest.fixture
def trained():
    """Two matrices and a vector after two steps, by name."""
    named = [
        (name, nn.Parameter(torch.randn(shape))) for name, shape in (("up", (12, 8)), ("down", (8, 12)), ("b", (5,)))
    ]
    low_rank = {"params": named[:2], "rank": 4}
    optimizer = APOLLOAdamW([low_rank, {"params": named[2:]}], lr=1e-2)
    for _ in range(2):
        for _, p in named:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer, dict(named)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1}, "Invalid learning rate: -1 "),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": "fast"}, "Invalid learning rate: 'fast'"),
        ({"lr": torch.tensor([1.0, 2.0])}, "Tensor lr must be 1-element"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        ({"betas": 0.9}, "Invalid betas: 0.9 .allowed: two numbers in .0, 1."),
        ({"eps": -1e-3}, "Invalid epsilon value: -0.001"),
        ({"eps": 0.0}, "Invalid epsilon value: 0.0 .allowed: a finite number of at least 1.2e-38"),
        ({"eps": 1e-45}, "Invalid epsilon value: 1e-45 .allowed: a finite number of at least 1.2e-38"),
        ({"lr": torch.tensor(-1.0)}, "Invalid learning rate: -1.0"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"correct_bias": 1}, "Invalid correct_bias: 1 .allowed: True or False"),
        ({"scale_front": "yes"}, "Invalid scale_front: 'yes'"),
        ({"disable_nl": None}, "Invalid disable_nl: None"),
        ({"seed": -1}, "Invalid seed: -1 .allowed: an integer from 0 to 2"),
        ({"seed": True}, "Invalid seed: True"),
        ({"seed_per_param": 2}, "Invalid seed_per_param: 2"),
        ({"backend": "cuda"}, "Invalid backend: 'cuda' .allowed: 'auto' or 'triton' or 'reference'"),
        (
            {"state_dtype": torch.float16},
            "Invalid state_dtype: torch.float16 .allowed: torch.float32 or torch.bfloat16, or their names",
        ),
        ({"state_bits": 16}, "Invalid state_bits: 16"),
        ({"capturable": 1}, "Invalid capturable: 1 .allowed: True or False"),
        ({"stochastic_rounding": 0.5}, "Invalid stochastic_rounding: 0.5"),
        ({"lr": torch.zeros((), device="meta")}, "Invalid learning rate: a torch.float32 tensor of shape"),
        ({"lr": torch.tensor(1j)}, r"Invalid learning rate: tensor\(0.\+1.j\) .allowed: .* dense real tensor"),
        ({"lr": torch.zeros(1).to_sparse()}, "Invalid learning rate: a torch.float32 tensor of shape"),
        ({"lr": 1e39}, r"Invalid learning rate: 1e\+39"),  # infinite in float32, in which a step computes
        ({"weight_decay": 1e300}, r"Invalid weight_decay value: 1e\+300"),
        ({"eps": 10**400}, "Invalid epsilon value: an integer of 1329 bits"),
        ({"state_bits": torch.tensor([8, 8])}, "Invalid state_bits: a torch.int64 tensor of shape"),
        ({"state_dtype": torch.tensor([8, 8])}, "Invalid state_dtype: a torch.int64 tensor of shape"),
        ({"max_grad_norm": 0}, "Invalid max_grad_norm: 0 .allowed: None or a number above 0"),
    ],
)
def test_constructor_options(options, text):
    with pytest.raises(ValueError, match=text):
        APOLLOAdamW([nn.Parameter(torch.zeros(4, 4))], **options)


def test_numbers_that_torch_does_not_take_are_read_as_python_s_own():
    """An integer above 2**63 and a fraction, which failed within the step."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2, "scale": 2**70}], eps=2**64, weight_decay=Fraction(1, 10))
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"rank": 0}, "parameter group 2: Invalid rank: 0 .allowed: an integer of 1 or more"),
        ({"rank": 2.0}, "Invalid rank: 2.0"),
        ({"rank": True}, "Invalid rank: True"),
        ({"rank": 9}, r"parameter 3 of shape \(16, 8\): rank 9 is above its projected width 8"),
        ({"rank": 9, "rank_above_width": True}, None),
        ({"rank": 9, "rank_above_width": 1}, "Invalid rank_above_width: 1 .allowed: True or False"),
        ({"rank": 9, "rank_above_width": True, "proj": "svd"}, r"rank 9 is above its 8 singular vectors"),
        ({"rank": 9, "proj_type": "left"}, None),
        ({"rank": 17, "proj_type": "left"}, r"rank 17 is above its projected width 16"),
        ({"rank": 9, "proj_type": "left", "proj": "svd"}, r"rank 9 is above its 8 singular vectors"),
        ({"rank": 2, "proj": "rand"}, "Invalid proj: 'rand' .allowed: 'random' or 'svd'"),
        ({"rank": 2, "proj_type": "up"}, "Invalid proj_type: 'up'"),
        ({"rank": 2, "scale_type": "row"}, "Invalid scale_type: 'row' .allowed: 'channel' or 'tensor'"),
        ({"rank": 2, "scale": 0}, "Invalid scale: 0 "),
        ({"rank": 2, "scale": float("inf")}, "Invalid scale: inf"),
        (
            {"rank": 2, "scale": "Auto"},
            "parameter group 2: Invalid scale: 'Auto' .allowed: a number above 0, or 'auto'",
        ),
        ({"rank": 2, "scale": "auto "}, "Invalid scale: 'auto ' .allowed: a number above 0, or 'auto'"),
        ({"rank": 2, "scale": "128"}, "Invalid scale: '128' .allowed: a number above 0, or 'auto'"),
        ({"rank": 2, "scale": "auto", "proj": "svd"}, "parameter group 2: scale='auto' has no value for proj='svd'"),
        ({"rank": 2, "update_proj_gap": 0}, "Invalid update_proj_gap: 0"),
        ({"rank": 2, "distribution": "uniform"}, "Invalid distribution: 'uniform'"),
        ({"rank": 2, "lr": -3.0}, "parameter group 2: Invalid learning rate: -3.0"),
        ({"rank": 2, "max_grad_norm": 1.0}, "parameter group 2: max_grad_norm 1.0 differs from the optimizer's None"),
        ({"param_names": ["a", "b"]}, "parameter group 2: 2 param_names for 1 params"),
    ],
)
def test_added_groups(trained, keys, text):
    optimizer, _ = trained
    before = snapshot(optimizer)
    group = {"params": [nn.Parameter(torch.zeros(16, 8))], **keys}
    if "param_names" not in keys:
        group["param_names"] = [""]
    if text is None:
        optimizer.add_param_group(group)
        return
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group(group)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        (torch.zeros(4, 4, dtype=torch.float64), "dtype torch.float64; weights may be float32, bfloat16 or float16"),
        (torch.zeros(4, 4, dtype=torch.complex64), "dtype torch.complex64"),
    ],
)
@pytest.mark.parametrize("rank", [2, None])
def test_weight_dtypes(parameter, text, rank):
    with pytest.raises(ValueError, match=rf"parameter 0 \('w'\) of shape \(4, 4\) has {text}"):
        APOLLOAdamW([{"params": [("w", nn.Parameter(parameter))], "rank": rank}])


def sparse(p):
    return torch.zeros_like(p).to_sparse()


@pytest.mark.parametrize(
    ("name", "break_it", "error", "text"),
    [
        ("down", lambda p: setattr(p, "grad", sparse(p)), RuntimeError, "'down'.* does not support sparse gradients"),
        ("b", lambda p: setattr(p, "grad", sparse(p)), RuntimeError, "'b'.* does not support sparse gradients"),
        ("up", lambda p: setattr(p, "data", p.data.t()), ValueError, r"'up'.* gradient has shape \(12, 8\)"),
        ("b", lambda p: setattr(p, "data", p.data[:2]), ValueError, r"'b'.* gradient has shape \(5,\)"),
    ],
)
def test_gradients(trained, name, break_it, error, text):
    optimizer, named = trained
    break_it(named[name])
    before = snapshot(optimizer)
    with pytest.raises(error, match=text):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_state_of_another_model(trained):
    optimizer, named = trained
    foreign = []
    for shapes, rank in ((((13, 8), (8, 12), (5,)), 4), (((12, 8), (8, 12), (6,)), 4), (((12, 8), (8, 12), (5,)), 2)):
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        other = APOLLOAdamW([{"params": params[:2], "rank": rank}, {"params": params[2:]}])
        for p in params:
            p.grad = torch.ones_like(p)
        other.step()
        foreign.append(other.state_dict())
    foreign[2]["param_groups"][0]["rank"] = 4
    before = snapshot(optimizer)
    for state_dict, name in zip(foreign, ("up", "b", "up"), strict=True):
        with pytest.raises(ValueError, match=rf"'{name}'.*exp_avg.* belongs to another model"):
            optimizer.load_state_dict(state_dict)
        assert_unchanged(optimizer, before)
    adamw = torch.optim.AdamW([{"params": list(named.values())[:2]}, {"params": [named["b"]]}])
    adamw.step()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter group 0: it is a group of AdamW"):
        optimizer.load_state_dict(adamw.state_dict())
    assert_unchanged(optimizer, before)
    missing = copy.deepcopy(optimizer.state_dict())
    del missing["state"][1]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"'down'.*'exp_avg_sq' is missing"):
        optimizer.load_state_dict(missing)
    fewer = copy.deepcopy(optimizer.state_dict())
    fewer["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(fewer)
    assert_unchanged(optimizer, before)


def test_load_hooks_see_and_may_change_what_is_loaded(trained):
    optimizer, named = trained
    saved = optimizer.state_dict()

    def rename(opt, state_dict):
        return state_dict | {"param_groups": state_dict["renamed"]}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict({"state": saved["state"], "renamed": saved["param_groups"]})
    assert optimizer.state[named["up"]]["exp_avg"].shape == (12, 4)


def test_empty_lists_and_parameters_without_gradients():
    with pytest.raises(ValueError, match="empty parameter list"):
        APOLLOAdamW([])
    optimizer = APOLLOAdamW([{"params": [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(0, 4))], "rank": 2}])
    optimizer.step()
    assert not optimizer.state
    assert optimizer.skipped_updates.item() == 0


def broken_by(optimizer, named, what):
    """Spoils something between two steps."""
    weight = named["up"]
    if what == "weight":
        weight.data, weight.grad = weight.data.double(), None
        weight.grad = torch.ones(12, 8, dtype=torch.float64)
    elif what == "gradient":
        if not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this torch has no gradients of another dtype")
        weight.grad, weight.grad_dtype = None, torch.float64
        weight.grad = torch.ones(12, 8, dtype=torch.float64)
    elif what == "negated":
        weight.grad = torch._neg_view(torch.ones(12, 8))
    elif what == "negated weight":
        weight.data = torch._neg_view(weight.data.clone())
    elif what == "key":
        del optimizer.param_groups[0]["state_bits"]
    elif what == "group":
        added = nn.Parameter(torch.ones(4, 4))
        added.grad = torch.ones(4, 4)
        optimizer.param_groups.append({"params": [added], "param_names": ["added"], "lr": 0.1})
    else:
        added = nn.Parameter(torch.ones(4, 4))
        added.grad = torch.ones(4, 4)
        optimizer.param_groups[0]["params"].append(added)


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("weight", r"'up'.* has dtype torch.float64; weights may be"),
        ("gradient", r"'up'.*its gradient has dtype torch.float64; gradients may be"),
        ("negated", r"'up'.*its gradient is negated.*resolve_neg"),
        ("negated weight", r"'up'.* is negated where it is read.*resolve_neg"),
        ("key", r"parameter group 0: 'state_bits' is missing; use optimizer.add_param_group"),
        ("group", r"parameter group \d: 'betas' is missing; use optimizer.add_param_group"),
        ("names", r"parameter group 0 has 3 params and 2 param_names"),
    ],
)
def test_what_changes_between_steps_is_checked_again(trained, what, text):
    """A plan that takes what it has seen once for granted, and kernels that are given foreign addresses or bits."""
    optimizer, named = trained
    broken_by(optimizer, named, what)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", "x"), ("step", -5), ("step", float("nan")), ("step", torch.ones(3)), ("seed", "x"), ("seed", -1)],
)
def test_a_saved_state_with_impossible_numbers_is_refused_whole(trained, name, value):
    optimizer, _ = trained
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["exp_avg"].fill_(9.0)
    saved["state"][2][name] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"'b'.* its state '{name}' is .*allowed"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    with pytest.raises(
        ValueError, match=r"state_dict: param_groups and state missing, it has \['model', 'optimizer'\]"
    ):
        optimizer.load_state_dict({"model": {}, "optimizer": saved})


def test_a_parameter_is_in_a_group_once():
    weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"parameter 1 .* is in parameter group 0 twice"):
        APOLLOAdamW([weight, weight])
