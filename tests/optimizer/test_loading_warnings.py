"""What ``load_state_dict`` says of a checkpoint that is not what its user expects, another optimizer's included."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from broken_state import everything, make, same, train
from torch import nn

from apollo_triton import APOLLOAdamW


def test_one_warning_names_every_setting_that_differs():
    """A rank, a scale or Mini that was asked for, and is not what runs."""
    trained, _ = make(steps=2, betas=(0.8, 0.999), max_grad_norm=1.0)
    state_dict = trained.state_dict()
    optimizer, _ = make()
    optimizer.param_groups[0]["rank"] = 2
    optimizer.param_groups[1]["scale"] = 4.0
    with pytest.warns(UserWarning, match="checkpoint's settings instead of those that were asked for") as caught:
        optimizer.load_state_dict(state_dict)
    (text,) = [str(each.message) for each in caught]
    assert caught[0].filename == __file__
    assert "rank 4 (asked for: 2) in parameter group 0;" in text
    assert "scale 16.0 (asked for: 4.0) in parameter group 1" in text
    assert "betas (0.8, 0.999) (asked for: (0.9, 0.999)) in parameter groups 0, 1, 2, 3, 4" in text
    assert "max_grad_norm 1.0 (asked for: None)" in text
    assert optimizer.param_groups[0]["rank"] == 4


def test_what_schedulers_change_is_no_difference():
    optimizer, _ = make(steps=1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.3
    state_dict = copy.deepcopy(optimizer.state_dict())
    assert state_dict["param_groups"][0]["betas"] != (0.9, 0.999)
    for with_schedule in (False, True):
        fresh, _ = make()
        if with_schedule:
            torch.optim.lr_scheduler.OneCycleLR(fresh, max_lr=0.1, total_steps=10)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh.load_state_dict(state_dict)


def test_another_rate_to_begin_with_is_a_difference():
    """The scheduler is loaded too, and ignores the new one: what the Trainer does with another learning_rate."""
    ends = []
    for rate in (1e-2, 3e-3):
        optimizer, named = make()
        for group in optimizer.param_groups:
            group["lr"] = rate
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        train(optimizer, named, 0)
        schedule.step()
        ends.append(optimizer)
    with pytest.warns(UserWarning, match=r"initial_lr 0.01 \(asked for: 0.003\) in parameter groups 0, 1, 2, 3, 4"):
        ends[1].load_state_dict(ends[0].state_dict())


@pytest.mark.parametrize(
    ("make_other", "text"),
    [
        (torch.optim.AdamW, "parameter group 0: it is a group of AdamW"),
        (lambda params, lr: torch.optim.AdamW(params, lr, amsgrad=True), "parameter group 0: it is a group of AdamW"),
        (torch.optim.SGD, r"another optimizer of torch.optim \(it has 'momentum'\)"),
        (torch.optim.RAdam, r"another optimizer of torch.optim \(it has 'foreach'\)"),
    ],
)
@pytest.mark.parametrize("keeps_groups", [False, True])
def test_an_adamw_state_is_called_one(make_other, text, keeps_groups):
    """It has moments of the right shape for dense parameters, and failed at the first step."""
    weight, bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    other, optimizer = make_other([weight, bias], lr=0.1), APOLLOAdamW([{"params": [weight, bias]}])
    for parameter in (weight, bias):
        parameter.grad = torch.ones_like(parameter)
    other.step()
    state_dict = other.state_dict()
    if keeps_groups and state_dict["state"]:
        state_dict["param_groups"] = optimizer.state_dict()["param_groups"]
        text = r"parameter group 0, parameter 0 of shape \(4, 4\): its state is an AdamW state"
    before = everything(optimizer)
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state_dict)
    assert same(everything(optimizer), before)
    if not keeps_groups:  # one group, and two here, as the factories make: that is how most who switch come
        optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}, {"params": [bias]}])
        with pytest.raises(ValueError, match=text):
            optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("theirs", "ours", "text"),
    [
        (["a.w", "b.w"], ["b.w", "a.w"], "parameter 0 is 'b.w', .* 0 is 'a.w' .it has 'b.w' as parameter 1"),
        (["a.w", "b.w"], ["a.w", "c.w"], "parameter 1 is 'c.w', and the checkpoint's parameter 1 is 'b.w'. State goes"),
        (["module.a.w", "module.b.w"], ["b.w", "a.w"], "parameter 0 is 'b.w', and the checkpoint's"),
        (["a.w", "a.w.w"], ["w", "a.w"], "parameter 0 is 'w', and the checkpoint's parameter 0 is 'a.w'. State"),
        (["module.a.w", "_orig_mod.b.w"], ["a.w", "b.w"], None),
        (["a.w", "b.w"], ["_fsdp_wrapped_module.a._checkpoint_wrapped_module.w", "module._orig_mod.b.w"], None),
        (["a.w", "b.w"], ["base_model.model.a.base_layer.w", "_forward_module.b.w"], None),  # PEFT, Lightning
        (["a.w", "b.w"], ["model.a.w", "model.b.w"], None),
        (["group 0, 0", "group 0, 1"], ["a.w", "b.w"], None),
        (["a.w", "b.w"], ["group 1, 0", "group 1, 1"], None),
    ],
)  # fmt: skip
def test_names_are_compared(theirs, ours, text):
    """Weights of one shape in another order get each other's moments."""
    optimizers = []
    for names in (theirs, ours):
        named = [(name, nn.Parameter(torch.ones(4, 4))) for name in names]
        for _, parameter in named:
            parameter.grad = torch.ones(4, 4)
        optimizers.append(APOLLOAdamW([{"params": named, "rank": 2}]))
        optimizers[-1].step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    if text is None:
        assert not caught
    else:
        (warning,) = caught
        assert re.search(text, str(warning.message))
    kept = ours if not ours[0].startswith("group") else theirs
    assert optimizers[1].param_groups[0]["param_names"] == kept


def test_names_come_from_the_checkpoint_where_there_were_none():
    """As in ``torch.optim``, and those that ``add_param_group`` makes up are none."""
    one, two, three = (nn.Parameter(torch.ones(4)) for _ in range(3))
    named = APOLLOAdamW([{"params": [("one", one)]}, {"params": [("two", two)]}])
    unnamed = APOLLOAdamW([{"params": [two]}, {"params": [three]}])
    half = APOLLOAdamW([{"params": [("one", three)]}, {"params": [two]}])
    for optimizer in (unnamed, half):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(named.state_dict())
        assert [group["param_names"] for group in optimizer.param_groups] == [["one"], ["two"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named.load_state_dict(APOLLOAdamW([{"params": [two]}, {"params": [three]}]).state_dict())
    assert [group["param_names"] for group in named.param_groups] == [["one"], ["two"]]


@pytest.mark.parametrize("count", [1, 2])
def test_the_state_of_adamw_over_all_parameters_is_called_adamws(count):
    """It has one group where ours has two, or groups of other sizes, and only their numbers were compared."""
    weight, bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    groups = [{"params": [weight, bias]}, {"params": [nn.Parameter(torch.ones(3))]}][:count]
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}, {"params": [bias]}])
    with pytest.raises(ValueError, match="it is a group of AdamW or another optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(groups).state_dict())


def test_groups_of_other_sizes_are_refused_with_what_to_do():
    weight, bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    optimizer = APOLLOAdamW([{"params": [weight, bias], "rank": 2}, {"params": [nn.Parameter(torch.ones(3))]}])
    saved = optimizer.state_dict()
    saved["param_groups"].reverse()
    advice = "build the groups as they were saved: the same model, .* rank, embeddings, and order of the groups$"
    with pytest.raises(ValueError, match=rf"group 0 has 1 parameters, and the optimizer's 2; {advice}"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=rf"groups: 1, and the optimizer has 2; {advice}"):
        optimizer.load_state_dict(saved | {"param_groups": saved["param_groups"][:1]})
