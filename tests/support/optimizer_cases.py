"""What the tests of the whole optimizer share: a small model, its training, the kinds of low-rank groups."""

from __future__ import annotations

import torch
from torch import nn

OPTIONS = {
    "channel": {"rank": 4, "scale_type": "channel", "update_proj_gap": 5},
    "tensor": {"rank": 1, "scale_type": "tensor", "scale": 128.0, "update_proj_gap": 5},
    "svd": {"rank": 4, "proj": "svd", "update_proj_gap": 5},
}


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12)), "norm": nn.LayerNorm(12)})
    return model.to(dtype)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        loss = (model["norm"](model["mlp"](x)) - x.flip(1)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
