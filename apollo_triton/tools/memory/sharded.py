"""What a card holds and a step sends, when a model trains on many: predicted without memory.

There is no formula. One process plays the first rank of a process group that sends nothing. It shards the real model,
makes the real optimizer and trains two steps, all on fake tensors, and every storage that is alive is followed.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...int8.layers import quantize_model
from ...int8.weight import Int8Weight
from ...layerwise.handle import attach_layerwise
from ...optimizer import APOLLOAdamW
from ..llama import meta_model
from .activations import AsOnCuda, set_checkpointing
from .fake_world import fake_mesh
from .live_step import LiveStep
from .sharding import fake_of, shard

SHARDINGS = ("fsdp2", "hsdp", "tp")


@dataclass(frozen=True)
class Setup:
    """How a model is trained on ``gpus`` cards. ``rank`` is APOLLO's, None for APOLLO-Mini."""

    gpus: int
    shard: str = "fsdp2"
    layerwise: bool = False
    int8: bool = False
    state_bits: int = 32
    checkpointing: bool = False
    rank: int | None = None

    @property
    def mesh(self) -> dict[str, int]:
        """The dimensions of the device mesh. HSDP has two replicas."""
        return {"replicas": 2, "shards": self.gpus // 2} if self.shard == "hsdp" else {"shards": self.gpus}


def train(model: nn.Module, setup: Setup, mesh: Any, tokens: Tensor, on_cuda: bool, **counting: Any) -> LiveStep:
    """Shard ``model``, which is int8 already if it is to be, train two steps, and return what the second one held.

    ``on_cuda``: run attention and updates as a CUDA device does; the tensors must be fake.
    """
    shard(model, setup.shard, mesh)
    options: dict[str, Any] = {"state_bits": setup.state_bits}
    if setup.rank is None:
        optimizer = APOLLOAdamW.mini(model, **options)
    else:
        optimizer = APOLLOAdamW.apollo(model, setup.rank, **options)
    if setup.layerwise:
        attach_layerwise(model, optimizer)
    kernels = AsOnCuda if on_cuda else nullcontext
    set_checkpointing(model.train(), setup.checkpointing, kernels)

    def forward(tokens: Tensor) -> Tensor:
        with kernels():
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    with LiveStep(model, optimizer, on_cuda, **counting) as live:
        live.step(tokens, forward)
        live.begin()
        live.step(tokens, forward)
    return live


def predicted(model: nn.Module, setup: Setup, tokens: tuple[int, int], on_cuda: bool = True, **counting: Any) -> LiveStep:
    """What the first rank's second step holds. ``model`` is on the meta device, and is not changed."""
    copied = copy.deepcopy(model)  # cheap: its tensors have no memory
    with fake_mesh(**setup.mesh) as mesh, FakeTensorMode():
        faked = fake_of(copied)
        return train(faked, setup, mesh, torch.zeros(tokens, dtype=torch.long), on_cuda, **counting)
