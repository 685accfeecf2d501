"""What a user types: a model for parameters, AdamW's options, misspelt options and keys, groups in any order, and
settings that are allowed and do not do what was meant.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from itertools import permutations

import pytest
import torch
from torch import nn
from unchanged import assert_unchanged, snapshot
from warned import warnings_of

from apollo_triton import APOLLOAdamW, QAPOLLOAdamW, apollo_param_groups
from apollo_triton.tools.validate.backend_run import BackendRun
from apollo_triton.tools.validate.cases import Case


def make_model(dtype=torch.float32):
    return nn.ModuleDict({"attn": nn.Linear(16, 16), "mlp": nn.Linear(16, 32)}).to(dtype)


# --- arguments


@pytest.mark.parametrize("optimizer", [APOLLOAdamW, QAPOLLOAdamW])
def test_a_model_or_one_group_in_place_of_parameters(optimizer):
    """ "'ModuleDict' object is not iterable", or a list of the names of its children."""
    name = optimizer.__name__
    with pytest.raises(TypeError, match=rf"{name} was given a model \(ModuleDict\).*{name}.apollo\(model, \.\.\.\)"):
        optimizer(make_model())
    with pytest.raises(TypeError, match=rf"{name} was given a model \(Sequential\)"):
        optimizer(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"was given a dictionary.*\['params', 'rank'\]; give .*list of groups"):
        optimizer({"params": make_model().parameters(), "rank": 4})
    with pytest.raises(ValueError, match=r"parameter group 0 has no 'params', only \['rank'\]"):
        optimizer([{"rank": 4}])


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"fused": True}, "'fused' .not needed: on a GPU"),
        ({"foreach": None}, "'foreach' .not needed"),
        ({"amsgrad": False}, "'amsgrad' .not here"),
        ({"maximize": True}, "'maximize' .not here: negate the loss"),
        ({"differentiable": False}, "'differentiable' .not here"),
        ({"weight_dcay": 0.1}, "'weight_dcay' .did you mean 'weight_decay'"),
        ({"learning_rate": 0.1}, "'learning_rate' .did you mean 'lr'"),
        ({"target_module": ["mlp"]}, "'target_module' .did you mean 'target_modules'"),
        ({"update_proj_gab": 10}, "'update_proj_gab' .did you mean 'update_proj_gap'"),
        ({"LR": 0.1}, "'LR' .did you mean 'lr'"),
        ({"zzz": 1}, "'zzz' .allowed: backend, betas"),
    ],
)
def test_unknown_options_are_answered(option, text):
    """The factories accepted a misspelt group key, and it did nothing."""
    model = make_model()
    for make in (APOLLOAdamW.apollo, APOLLOAdamW.mini, apollo_param_groups):
        keys = {} if make == APOLLOAdamW.mini else {"rank": 4}
        with pytest.raises(TypeError, match=f"unknown option {text}"):
            make(model, **keys, **option)
    # Also of what is no argument of the constructor, such as a group's key.
    with pytest.raises(TypeError, match=f"APOLLOAdamW: unknown option {text}"):
        APOLLOAdamW(model.parameters(), **option)


def test_known_options_go_where_they_belong():
    """QAPOLLOAdamW's own options refused by the factory, and a signature that help() and type checkers cannot see."""
    optimizer = QAPOLLOAdamW.apollo(make_model(), 4, optim_bits=8, seed=3, scale=2.0, target_modules=["mlp"])
    with pytest.raises(TypeError, match=r"QAPOLLOAdamW: unknown option 'optim_bit' .did you mean 'optim_bits'"):
        QAPOLLOAdamW.apollo(make_model(), 4, optim_bit=8)
    assert {(g["state_bits"], g["seed"], g.get("scale")) for g in optimizer.param_groups} == {(8, 3, 2.0), (8, 3, None)}
    parameters = inspect.signature(APOLLOAdamW).parameters
    assert list(parameters)[:3] == ["params", "lr", "betas"]
    assert parameters["capturable"].kind is inspect.Parameter.KEYWORD_ONLY
    assert not [each for each in parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]


# --- groups


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"rnak": 4}, "parameter group 0: 'rnak' does nothing .did you mean 'rank'"),
        ({"rank": 4, "scal": 4}, "'scal' does nothing .did you mean 'scale'"),
        ({"rank": 4, "update_proj_gab": 4}, "did you mean 'update_proj_gap'"),
        ({"beta": (0.9, 0.99)}, "did you mean 'betas'"),
        ({"learning_rate": 0.1}, "did you mean 'lr'"),
        ({"Lr": 0.1}, "'Lr' does nothing .did you mean 'lr'"),
        ({"amsgrad": True}, "'amsgrad' does nothing .not here"),
        ({"target_modules": ["mlp"]}, "'target_modules' does nothing in a group: it is an argument of APOLLOAdamW"),
        ({"scale": 128.0, "scale_type": "tensor"}, "has no 'rank'.*'scale_type' and 'scale' has no effect"),
        # what programs, schedulers and other optimizers put into groups
        ({"rank": 4, "name": "a", "initial_lr": 1, "max_lr": 1, "min_lr": 1, "lr_scale": 1, "scale_lr": True}, None),
        ({"amsgrad": False, "foreach": None, "fused": True, "maximize": False, "momentum": 0.9, "layer": 1}, None),
        ({"rank": None, "scale": 128.0}, None),  # dense on purpose
        ({"use_muon": False, "wd_mult": 1.0, "lr_mult": 1.0, "swa_lr": 1, "group_name": "b", "swa": 1}, None),
        ({"weight_decay_mult": 1.0, "apply_weight_decay": True, "initial_weight_decay": 0.1, "eta": 1}, None),
    ],
)
def test_keys_of_a_group_that_do_nothing(keys, text):
    found = warnings_of(APOLLOAdamW, [{"params": make_model()["mlp"].weight, **keys}])
    assert len(found) == (text is not None)
    if text is not None:
        with pytest.warns(UserWarning, match=text):
            APOLLOAdamW([{"params": make_model()["mlp"].weight, **keys}])


def test_a_low_rank_group_without_parameters_warns():
    """What the Trainer's string makes of GPT-2: everything trained densely."""
    model = make_model()
    found = warnings_of(APOLLOAdamW, [{"params": [], "rank": 4}, {"params": model.parameters()}])
    assert ["parameter group 0 has rank 4 and no parameters" in each for each in found] == [True]
    assert not warnings_of(APOLLOAdamW, [{"params": []}, {"params": model.parameters()}])


def groups_of(model):
    return [
        {"params": [("attn.weight", model["attn"].weight)], "rank": 4},
        {"params": [model["mlp"].weight]},
        {"params": [model["attn"].bias], "param_names": ["attn.bias"]},
        {"params": model["mlp"].bias},
    ]


@pytest.mark.parametrize("order", list(permutations(range(4)))[::5])
def test_groups_with_and_without_names_in_any_order(order):
    """ "with/without names" of torch.optim, if the first group had none."""
    model = make_model()
    given = [groups_of(model)[index] for index in order]
    optimizer = APOLLOAdamW(given)
    names = {p: name for g in optimizer.param_groups for p, name in zip(g["params"], g["param_names"], strict=True)}
    assert (names[model["attn"].weight], names[model["attn"].bias]) == ("attn.weight", "attn.bias")
    assert names[model["mlp"].bias] == f"group {order.index(3)}, 0"
    assert len(names) == 4
    assert "param_names" not in given[order.index(1)]  # of the caller


def test_a_refused_group_leaves_no_names_behind():
    model = make_model()
    optimizer = APOLLOAdamW([{"params": [model["attn"].weight]}])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [("a", model["attn"].weight)]})
    assert_unchanged(optimizer, before)
    optimizer.add_param_group({"params": [("mlp", model["mlp"].weight)]})
    assert [g["param_names"] for g in optimizer.param_groups] == [["group 0, 0"], ["mlp"]]


# --- what was most likely not meant


def test_parameters_alone_are_plain_adamw_and_said_to_be():
    model = make_model()
    (text,) = warnings_of(APOLLOAdamW, model.parameters())
    assert "no parameter has a 'rank', so this is AdamW with AdamW's memory (matrices: 2)" in text
    assert len(warnings_of(QAPOLLOAdamW, model.named_parameters())) == 1
    assert not warnings_of(APOLLOAdamW, [{"params": model.parameters()}])  # a group, so meant
    assert not warnings_of(APOLLOAdamW, [model["mlp"].bias])
    assert not warnings_of(APOLLOAdamW, nn.Linear(4, 4).requires_grad_(False).parameters())


@pytest.mark.parametrize("lr", [1e-6, 1e-5, torch.tensor(1e-5)])
def test_bfloat16_weights_at_a_rate_that_rounds_updates_away(lr):
    """46 % of the way at 1e-5, and nothing says so."""
    (text,) = warnings_of(APOLLOAdamW.apollo, make_model(torch.bfloat16), rank=4, lr=lr)
    assert f"bfloat16 weights at lr={float(lr):g} without stochastic rounding lose updates" in text
    model = make_model(torch.bfloat16)
    optimizer = APOLLOAdamW([{"params": model["attn"].parameters()}], lr=1e-2)
    again = {"params": model["mlp"].parameters(), "lr": lr}
    assert len(warnings_of(optimizer.add_param_group, again)) == 1
    later = {"params": [nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))], "lr": lr}
    assert not warnings_of(optimizer.add_param_group, later)  # once


@pytest.mark.parametrize(
    ("keys", "least"), [({"rank": None}, 1e-4), ({"rank": 16, "scale": 1}, 2e-4), ({"rank": 16, "scale": "auto"}, 4e-5)]
)
def test_how_low_a_rate_may_be_depends_on_the_size_of_updates(keys, least):
    """One limit for all: noise where "auto" moves 2.8 times as far as AdamW, silence where the paper's 1 moves half."""
    group = {"params": [nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))], **keys}
    assert len(warnings_of(APOLLOAdamW, [group], lr=0.8 * least)) == 1
    assert not warnings_of(APOLLOAdamW, [group], lr=1.1 * least)


def test_the_papers_rate_with_auto_is_said_to_be_high():
    """A rate of 1e-2 from the paper or an older program, with updates that are now AdamW's: the run diverges."""
    wide = nn.ModuleDict({"mlp": nn.Linear(512, 512, bias=False)})
    (text,) = warnings_of(APOLLOAdamW.mini, wide, lr=1e-2)
    assert "group 0: lr=0.01 with scale='auto' is taken as AdamW's rate, and is high for matrices of width 512" in text
    for options in ({"lr": 1e-3}, {"lr": 1e-2, "scale": 128.0}):
        assert not warnings_of(APOLLOAdamW.mini, wide, **options)
    assert not warnings_of(APOLLOAdamW.mini, nn.ModuleDict({"mlp": nn.Linear(64, 64)}), lr=1e-2)
    wide["mlp"].requires_grad_(False)  # and an adapter is trained
    wide["up"] = nn.Linear(64, 64, bias=False)
    assert not warnings_of(APOLLOAdamW.mini, wide, lr=1e-2)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"lr": 1e-2}),
        (torch.bfloat16, {"lr": 2e-4}),
        (torch.bfloat16, {"lr": 1e-5, "stochastic_rounding": True}),
        (torch.bfloat16, {"lr": 0.0}),
        (torch.float32, {"lr": 1e-5}),
    ],
)
def test_weights_that_keep_their_updates_are_not_warned_of(dtype, options):
    assert not warnings_of(APOLLOAdamW.apollo, make_model(dtype), rank=4, **options)
    assert not warnings_of(APOLLOAdamW.mini, make_model(dtype), **options)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_an_optimizer_say_nothing_again_and_take_groups(way):
    model = make_model(torch.bfloat16)
    with pytest.warns(UserWarning, match="bfloat16"):
        optimizer = APOLLOAdamW([{"params": model["mlp"].parameters(), "rnak": 4}], lr=1e-5)
    copies = []
    assert not warnings_of(lambda: copies.append(way(optimizer)))
    copies[0].add_param_group({"params": make_model()["attn"].parameters()})
    assert not warnings_of(copies[0].step)


def test_a_command_does_not_warn_of_the_odd_shapes_that_it_tries():
    case = Case("verbs", "narrow", ((40, 4),), "bf16", {"rank": 4, "lr": 1e-5})
    assert not warnings_of(BackendRun, case, "reference", torch.device("cpu"), 0)


def test_a_warning_that_is_an_error_changes_nothing():
    """The group was there, and its optimizer was thrown away, or used as if it were not."""
    model = make_model()
    optimizer = APOLLOAdamW([{"params": [model["mlp"].weight], "rank": 4}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'rnak'"):
            optimizer.add_param_group({"params": [model["attn"].weight], "rnak": 4})
    assert len(optimizer.param_groups) == 1
