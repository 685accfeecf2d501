"""``second_moment``, the key of dense groups: where it may stand, and checkpoints of one form that the other takes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from kernel_cases import drawn
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.reference import dense_8bit
from apollo_triton.core.moments_8bit import dequantize_blockwise, quantize_blockwise

ROW = {"second_moment": "row"}
SHAPES = {"emb": (40, 64), "conv": (6, 3, 2, 2), "thin": (9, 1), "norm": (64,)}
FORMS = {"float32": {}, "bfloat16": {"state_dtype": "bfloat16"}, "8-bit": {"state_bits": 8}}


def make(second_moment, form, steps=0):
    """An optimizer of one group, whose key is left out for None."""
    named = {name: nn.Parameter(drawn(shape, 1)) for name, shape in SHAPES.items()}
    group = {"params": [*named.items()]} | ({} if second_moment is None else {"second_moment": second_moment})
    optimizer = APOLLOAdamW([group], lr=1e-2, min_8bit_size=2, **FORMS[form])
    train(optimizer, named, steps)
    return optimizer, named


def train(optimizer, named, steps):
    for step in range(steps):
        for index, parameter in enumerate(named.values()):
            parameter.grad = drawn(parameter.shape, 10 * step + index)
        optimizer.step()


def floats(state, name):
    """A moment as float32, whatever its form."""
    if f"{name}_q" in state:
        return dequantize_blockwise(state[f"{name}_q"], state[f"{name}_absmax"].view(-1), signed=name == "exp_avg")
    return state[name].float()


def as_stored(values, form, name):
    """The numbers that are left of float32 moments in a form."""
    if form == "8-bit":
        return dequantize_blockwise(*quantize_blockwise(values, name == "exp_avg"), signed=name == "exp_avg")
    return values.to(torch.bfloat16 if form == "bfloat16" else torch.float32).float()


@pytest.mark.parametrize("theirs", FORMS)
@pytest.mark.parametrize("ours", FORMS)
@pytest.mark.parametrize("second_moment", ["row", "element"])
def test_checkpoints_of_the_other_form_load(theirs, ours, second_moment, bitsandbytes):
    """A mean over the wrong dimensions, codes averaged as numbers, a V of rows in bfloat16, a state that the next step
    refuses, a change that is not said."""
    other_form = {"row": None, "element": "row"}[second_moment]
    optimizer, given_ = make(other_form, theirs, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= {"state_bits": 32, "state_dtype": "float32", **FORMS[ours]}
    if second_moment == "element":
        saved["param_groups"][0]["second_moment"] = "element"
    before = copy.deepcopy(saved)
    loaded, named = make(second_moment, ours)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded.load_state_dict(saved)
    told = [str(each.message) for each in caught if "second moments" in str(each.message)]
    assert len(told) == 1
    assert (
        "one an element, and become one a row" if second_moment == "row" else "begins with that of its row"
    ) in told[0]
    assert "emb, conv" in told[0]
    for name, parameter in named.items():
        state, old = loaded.state[parameter], optimizer.state[given_[name]]
        # Moments of bfloat16 stay what they are where float32 is asked for.
        form = "bfloat16" if (theirs, ours) == ("bfloat16", "float32") else ours
        V = floats(old, "exp_avg_sq")
        if name == "norm":
            continue
        M = floats(old, "exp_avg")
        assert torch.equal(floats(state, "exp_avg"), M if theirs == ours else as_stored(M, form, "exp_avg"))
        if second_moment == "row":
            assert state["exp_avg_sq"].dtype == torch.float32
            expected = V.flatten(1).mean(1).view(-1, *[1] * (V.dim() - 1))
            assert state["exp_avg_sq"].shape == expected.shape
            torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=1e-6, atol=0)
        elif name != "thin":  # whose floats are both forms at once
            expected = as_stored(V.expand(parameter.shape).contiguous(), form, "exp_avg_sq")
            assert torch.equal(floats(state, "exp_avg_sq"), expected)
    train(loaded, named, 1)
    again, _ = make(second_moment, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(loaded.state_dict())
    for key, state in saved["state"].items():  # nothing of the caller's has changed
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(before["state"][key][name]))
            for name, value in state.items()
        )


def test_the_checkpoints_own_form_wins():
    """As every setting of the algorithm: a group without the key that a checkpoint has."""
    optimizer, _ = make("row", "float32", 1)
    other, named = make(None, "float32")
    with pytest.warns(UserWarning, match=r"second_moment 'row' \(asked for: 'element'\) in parameter group 0"):
        other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["second_moment"] == "row"
    assert other.state[named["emb"]]["exp_avg_sq"].shape == (40, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("element", "float32")[0].load_state_dict(make(None, "float32", 1)[0].state_dict())


def test_8_bits_need_no_bitsandbytes_in_such_a_group(monkeypatch):
    """A table of one row, which has no second moment a row, and so went to bitsandbytes at the first step."""
    monkeypatch.setattr(dense_8bit, "obstacle", lambda device: "it is not installed")
    named = {"table": (9, 64), "positions": (1, 9, 64), "row": (1, 4096), "norm": (4096,)}
    named = {name: nn.Parameter(drawn(shape, 1)) for name, shape in named.items()}
    optimizer = APOLLOAdamW([{"params": [*named.items()], **ROW, "state_bits": 8, "min_8bit_size": 2}])
    train(optimizer, named, 1)
    assert [name for name, parameter in named.items() if "exp_avg_q" in optimizer.state[parameter]] == ["table"]
    assert optimizer.state[named["positions"]]["exp_avg_sq"].shape == (1, 9, 64)


def test_8_bit_moments_of_one_row_load_as_floats(bitsandbytes):
    """A checkpoint of a version that kept them in 8 bits, which the next step would refuse."""
    weight = nn.Parameter(drawn((1, 9, 64), 1))
    optimizer = APOLLOAdamW([{"params": [("row", weight)], "state_bits": 8, "min_8bit_size": 2}])
    train(optimizer, {"row": weight}, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= ROW
    other = APOLLOAdamW([{"params": [("row", weight)], **ROW, "state_bits": 8, "min_8bit_size": 2}])
    with pytest.warns(UserWarning, match="it is one row, and its group has second_moment='row'"):
        other.load_state_dict(saved)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(other.state[weight][name].flatten(), floats(optimizer.state[weight], name).flatten())
    train(other, {"row": weight}, 1)


def test_low_rank_groups_do_not_take_it():
    """A key that is silently without effect, or that reaches a low-rank group through the constructor's rank."""
    weight, embedding = nn.Parameter(drawn((64, 48), 1)), nn.Parameter(drawn((99, 48), 1))
    with pytest.raises(
        ValueError, match="parameter group 0: second_moment='row' is for dense groups, and this one has"
    ):
        APOLLOAdamW([{"params": [weight], "rank": 4, **ROW}])
    named = [("layers.0.q_proj.weight", weight), ("embed_tokens.weight", embedding)]
    optimizer = APOLLOAdamW([{"params": named, **ROW}], rank=4)
    has_key = {group["name"]: group.get("second_moment") for group in optimizer.param_groups if group["params"]}
    assert has_key.pop("low-rank") is None
    assert {*has_key.values()} == {"row"}
    with pytest.raises(ValueError, match=r"second_moment: 'rows' .allowed: 'element' or 'row'"):
        APOLLOAdamW([{"params": [weight], "second_moment": "rows"}])
    with pytest.raises(TypeError, match=r"'second_moment' .it is a key of a dense parameter group, and no argument"):
        APOLLOAdamW([weight], second_moment="row")


@pytest.mark.parametrize("first", ["row", "element"])
def test_a_key_that_changes_after_the_first_step_is_refused(first):
    """A step that reads a row's moment as those of elements."""
    optimizer, named = make(first, "float32", 1)
    optimizer.param_groups[0]["second_moment"] = {"row": "element", "element": "row"}[first]
    start = named["emb"].detach().clone()
    with pytest.raises(ValueError, match=r"'emb'.*its state 'exp_avg_sq' has shape .* or second_moment of the group"):
        optimizer.step()
    assert torch.equal(named["emb"], start)
