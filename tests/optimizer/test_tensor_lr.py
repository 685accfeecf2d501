"""A learning rate that is a tensor: each group has one of its own, and groups share launches as before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from optimizer_cases import make_model, train
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from apollo_triton import APOLLOAdamW, apollo_param_groups
from apollo_triton.core import gpu


def assert_own(optimizer):
    """No two groups, and not the defaults either, have one tensor."""
    places = [group["lr"].data_ptr() for group in optimizer.param_groups] + [optimizer.defaults["lr"].data_ptr()]
    assert len(set(places)) == len(places)
    first = optimizer.param_groups[0]
    others = [float(group["lr"]) for group in optimizer.param_groups[1:]]
    before = float(first["lr"])
    first["lr"] *= 0.5
    assert float(first["lr"]) == pytest.approx(before / 2, rel=1e-6)
    assert [float(group["lr"]) for group in optimizer.param_groups[1:]] == others
    first["lr"] *= 2


def test_a_scheduler_acts_once_on_every_group():
    """0.0025 instead of 0.005: ReduceLROnPlateau reads what it has already halved for the group before."""
    optimizer = APOLLOAdamW.apollo(make_model(), 4, lr=torch.tensor(0.01))
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.005, 0.005])


@pytest.mark.parametrize("capturable", [False, True])
def test_every_way_to_a_group_gives_it_its_own(capturable):
    given = torch.tensor(0.25)
    model = make_model()
    keys = {"lr": given, "capturable": capturable}
    shared = {"lr": given}
    groups = [group | shared for group in apollo_param_groups(model, 4)]
    for optimizer in (
        APOLLOAdamW.apollo(model, 4, **keys),
        APOLLOAdamW.mini(model, **keys),
        APOLLOAdamW(apollo_param_groups(model, 4), **keys),
        APOLLOAdamW(groups, **keys),
    ):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]} | shared)
        assert_own(optimizer)
        assert_own(copy.deepcopy(optimizer))
        assert_own(pickle.loads(pickle.dumps(optimizer)))
        loaded = optimizer.state_dict()
        for group in loaded["param_groups"]:
            group["lr"] = given  # as an older version saved it
        optimizer.load_state_dict(loaded)
        assert_own(optimizer)
        assert {id(group["lr"]) for group in optimizer.param_groups}.isdisjoint({id(given)})
    assert float(given) == 0.25


def test_shared_tensors_of_an_older_pickle_are_taken_apart():
    optimizer = APOLLOAdamW.apollo(make_model(), 4, lr=torch.tensor(0.25))
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"]
    assert_own(pickle.loads(pickle.dumps(optimizer)))


def test_a_tensor_trains_as_the_number_does():
    number, tensor = make_model(), make_model()
    train(number, APOLLOAdamW.apollo(number, 4, lr=0.01), 3)
    train(tensor, APOLLOAdamW.apollo(tensor, 4, lr=torch.tensor(0.01)), 3)
    for a, b in zip(number.parameters(), tensor.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # 0.01 is rounded to float32


@pytest.mark.parametrize("device_lr", [False, True])
@pytest.mark.parametrize("backend", [pytest.param("interpreter", marks=pytest.mark.slow)], indirect=True)
def test_groups_share_launches(backend, device_lr, monkeypatch):
    """A launch for each group, as soon as each has a tensor of its own.

    Of the two groups of a model none ever shared a launch, so four stay four, also for tensors on a device
    (``capturable``). Groups with equal settings share them while their tensors, on the host, have equal values. From a
    tensor on the device a launch a group computes the step size. At rank 1 no launch writes P.
    """
    launched = []

    def launches(groups, **options):
        optimizer = APOLLOAdamW(groups, lr=torch.tensor(0.01), **options)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()

        def count():
            launched.clear()
            optimizer.step()
            return len(launched)

        return count, optimizer

    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    model = nn.ModuleDict({"mlp": nn.Linear(16, 32), "attn": nn.Linear(16, 32)})
    count, _ = launches(apollo_param_groups(model, 1), capturable=device_lr)
    assert count() == (4 + 2 if device_lr else 4)
    halves = [{"params": [nn.Parameter(torch.zeros(32, 16))], "rank": 1} for _ in range(2)]
    count, optimizer = launches(halves, capturable=device_lr)
    assert count() == (4 + 2 if device_lr else 2)
    optimizer.param_groups[0]["lr"] *= 0.5
    assert count() == (4 + 2 if device_lr else 4)
    optimizer.param_groups[1]["lr"] *= 0.5
    assert count() == (4 + 2 if device_lr else 2)
    sides = [{"params": [nn.Parameter(torch.zeros(*shape)) for shape in ((32, 16), (16, 32))], "rank": 1}]
    count, _ = launches(sides, capturable=device_lr)
    assert count() == (4 + 1 if device_lr else 4)
