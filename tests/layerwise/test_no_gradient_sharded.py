"""Steps without a gradient of weights that tensor parallel cuts: the trajectories of one process.

Every rank knows whole factors X and dY of each step, so that what is expected needs no ranks.
"""

from __future__ import annotations

import pytest
import torch
from distributed_cases import assert_close, assert_ranks_agree, drawn, needs_uneven_strides, sharded, whole
from distributed_harness import run
from no_gradient_cases import GROUPS, operands
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from apollo_triton import APOLLOAdamW, attach_layerwise

GAP = {"update_proj_gap": 3, "weight_decay": 0.1}
# (tokens, out, in): norms by the Gram matrix and by rows of G; parts of unlike size, and on four ranks of none.
LAYERS = {
    "tall": ((5, 48, 32), GROUPS["rank 4"]),
    "wide": ((5, 32, 48), GROUPS["rank 4"]),
    "many tokens": ((64, 48, 32), GROUPS["mini"]),
    "many, wide": ((64, 32, 48), GROUPS["mini"]),
    "large": ((9, 33, 18), GROUPS["rank 16"]),
    "large, wide": ((9, 18, 33), GROUPS["rank 16"]),
    "signs": ((7, 10, 7), GROUPS["rademacher"]),
    "left": ((3, 7, 10), GROUPS["left"]),
    "right": ((3, 7, 10), GROUPS["right"]),
    "small": ((4, 3, 9), GROUPS["mini"]),
    "smaller": ((4, 9, 2), GROUPS["mini"]),
}


class Layers(nn.Module):
    """Linear layers with given factors, of which ``backward()`` updates all without a gradient."""

    def __init__(self, cases, mesh=None, gradients="none", limiter_norm="exact", dtype=torch.float32, **options):
        super().__init__()
        self.cases, self.mesh = cases, mesh
        groups = {}
        for name, ((_, rows, columns), keys, cut) in cases.items():
            layer = nn.Linear(columns, rows)
            layer.weight = nn.Parameter(sharded(drawn((rows, columns), name).to(dtype), mesh, cut))
            of_bias = "".join("0" if letter == "0" else "r" for letter in cut)
            layer.bias = nn.Parameter(sharded(drawn((rows,), name, "bias").to(dtype), mesh, of_bias))
            self.add_module(name, layer)
            groups.setdefault(repr(keys), {"params": [], **GAP, **keys})["params"].append((name, layer.weight))
        dense = [(f"{name}.bias", self.get_submodule(name).bias) for name in cases]
        self.optimizer = APOLLOAdamW([*groups.values(), {"params": dense}], lr=1e-2, **options)
        norms = {} if gradients == "freed" else {"limiter_norm": limiter_norm}
        self.handle = attach_layerwise(self, self.optimizer, gradients=gradients, **norms)

    def losses(self, step, spoil=None):
        for name, (shape, _, cut) in self.cases.items():
            layer = self.get_submodule(name)
            X, dY = operands(step, *shape, dtype=layer.weight.dtype)
            if spoil is not None:
                spoil(name, step, X, dY)
            if self.mesh is None:
                yield (layer(X) * dY).sum()
                continue
            placements = [Shard(1) if letter == "1" else Replicate() for letter in cut]
            yield (layer(distribute_tensor(X, self.mesh, placements)).full_tensor() * dY).sum()

    def train_for(self, steps, spoil=None, first=0):
        for step in range(first, first + steps):
            sum(self.losses(step, spoil)).backward()
            assert all(parameter.grad is None for parameter in self.parameters())
            self.optimizer.step()
        return self

    def everything(self):
        found = {}
        for name, parameter in self.named_parameters():
            found[name] = whole(parameter)
            found |= {f"{name}.{key}": whole(value) for key, value in self.optimizer.state[parameter].items()}
        return found


def cases_of(cuts, names=LAYERS):
    return {f"{name} {cut}": (*LAYERS[name], cut) for name in names for cut in cuts}


CUTS = {1: ["0", "1", "r"], 2: ["01", "10", "r0", "1r", "11", "00"]}


def trained(mesh_shape, cases, steps, options):
    return Layers(cases, init_device_mesh("cpu", mesh_shape), **options).train_for(steps).everything()


full, slow = pytest.mark.full, pytest.mark.slow


@pytest.mark.parametrize(
    ("mesh_shape", "limiter_norm"),
    [
        pytest.param((2,), "exact", marks=slow),
        pytest.param((2,), "sketch", marks=slow),
        pytest.param((4,), "exact", marks=full),
        pytest.param((2, 2), "exact", marks=[full, needs_uneven_strides]),
        pytest.param((2, 2), "sketch", marks=[full, needs_uneven_strides]),
        pytest.param((1, 2), "exact", marks=full),
    ],
    ids=str,
)
def test_layers_that_are_cut_follow_one_process(mesh_shape, limiter_norm):
    """P from column 0 on every rank, norms of R's parts instead of R's, factors of a rank's own channels, sums left
    out, a bias that is added or moved twice."""
    cases = cases_of(CUTS[len(mesh_shape)])
    options = {"limiter_norm": limiter_norm}
    world = torch.Size(mesh_shape).numel()
    results = run(trained, world, mesh_shape=mesh_shape, cases=cases, steps=7, options=options, timeout=240)
    assert_ranks_agree(results)
    assert_close(results[0], Layers(cases, **options).train_for(7).everything(), 2e-6, str(mesh_shape))


def through_the_kernels(mesh_shape, cases, options):
    options = options | {"backend": "triton"}
    return Layers(cases, init_device_mesh("cpu", mesh_shape), **options).train_for(4).everything()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, and do not take CPU tensors")
@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        pytest.param((2,), {"limiter_norm": "exact"}, marks=slow),
        pytest.param((2,), {"limiter_norm": "sketch"}, marks=full),
        pytest.param((4,), {"limiter_norm": "exact"}, marks=full),
        pytest.param((2, 2), {"limiter_norm": "exact"}, marks=[full, needs_uneven_strides]),
    ],
    ids=str,
)
def test_kernels_follow_the_reference_of_one_process(mesh_shape, options):
    """P made in place, from column 0 on, norms of the local channels taken for those whose moments are here, a launch
    of no programs."""
    pytest.importorskip("triton")
    cuts = {1: ["0", "1"], 2: ["01", "10"]}[len(mesh_shape)]
    cases = cases_of(cuts, ["tall", "wide", "many, wide", "large", "large, wide", "signs", "small", "smaller"])
    world = torch.Size(mesh_shape).numel()
    results = run(through_the_kernels, world, mesh_shape=mesh_shape, cases=cases, options=options, timeout=240)
    assert_ranks_agree(results)
    expected = Layers(cases, backend="reference", **options).train_for(4).everything()
    assert_close(results[0], expected, 4e-6, str(mesh_shape))
