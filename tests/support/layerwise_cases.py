"""Shared by the tests of layer-wise updates: a small model, its optimizer, its training."""

from __future__ import annotations

import torch
from torch import nn

from apollo_triton import APOLLOAdamW, apollo_param_groups, attach_layerwise


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)]
    return nn.ModuleDict({"mlp": nn.Sequential(*layers), "norm": nn.LayerNorm(24)}).to(dtype)


def make_optimizer(model, lr=1e-2, seed_per_param=False, **group):
    groups = apollo_param_groups(model, update_proj_gap=2, **group)
    groups[0]["weight_decay"] = 0.1
    return APOLLOAdamW(groups, lr=lr, seed=5, seed_per_param=seed_per_param)


def loss_of(model, step):
    weight = next(model.parameters())
    x = torch.randn(8, 24, generator=torch.Generator("cpu").manual_seed(step), device="cpu").to(weight)
    return (model["norm"](model["mlp"](x)) - x.flip(1)).float().square().mean()


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(first, second, optimizers):
    """The weights and all state are equal bit for bit."""
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
        states = [optimizer.state[x] for optimizer, x in zip(optimizers, (p, q), strict=True)]
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name])), name


def pair(dtype=torch.float32, **group):
    """Two equal models with an optimizer each, the second with hooks, and the handle of the hooks."""
    models = [make_model(dtype) for _ in range(2)]
    optimizers = [make_optimizer(model, **group) for model in models]
    return models, optimizers, attach_layerwise(models[1], optimizers[1])
