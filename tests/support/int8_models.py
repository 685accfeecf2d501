"""What the tests of int8 checkpoints share: small models of drawn weights, one layer of which is int8."""

from __future__ import annotations

import distributed_cases
import torch
from torch import nn

from apollo_triton import quantize_model

PARTS = ("weight_q", "weight_scale", "weight_zero")


def drawn(shape, *key):
    """Normal numbers that depend on ``key`` alone, on the device of the fixture ``backend``."""
    with torch.device("cpu"):
        values = distributed_cases.drawn(shape, *key)
    return values.to(torch.get_default_device())


def floats(seed=0, dtype=torch.float32):
    model = nn.ModuleDict({"mlp": nn.Linear(24, 40), "head": nn.Linear(40, 5)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name, seed) * 0.3)
    return model.to(dtype)


def int8(seed=0, group_size=8, dtype=torch.float32):
    return quantize_model(floats(seed, dtype), group_size=group_size)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
