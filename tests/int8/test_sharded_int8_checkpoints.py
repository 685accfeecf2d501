"""Checkpoints of sharded int8 weights: saved on N ranks, loaded on M, in one process and under tensor parallel, to the
same weights exactly."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import drawn, needs_fsdp_on_a_cpu, whole
from distributed_harness import run
from int8_models import PARTS, bits, same
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from apollo_triton import quantize_model
from apollo_triton.int8.weight import int8_weight_of


class Net(nn.Module):
    """``mlp`` is int8. The groups of ``odd`` divide no row of it."""

    def __init__(self, seed=0):
        super().__init__()
        self.mlp, self.odd, self.head = nn.Linear(32, 16), nn.Linear(12, 8, bias=False), nn.Linear(16, 3)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(drawn(tuple(parameter.shape), name, seed) * 0.3)

    def forward(self, x):
        return self.head(self.mlp(x))


def net(seed=0):
    return quantize_model(Net(seed), ["mlp", "odd"], group_size=8)


def gathered(model):
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def with_fsdp(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.mlp, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def saving(folder):
    model = with_fsdp(net())
    state = model.state_dict()
    for name, part in state.items():
        assert isinstance(part, DTensor), name
    weight = int8_weight_of(model.mlp.weight)
    parts = weight.q, weight.scale, weight.zero
    for key, part in zip(PARTS, parts, strict=True):
        assert state[f"mlp.{key}"].to_local().data_ptr() == part.data_ptr()
    assert [tuple(state[f"mlp.{key}"].shape) for key in PARTS] == [(16, 32), (16, 4), (16, 4)]
    assert [tuple(state[f"odd.{key}"].shape) for key in PARTS] == [(8, 12), (12,), (12,)]
    dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    return same(gathered(model), bits(net()))


def loading(folder):
    """By each way, into models of other values. Returns what is not as it was saved."""
    expected = bits(net())
    squares = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def tensor_parallel(style):
        return parallelize_module(net(1), squares["tensor"], {"mlp": style})

    kinds = {
        "fsdp": lambda: with_fsdp(net(1)),
        "hybrid": lambda: with_fsdp(net(1), squares),
        "columns": lambda: tensor_parallel(RowwiseParallel()),
        "rows": lambda: tensor_parallel(ColwiseParallel()),
        "both": lambda: with_fsdp(tensor_parallel(RowwiseParallel()), squares["data"]),
        "strided": lambda: with_fsdp(tensor_parallel(ColwiseParallel()), squares["data"]),
    }
    full = StateDictOptions(full_state_dict=True)
    old = {name: part.view(-1) if "scale" in name or "zero" in name else part for name, part in expected.items()}
    of_floats = {name: tensor.detach() for name, tensor in Net().named_parameters()}
    wrong = []
    for kind, build in kinds.items():
        model = build()
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state)
        if not same(gathered(model), expected):
            wrong.append((kind, "dcp"))
        saved = get_model_state_dict(model, options=full)
        if not same(saved, expected):
            wrong.append((kind, "get full"))
        for how, values in {"full": saved, "old": old, "floats": of_floats}.items():
            for assign in (False, True) if how != "full" else (False,):
                model = build()
                if how == "full":
                    set_model_state_dict(model, values, options=full)
                else:
                    values = {name: _as(model, name, value) for name, value in values.items()}
                    model.load_state_dict(values, assign=assign)
                found = gathered(model)
                if not same(found, expected):
                    wrong.append((kind, how, assign))
    return wrong


def _as(model, name, value):
    """A whole tensor for an int8 weight, and for others what PyTorch takes: a DTensor where the model has one."""
    if name.startswith(("mlp.weight", "odd.weight")):
        return value
    of = dict(model.named_parameters())[name]
    if not isinstance(of, DTensor):
        return value
    return distribute_tensor(value, of.device_mesh, of.placements, src_data_rank=None)


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_saved_on_two_ranks_and_loaded_on_four_and_on_one(tmp_path):
    """Scales that are cut elsewhere than their codes; parts that DCP would load into copies."""
    folder = str(tmp_path)
    assert run(saving, 2, folder=folder) == [True, True]
    for wrong in run(loading, 4, folder=folder):
        assert wrong == []
    model = net(1)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert same(bits(model), bits(net()))  # in place
