"""Learning rates and decay by kind of weight: the low-rank group, and the dense ones beside it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from warned import warnings_of

from apollo_triton import APOLLOAdamW, apollo_param_groups, attach_layerwise
from apollo_triton.core import gpu

KINDS = ["low-rank", "dense", "embeddings", "norms and biases"]


def make_model():
    torch.manual_seed(0)
    layers = {"wte": nn.Embedding(20, 16), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16), "norm": nn.LayerNorm(16)}
    return nn.ModuleDict(layers | {"lm_head": nn.Linear(16, 20, bias=False)})


MAKERS = {
    "apollo": lambda model, **options: APOLLOAdamW.apollo(model, 4, **options),
    "mini": APOLLOAdamW.mini,
    "constructor": lambda model, **options: APOLLOAdamW(model.named_parameters(), rank=4, **options),
    "groups": lambda model, lr=1e-3, weight_decay=0.0, **options: APOLLOAdamW(
        apollo_param_groups(model, 4, **options), lr=lr, weight_decay=weight_decay
    ),
}
MADE = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def values(optimizer, key):
    return [group[key] for group in optimizer.param_groups]


@MADE
def test_each_kind_has_its_rate_and_decay(make):
    """A rate that goes to the wrong kind, is taken for another's default, or decays norms."""
    optimizer = make(make_model(), lr=1e-2, weight_decay=0.5, dense_lr=1e-3, embedding_lr=1e-4)
    assert values(optimizer, "name") == KINDS
    assert values(optimizer, "lr") == [1e-2, 1e-3, 1e-4, 1e-3]
    assert values(optimizer, "weight_decay") == [0.5, 0.5, 0.5, 0.0]
    assert values(make(make_model(), lr=1e-2, embedding_lr=0.0), "lr") == [1e-2, 1e-2, 0.0, 1e-2]
    assert values(make(make_model(), lr=1e-2, dense_lr=1e-3), "lr") == [1e-2, 1e-3, 1e-3, 1e-3]
    asked = make(make_model(), lr=1e-2, weight_decay=0.5, decay_vectors=True)
    assert values(asked, "weight_decay") == [0.5] * 4
    assert values(asked, "lr") == [1e-2] * 4


@MADE
def test_weights_move_as_their_group_says(make):
    """Rates and decay that stand in the groups, and the step reads others. With gradients of zero a step multiplies by
    1 - lr * weight_decay."""
    model = make_model()
    optimizer = make(model, lr=0.5, weight_decay=0.5, dense_lr=0.25, embedding_lr=0.125)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = {"up.weight": 0.75, "down.weight": 0.75, "lm_head.weight": 0.875, "wte.weight": 0.9375}
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] * kept.get(name, 1.0), rtol=1e-6, atol=0), name


def test_a_scheduler_moves_each_kind_from_its_own_rate():
    """Rates that schedulers do not see, as one number for all would be."""
    optimizer = APOLLOAdamW.apollo(make_model(), 4, lr=1.0, dense_lr=0.5, embedding_lr=0.25)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert values(optimizer, "lr") == [0.5, 0.25, 0.125, 0.25]
    assert scheduler.get_last_lr() == [0.5, 0.25, 0.125, 0.25]


@pytest.mark.parametrize("make", [MAKERS["apollo"], MAKERS["constructor"]])
def test_tensor_rates_are_tensors_of_each_groups_own(make):
    """One tensor in two groups: a scheduler multiplies it twice."""
    rate = torch.tensor(0.5)
    optimizer = make(make_model(), lr=torch.tensor(1.0), dense_lr=rate)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    assert [float(lr) for lr in values(optimizer, "lr")] == [0.5, 0.25, 0.25, 0.25]
    assert rate == 0.5
    mixed = make(make_model(), lr=torch.tensor(1.0), dense_lr=0.25)
    assert [float(lr) for lr in values(mixed, "lr")] == [1.0, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_layer_wise_updates_take_the_rates_too(gradients):
    """Hooks that read another group's settings: the same weights, bit for bit, as by step()."""
    models = [make_model() for _ in range(2)]
    options = {"lr": 1e-2, "dense_lr": 1e-3, "embedding_lr": 1e-4, "weight_decay": 0.5}
    optimizers = [APOLLOAdamW.apollo(model, 4, **options) for model in models]
    handle = attach_layerwise(models[1], optimizers[1], gradients=gradients)
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(2):
            x = model["wte"](torch.arange(8))
            model["lm_head"](model["norm"](x + model["down"](model["up"](x).tanh()))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, rtol=0 if gradients == "freed" else 1e-5, atol=1e-7)
    handle.remove()


@pytest.mark.parametrize("make", [MAKERS["apollo"], MAKERS["constructor"], MAKERS["groups"]])
@pytest.mark.parametrize("name", ["dense_lr", "embedding_lr"])
@pytest.mark.parametrize("value", [-1.0, "1e-4", float("nan"), torch.ones(2)])
def test_rates_are_checked_by_name(make, name, value):
    with pytest.raises(ValueError, match=f"{name}: (Invalid learning rate|Tensor lr must be 1-element)"):
        make(make_model(), **{name: value})
    with pytest.raises(ValueError, match=r"Invalid decay_vectors: 'no' .allowed: True or False"):
        make(make_model(), decay_vectors="no")


def test_a_rate_for_embeddings_that_are_not_there():
    """A misspelt layer, or parameters without the embedding's name, and the rate silently goes nowhere."""
    model = nn.ModuleDict({"up": nn.Linear(16, 32)})
    (text,) = warnings_of(APOLLOAdamW.apollo, model, rank=4, embedding_lr=1e-4)
    assert "embedding_lr=0.0001 has no effect" in text
    (text,) = warnings_of(APOLLOAdamW, model.named_parameters(), rank=4, embedding_lr=1e-4)
    assert "embedding_lr=0.0001 has no effect" in text
    assert not warnings_of(APOLLOAdamW.apollo, make_model(), rank=4, embedding_lr=1e-4)
    assert not warnings_of(APOLLOAdamW, make_model().named_parameters(), rank=4, embedding_lr=1e-4)


@pytest.mark.parametrize("backend", [pytest.param("interpreter", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6),
        pytest.param({"dense_lr": 1e-3}, 6, marks=pytest.mark.full),
        ({"weight_decay": 0.5}, 8),
        pytest.param({"weight_decay": 0.5, "decay_vectors": True}, 6, marks=pytest.mark.full),
        pytest.param({"dense_lr": 1e-3, "embedding_lr": 1e-4}, 8, marks=pytest.mark.full),
        ({"capturable": True}, 14),
    ],
)
def test_groups_of_equal_settings_share_launches(backend, options, expected, monkeypatch):
    """A launch for each name: four for the matrices of two orientations, two for all that is dense, and two more for
    each kind that has other settings. With rates on the device each group has launches of its own, and one for its step
    size."""
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    model = make_model()
    optimizer = APOLLOAdamW(model.named_parameters(), rank=1, lr=1e-2, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    launched.clear()
    optimizer.step()
    assert len(launched) == expected
