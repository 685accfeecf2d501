"""Checkpoints of runs with ``embeddings=``: resumed as they were, and with another argument or none."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from embedding_models import make_model, make_others, train
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler
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


BFLOAT16 = {"state_dtype": "bfloat16"}
ROWS = {"second_moment": "row"} | BFLOAT16


@pytest.mark.parametrize("narrow", [True, pytest.param(False, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("saved", "asked"),
    [
        pytest.param(*pair, marks=() if None in pair else pytest.mark.full)
        for pair in itertools.permutations([None, "rows", "rows-8bit", BFLOAT16, ROWS], 2)
        if any(isinstance(each, dict) for each in pair)
    ],
)
def test_the_dtype_of_the_run_wins(saved, asked, narrow):
    """Moments that stay bfloat16 in a group that says float32, second moments that leave float32 for bfloat16, and a
    change that nothing says."""
    _, optimizer = trained(saved, narrow=narrow)
    model = make_model(narrow=narrow)
    other = APOLLOAdamW.mini(model, lr=1e-2, embeddings=asked)
    texts = warnings_of(other.load_state_dict, optimizer.state_dict())
    for group in other.param_groups:
        assert group["state_dtype"] == (
            "bfloat16" if "state_dtype=bfloat16" in group.get("embeddings", "") else "float32"
        )
        for parameter in group["params"]:
            state = other.state[parameter]
            of_rows = state["exp_avg_sq"].shape != parameter.shape
            for name, is_float32 in (("exp_avg", False), ("exp_avg_sq", of_rows)):
                assert name not in state or state[name].dtype == (
                    torch.float32 if is_float32 else getattr(torch, group["state_dtype"])
                )
    became = [text for text in texts if re.search("(become|8-bit moments of .* become) b?float", text)]
    rounds_to_8_bits = any("rounded to 8 bits" in text for text in texts)
    assert len(became) == (0 if (saved in (BFLOAT16, ROWS) and asked in (BFLOAT16, ROWS)) or rounds_to_8_bits else 1)
    assert all("lm_head.weight, wte.weight" in text for text in became)


@pytest.mark.parametrize("saved", ["rows", pytest.param("8bit", marks=pytest.mark.full)])
def test_a_state_dtype_of_all_groups_stays_the_checkpoint_s(saved):
    """A head that is float32 in a group of bfloat16, or embeddings that are bfloat16 in a group of float32."""
    model = make_model()
    train(model, optimizer := APOLLOAdamW.mini(model, embeddings=saved, state_dtype=torch.bfloat16))
    other = APOLLOAdamW.mini(make_model())
    texts = warnings_of(other.load_state_dict, optimizer.state_dict())
    assert any("state_dtype 'bfloat16' (asked for: 'float32') in parameter groups 0, 1, 3" in text for text in texts)
    for group in other.param_groups:
        expected = torch.float32 if group["name"] == "embeddings" else torch.bfloat16
        assert group["state_dtype"] == str(expected).removeprefix("torch.")
        assert {other.state[parameter]["exp_avg"].dtype for parameter in group["params"]} == {expected}


def test_a_dtype_and_its_name_are_one_argument():
    """A resumed run whose groups count as made with another argument."""
    marks = [
        {group.get("embeddings") for group in APOLLOAdamW.mini(make_model(), embeddings=given).param_groups}
        for given in (BFLOAT16, {"state_dtype": torch.bfloat16})
    ]
    assert marks[0] == marks[1]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_head_that_joins_the_dense_group_does_not_bring_its_settings(is_first):
    """A router that gets the head's rate and decay because the head comes first in the model, and a head whose own are
    lost in silence."""
    names = ["lm_head", "wte", "norm", "up", "down", "router"]
    model, plain = (
        nn.ModuleDict({name: each[name] for name in (names if is_first else names[::-1])})
        for each in (make_model(), make_model())
    )
    given = {"lr": 1e-4, "weight_decay": 0.3, "betas": (0.5, 0.9)}
    train(model, optimizer := APOLLOAdamW.mini(model, lr=1e-2, embeddings=given))
    other = APOLLOAdamW.mini(plain, lr=1e-2)
    texts = warnings_of(other.load_state_dict, optimizer.state_dict())
    (dense,) = (group for group in other.param_groups if group["name"] == "dense")
    assert (dense["lr"], dense["weight_decay"], dense["betas"]) == (1e-2, 0.0, (0.9, 0.999))
    (text,) = (text for text in texts if "other settings" in text)
    assert "the group 'dense' takes lm_head.weight, saved with" in text
    for part in ("lr 0.0001 (now 0.01)", "weight_decay 0.3 (now 0.0)", "betas (0.5, 0.9) (now (0.9, 0.999))"):
        assert part in text
    other = APOLLOAdamW.mini(plain, lr=1e-2, embeddings={"second_moment": "element"})
    assert not any("other settings" in text for text in warnings_of(other.load_state_dict, optimizer.state_dict()))
    (head,) = (group for group in other.param_groups if group["name"] == "head")
    assert (head["lr"], head["weight_decay"], head["betas"]) == (1e-4, 0.3, (0.5, 0.9))


SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, [10 * group["lr"] for group in optimizer.param_groups], total_steps=20
    ),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(optimizer, 20)],
        [3],
    ),
}


def rates(optimizer):
    return {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize(("saved", "asked"), [(None, "rows"), pytest.param("rows", None, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_brought_along_by_the_line_that_the_warning_has(name, saved, asked):
    """Rates that shift by a group, or a step that raises in torch: the rates of the run without a break."""
    model = make_model()
    optimizer = APOLLOAdamW.mini(model, lr=1e-3, embeddings=saved, embedding_lr=1e-4)
    scheduler, expected = SCHEDULERS[name](optimizer), []
    for step in range(6):
        if step == 4:
            states_of_both = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        optimizer.step()
        scheduler.step()
        expected.append(rates(optimizer))
    optimizer = APOLLOAdamW.mini(make_model(), lr=1e-3, embeddings=asked, embedding_lr=1e-4)
    scheduler = SCHEDULERS[name](optimizer)
    text = next(text for text in warnings_of(optimizer.load_state_dict, states_of_both[0]) if "scheduler" in text)
    assert f"has {5 if saved else 4} parameter groups and the optimizer {5 if asked else 4}" in text
    line = text[text.index("scheduler.load_state_dict(") :]
    exec(line, {"scheduler": scheduler, "optimizer": optimizer, "saved": states_of_both[1]})
    for each in expected[4:]:
        optimizer.step()
        scheduler.step()
        assert rates(optimizer) == pytest.approx(each)


def test_what_torch_has_mixed_is_refused_with_the_way_out():
    """set_optimizer_state_dict, which names no cause, and a dictionary that then is loaded as it is."""
    model, optimizer = trained("rows")
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions())
    other = APOLLOAdamW.mini(model, lr=1e-2)
    with pytest.raises(ValueError, match=r"another embeddings=; give the dictionary to optimizer.load_state_dict\("):
        set_optimizer_state_dict(model, other, copy.deepcopy(state))
    other.load_state_dict(state)
    assert len(other.state) == len(optimizer.state)


@pytest.mark.parametrize("asked", [None, "8bit"])
def test_marked_groups_that_the_constructor_splits(asked):
    """Groups of rows without the mark of rows, which a resumed run would not convert, or with another's mark."""
    low_rank, *dense = apollo_param_groups(make_model(), 4, embeddings="rows")
    del low_rank["rank"]
    optimizer = APOLLOAdamW([low_rank, *dense], rank=4, embeddings=asked, dense_lr=1e-3)
    marked = [group for group in optimizer.param_groups if "embeddings" in group]
    assert [group["param_names"] for group in marked] == [["lm_head.weight"], ["wte.weight"]]
    for group in marked:
        assert (group["embeddings"], group.get("second_moment")) == (
            ("rows", "row") if asked is None else ("8bit", None)
        )


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
