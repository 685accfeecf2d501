"""Int8 weights under FSDP2, HSDP and tensor parallel: what is gathered, what a step makes of the shards, what is refused.

Beside each sharded model every rank keeps an int8 copy that is not sharded, which another optimizer moves by the
gathered gradients of the sharded one. So gradients are the same to the bit, and what differs is the shards' alone.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_cases import Collectives, drawn, needs_fsdp_on_a_cpu, whole
from distributed_harness import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apollo_triton import APOLLOAdamW, quantize_model
from apollo_triton.int8.weight import int8_weight_of

GROUP = 8


class Net(nn.Module):
    """``up`` keeps its rows, so that FSDP2 leaves its sketch local; ``down`` keeps its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(x + self.down(self.up(x).relu()))


def net(group_size=GROUP):
    model = Net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name) * 0.3)
    return quantize_model(model, ["up", "down"], group_size=group_size)


def optimizer_of(model, backend):
    # Without the limiter, whose sums over ranks are rounded in another order, nothing of ``up`` depends on the ranks.
    low_rank = {"params": [model.up.weight, model.down.weight], "rank": 4, "update_proj_gap": 2, "disable_nl": True}
    rest = [each for name, each in model.named_parameters() if name not in ("up.weight", "down.weight")]
    return APOLLOAdamW([low_rank, {"params": rest}], lr=1e-2, backend=backend)


def with_fsdp(model, mesh, **options):
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def inputs(step, rank=0):
    return drawn((6, 16), "x", step, rank)


def floats_of(model):
    """The values of both int8 weights, gathered by their parts."""
    found = {}
    for name in ("up", "down"):
        weight = getattr(model, name).weight
        local = int8_weight_of(weight)
        pieces = [None] * dist.get_world_size()
        rows = getattr(weight, "placements", None)
        dist.all_gather_object(
            pieces, (local.dequantize(), None if rows is None else weight.device_mesh.get_coordinate())
        )
        found[name] = torch.cat([piece for piece, _ in pieces]) if rows is not None else local.dequantize()
    return found


def beside_a_plain_copy(model, plain, steps, backend, source):
    """Trains both, and returns by how much their weights differ, in steps of the grid, and the largest."""
    optimizer, shadow = optimizer_of(model, backend), optimizer_of(plain, backend)
    for step in range(steps):
        model(inputs(step, source)).square().mean().backward()
        for parameter, copied in zip(model.parameters(), plain.parameters(), strict=True):
            copied.grad = whole(parameter.grad)
        optimizer.step()
        shadow.step()
        optimizer.zero_grad()
    ours, theirs = floats_of(model), floats_of(plain)
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}


def under_fsdp(steps=4):
    world, rank = dist.get_world_size(), dist.get_rank()
    results = {}
    mesh = init_device_mesh("cpu", (world,))
    plain = net()
    model = with_fsdp(copy.deepcopy(plain), mesh)
    with Collectives() as collectives:
        model(inputs(0))
    results["gathered"] = collectives.total, sum(collectives.filled.values())
    for backend in ("reference", "triton"):
        plain = net()
        model = with_fsdp(copy.deepcopy(plain), mesh)
        results["forward", backend] = bool(torch.equal(model(inputs(0)), plain(inputs(0))))
        results["apart", backend] = beside_a_plain_copy(model, plain, steps, backend, rank)
    return results


@needs_fsdp_on_a_cpu
def test_fsdp():
    """Floats that travel instead of codes; bits of rounding drawn as of a weight that begins at 0."""
    for results in run(under_fsdp, 2):
        # Codes, and 4 + 1 bytes of each of the 64 groups, of two weights; biases, and the head padded to 4 rows.
        assert results["gathered"] == (3, 2 * (512 + 64 * 5) + 4 * (32 + 16) + 4 * (4 * 16 + 4))
        for backend in ("reference", "triton"):
            assert results["forward", backend]
            assert results["apart", backend]["up"] == 0
            assert results["apart", backend]["down"] < 1e-6
