"""Shared by the tests of layer-wise updates of sharded models: a small model, and the ways to shard it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed_cases import drawn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

WIDTH, WORDS = 13, 11
APOLLO = {"rank": 4, "update_proj_gap": 2, "weight_decay": 0.1}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 16.0, "update_proj_gap": 2}


class Block(nn.Module):
    """Weights of 20, 13 and 4 rows: on three ranks pieces that are uneven, and an empty one."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.gate, self.spare = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH, bias=False)
        self.uses_spare = self.checkpoints = False

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.checkpoints else self.inner(x)

    def inner(self, x):
        x = x + self.down(self.up(self.norm(x)).tanh()) * self.gate(x).sigmoid().mean(-1, keepdim=True)
        return x + self.spare(x) if self.uses_spare else x


class Model(nn.Module):
    """The head is the embedding. ``spare`` is never used."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(drawn(tuple(parameter.shape), name) * 0.3)

    def forward(self, words):
        x = self.embed(words)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).float().logsumexp(-1).mean()


def sharded(kind, dtype=torch.float32, **options):
    """The model on all ranks, and this rank's share of the data."""
    model, world = Model().to(dtype), dist.get_world_size()
    rank = dist.get_rank()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    else:
        shape = {"hsdp": (2, world // 2), "replicas": (world, 1), "tensor": (1, world), "both": (world // 2, 2)}[kind]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "inner"))
    if kind in ("tensor", "both"):
        plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
        parallelize_module(model, mesh["inner"], plan)
        rank, mesh = mesh["data"].get_local_rank(), mesh["data"]
    if kind != "tensor":
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model, rank


def words_of(step, rank, part=0):
    return torch.randint(WORDS, (2, 5), generator=torch.Generator().manual_seed(100 * step + 10 * part + rank))


def groups_of(model, low_rank):
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() == 2 and "blocks" in name}
    rest = {name: p for name, p in named.items() if name not in matrices}
    late = [("blocks.1.up.bias", rest.pop("blocks.1.up.bias"))]
    return [
        {"params": [*matrices.items()], **low_rank},
        {"params": [*rest.items()], "weight_decay": 0.2},
        {"params": late},
    ]
