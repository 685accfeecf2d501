"""What the tests of ``torch.compile`` share: a model of blocks, training steps of it, and what the compiler counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from apollo_triton import APOLLOAdamW, quantize_model
from apollo_triton.core.dtensors import local
from apollo_triton.int8.weight import Int8Weight

WIDTH = 32


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias), nn.Linear(2 * WIDTH, WIDTH, bias)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Blocks(nn.Module):
    """``checkpointed``: its blocks run under activation checkpointing."""

    def __init__(self, blocks: int = 2, bias: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(bias) for _ in range(blocks))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def model_of(int8: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Blocks:
    torch.manual_seed(0)
    model = Blocks(**options)
    if int8:
        quantize_model(model, group_size=32)
    return model.to(dtype)


def optimizer_of(model: nn.Module) -> APOLLOAdamW:
    return APOLLOAdamW.apollo(model, rank=4, lr=1e-2, seed=3)


def batch(step: int, dtype: torch.dtype = torch.float32, rows: int = 3) -> torch.Tensor:
    return torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(forward: Any, x: torch.Tensor) -> torch.Tensor:
    return (forward(x) - x.flip(-1)).float().square().mean()


def train(
    forward: Any, optimizer: APOLLOAdamW, steps: int, dtype: torch.dtype = torch.float32, first: int = 0
) -> list[float]:
    """The loss of each step, by the batches from ``first`` on."""
    losses = []
    for step in range(first, first + steps):
        loss = loss_of(forward, batch(step, dtype))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits(model: nn.Module) -> list[torch.Tensor]:
    """Copies of all parameters, of a sharded one of this rank's part, of an int8 one of its three parts."""
    parameters = [local(p).detach() for p in model.parameters()]
    parts = [[p.q, p.scale, p.zero] if isinstance(p, Int8Weight) else [p] for p in parameters]
    return [part.clone() for each in parts for part in each]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def start_counting() -> Any:
    """The compiler's counters, which begin at nothing, as its caches do."""
    import torch._dynamo.utils

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


def graphs(counters: Any) -> int:
    return counters["stats"]["unique_graphs"]


def breaks(counters: Any) -> int:
    return sum(counters["graph_break"].values())
