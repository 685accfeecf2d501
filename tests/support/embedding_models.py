"""A small model with embedding and head, and its training, for the tests of ``embeddings=``."""

from __future__ import annotations

import torch
from torch import nn

VOCABULARY, WIDTH = 256, 16


def make_model(tied=False, narrow=True):
    """A model with an embedding, a head, matrices, a norm, biases, and a router that is too narrow to be low-rank."""
    torch.manual_seed(0)
    layers = {"wte": nn.Embedding(VOCABULARY, WIDTH), "up": nn.Linear(WIDTH, 32), "down": nn.Linear(32, WIDTH)}
    layers |= {"norm": nn.LayerNorm(WIDTH)} | ({"router": nn.Linear(WIDTH, 3, bias=False)} if narrow else {})
    model = nn.ModuleDict(layers | {"lm_head": nn.Linear(WIDTH, VOCABULARY, bias=False)})
    if tied:
        model["lm_head"].weight = model["wte"].weight
    return model


def make_others():
    """Embeddings and heads whose rows may not be tokens, beside those of ``make_model`` and adapters of both."""
    model = make_model()
    model["unembed"] = nn.ParameterDict({"W_U": nn.Parameter(torch.randn(WIDTH, VOCABULARY))})  # TransformerLens
    model["patch_embed"] = nn.Conv2d(3, WIDTH, 4, bias=False)
    model.register_parameter("pos_embed", nn.Parameter(torch.randn(1, 9, WIDTH)))
    model.register_parameter("pos_embedding", nn.Parameter(torch.randn(9, WIDTH)))
    # as PEFT has them
    model["wte"].lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.randn(2, VOCABULARY))})
    model["lm_head"].lora_B = nn.ModuleDict({"default": nn.Linear(2, VOCABULARY, bias=False)})
    return model


def loss_of(model, seed=0):
    tokens = torch.randint(VOCABULARY, (8,), generator=torch.Generator().manual_seed(seed))
    x = model["wte"](tokens)
    gate = model["router"](x).sigmoid().sum(1, keepdim=True) if "router" in model else 1.0
    x = model["norm"](x + model["down"](model["up"](x).tanh()) * gate)
    return nn.functional.cross_entropy(model["lm_head"](x), tokens.roll(1))


def train(model, optimizer, steps=2, first=0):
    for seed in range(first, first + steps):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()
