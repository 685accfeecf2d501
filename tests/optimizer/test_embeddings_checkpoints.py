"""Checkpoints of runs with ``embeddings=``: resumed as they were, and with another argument or none."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from embedding_models import make_model, make_others, train
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from warned import warnings_of

from apollo_triton import APOLLOAdamW, apollo_param_groups
from apollo_triton.core.embeddings import CHOICES
from apollo_triton.core.moments_8bit import dequantize_blockwise

SHORT = (None, "rows-8bit"), ("rows-8bit", None), ("8bit", "rows"), (None, None)


def trained(embeddings, **options):
    model = make_model(**options)
    optimizer = APOLLOAdamW.mini(model, lr=1e-2, embeddings=embeddings)
    train(model, optimizer)
    return model, optimizer


def moments(state, name):
    """A float moment, or the values of an 8-bit one."""
    if name in state:
        return state[name]
    codes = state[f"{name}_q"]
    return dequantize_blockwise(codes.flatten(), state[f"{name}_absmax"].flatten(), name == "exp_avg").view(codes.shape)


def states(optimizer):
    """The state of each parameter, by its name."""
    return {
        name: optimizer.state[parameter]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


@pytest.mark.parametrize("way", ["plain", "DCP"])
@pytest.mark.parametrize("embeddings", ["rows-8bit", pytest.param({"second_moment": "row"}, marks=pytest.mark.full)])
def test_a_resumed_run_is_exact(embeddings, way, tmp_path):
    """A group key or a moment that a checkpoint loses: the same bits as without the break."""
    model, optimizer = trained(embeddings)
    resumed = copy.deepcopy(model)
    other = APOLLOAdamW.mini(resumed, lr=1e-2, embeddings=embeddings)
    if way == "plain":
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        assert not warnings_of(other.load_state_dict, torch.load(tmp_path / "state.pt", weights_only=True))
    else:
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
        state = {"optimizer": get_optimizer_state_dict(resumed, other)}
        dcp.load(state, checkpoint_id=tmp_path)
        set_optimizer_state_dict(resumed, other, state["optimizer"])
        resumed.load_state_dict(model.state_dict())  # an empty step came before
    for each in ((model, optimizer), (resumed, other)):
        train(*each, first=2)
    for first, second in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)
    assert [group.get("embeddings") for group in other.param_groups].count(None) == 3


@pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        pytest.param(*pair, marks=() if pair in SHORT else pytest.mark.full)
        for pair in itertools.product([None, *CHOICES], repeat=2)
    ],
)
def test_the_argument_of_the_run_wins(saved, asked, narrow):
    """State that goes to another weight of its shape, since the groups are others and state goes by order; a form that
    comes back from the checkpoint; a learning rate that does not. ``narrow``: with a weight that stays in the dense
    group, so that one of the two has a group more."""
    _, optimizer = trained(saved, narrow=narrow)
    for group in optimizer.param_groups:
        group["lr"] = 0.125  # as a scheduler does
    model = make_model(narrow=narrow)
    other = APOLLOAdamW.mini(model, lr=1e-2, embeddings=asked)
    expected = copy.deepcopy([[{**group, "params": 0} for group in other.param_groups]])[0]
    texts = warnings_of(other.load_state_dict, optimizer.state_dict())
    assert [{**group, "params": 0} for group in other.param_groups] == [each | {"lr": 0.125} for each in expected]
    assert not any("settings" in text or "State goes by order" in text for text in texts)
    assert bool(texts) == (saved != asked)
    of_names = states(optimizer)
    assert len(of_names) == len(other.state) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        before, after = of_names[name], other.state[parameter]
        tolerance = 2 * moments(before, "exp_avg").abs().max() / 127
        torch.testing.assert_close(moments(before, "exp_avg"), moments(after, "exp_avg"), rtol=0, atol=float(tolerance))
        second = [moments(each, "exp_avg_sq") for each in (before, after)]
        means = [each.flatten(1).mean(1) if parameter.dim() > 1 and name in TABLES else each for each in second]
        torch.testing.assert_close(*means, rtol=0.1, atol=float(second[0].max()) / 50)
    train(model, other, steps=1)


TABLES = "wte.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("saved", "asked"), [(None, "rows"), ("rows", None), ("rows", "8bit"), ("older rows", "rows"), ("older rows", None)]
)
def test_embeddings_that_rows_are_not_for(saved, asked):
    """Groups that are as many and hold others, which were loaded by order; two groups of one name, which loggers
    refuse. "older rows": as a version had them that took all embeddings and heads for tables of tokens."""
    optimizer = APOLLOAdamW.mini(make_others(), embeddings="8bit" if saved == "older rows" else saved, min_8bit_size=2)
    if saved == "older rows":
        for group in optimizer.param_groups:
            if "embeddings" in group:
                group |= {"embeddings": "rows", "second_moment": "row", "state_bits": 32}
    fill(optimizer)
    other = APOLLOAdamW.mini(make_others(), embeddings=asked, min_8bit_size=2)
    expected = [{**group, "params": 0} for group in other.param_groups]
    warnings_of(other.load_state_dict, optimizer.state_dict())
    assert [{**group, "params": 0} for group in other.param_groups] == expected
    before, after = states(optimizer), states(other)
    for name in before:
        means = [moments(each[name], "exp_avg_sq").mean() for each in (before, after)]
        torch.testing.assert_close(*means, rtol=0.02, atol=0)
    fill(other)


def fill(optimizer):
    """A step with another gradient for each parameter, by which its state can be told from the others'."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            parameter.grad = torch.full_like(parameter, 1.0 + sum(map(ord, name)) % 97)
    optimizer.step()


def test_a_projection_cannot_be_converted():
    """Moments of a projection that are read as those of the weight, and an optimizer that has changed all the same."""
    model = make_model()
    train(model, optimizer := APOLLOAdamW.mini(model, target_modules=["auto", "lm_head"]))
    other = APOLLOAdamW.mini(make_model(), embeddings="rows")
    with pytest.raises(ValueError, match="different number of parameter groups: 4, and the optimizer has 5"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_a_tied_head_and_groups_by_hand():
    """A checkpoint with as many groups, of which only a key tells that it was made otherwise."""
    _, optimizer = trained(None, tied=True)
    other = APOLLOAdamW(apollo_param_groups(make_model(tied=True), 1, scale_type="tensor", embeddings="8bit"))
    warnings_of(other.load_state_dict, optimizer.state_dict())
    assert states(other)["wte.weight"]["exp_avg_q"].dtype == torch.uint8
    assert "exp_avg" in states(other)["router.weight"]


def test_other_names_are_no_reason_to_regroup():
    """A checkpoint of another model, which is loaded by the names that happen to fit."""
    _, optimizer = trained("rows")
    state = optimizer.state_dict()
    state["param_groups"][1]["param_names"] = ["another"]
    for given in (state, APOLLOAdamW.mini(make_model(), embeddings="rows").state_dict()):
        for group in given["param_groups"]:
            group["param_names"] = group["param_names"] if given is state else None
        with pytest.raises(ValueError, match="different number of parameter groups: 5, and the optimizer has 4"):
            APOLLOAdamW.mini(make_model()).load_state_dict(given)


def test_a_checkpoint_of_many_files_is_converted_by_way_of_one(tmp_path):
    """torch.distributed.checkpoint loads into tensors of the shapes that are here, so that the way out of its error is
    the one file that docs/troubleshooting.md names."""
    model, optimizer = trained(None)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / "saved")
    other = APOLLOAdamW.mini(model, lr=1e-2, embeddings="rows")
    dcp_to_torch_save(tmp_path / "saved", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)["optimizer"]
    assert any("one a row, their mean" in text for text in warnings_of(other.load_state_dict, whole))
    for name in TABLES:
        parameter = model.get_parameter(name)
        expected = optimizer.state[parameter]["exp_avg_sq"].mean(1, keepdim=True)
        torch.testing.assert_close(other.state[parameter]["exp_avg_sq"], expected)
