"""Layer-wise updates: what they refuse, when, and what the errors say."""

from __future__ import annotations

import copy

import pytest
import torch
from layerwise_cases import loss_of, make_model, make_optimizer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from apollo_triton import APOLLOAdamW, attach_layerwise


def test_accumulation_without_saying_so_is_an_error():
    model = make_model()
    attach_layerwise(model, make_optimizer(model, rank=4))
    loss_of(model, 0).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"parameter \d .*second time.*handle.accumulate\(\)"):
        loss_of(model, 1).backward()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_attaching_names_what_it_cannot_do(monkeypatch):
    model = make_model()
    for options, message in (({"max_grad_norm": 1.0}, "max_grad_norm=1.0"), ({"capturable": True}, "capturable=True")):
        with pytest.raises(ValueError, match=message):
            attach_layerwise(model, APOLLOAdamW(model.parameters(), **options))
    optimizer = APOLLOAdamW(model.named_parameters())
    with pytest.raises(ValueError, match=r"not in the model: parameter 0 \('mlp.0.weight'\)"):
        attach_layerwise(model["norm"], optimizer)
    with pytest.raises(TypeError, match="APOLLOAdamW itself"):
        attach_layerwise(optimizer, model)
    model["norm"].weight._is_flat_param = True
    with pytest.raises(ValueError, match=r"parameter 4 .*flattened"):
        attach_layerwise(model, optimizer)
    del model["norm"].weight._is_flat_param
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    attach_layerwise(model, optimizer)
    with pytest.raises(ValueError, match="already"):
        attach_layerwise(model, optimizer)


def test_dtensors_are_refused():
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = make_model()
        model["norm"].bias = nn.Parameter(distribute_tensor(torch.ones(6), init_device_mesh("cpu", (2,)), [Shard(0)]))
        optimizer = APOLLOAdamW(model.named_parameters())
        with pytest.raises(ValueError, match=r"parameter 5 \('norm.bias'\).*DTensor"):
            attach_layerwise(model, optimizer)
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        optimizer = APOLLOAdamW(model.parameters())
        for given in (model, nn.Sequential(model)):
            with pytest.raises(ValueError, match="DistributedDataParallel"):
                attach_layerwise(given, optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_settings_that_come_later_are_refused_in_backward_and_in_step():
    model = make_model()
    optimizer = make_optimizer(model, rank=4)
    attach_layerwise(model, optimizer)
    for key, value in (("max_grad_norm", 1.0), ("capturable", True)):
        before = copy.deepcopy(model.state_dict())
        old = optimizer.param_groups[1][key]
        for group in optimizer.param_groups:
            group[key] = value
        with pytest.raises(ValueError, match=f"group 1: {key}"):
            loss_of(model, 0).backward()
        with pytest.raises(ValueError, match=f"group 0: {key}"):
            optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        for group in optimizer.param_groups:
            group[key] = old
        optimizer.zero_grad()


def test_grad_scaler_is_told():
    model = make_model()
    optimizer = make_optimizer(model, rank=4)
    handle = attach_layerwise(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(ValueError, match=r"GradScaler.*bfloat16"):
        scaler.step(optimizer)
    handle.remove()
    assert optimizer._step_supports_amp_scaling is False


def test_an_error_names_the_parameter_and_changes_nothing():
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8), "embedding": nn.Embedding(8, 8, sparse=True)})
    optimizer = make_optimizer(model, rank=2)
    attach_layerwise(model, optimizer)
    embedding = model["embedding"].weight
    before = embedding.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 2 \('embedding.weight'\).*sparse"):
        model["mlp"](model["embedding"](torch.tensor([1]))).sum().backward()
    assert torch.equal(embedding, before)
    assert embedding not in optimizer.state
    embedding.grad = None
    optimizer.step()
    optimizer.param_groups[1]["eps"] = -1.0
    loss = model["mlp"](torch.ones(8)).sum()
    with pytest.raises(ValueError, match=r"parameter 1 \('mlp.bias'\).*parameter group 1: Invalid epsilon"):
        loss.backward()


@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_another_optimizers_hooks_are_named_and_garbage_is_not(gradients):
    """A notebook's cell that runs twice: the first optimizer's hooks would move the weights, with its own rate."""
    model = make_model()
    handle = attach_layerwise(model, make_optimizer(model, rank=4), gradients=gradients)
    second = make_optimizer(model, rank=4)
    with pytest.raises(ValueError, match=r"parameter 0 .*layer-wise updates of another optimizer.*remove\(\)"):
        attach_layerwise(model, second, gradients=gradients)
    handle.remove()
    attach_layerwise(model, second, gradients=gradients)
    del handle, second  # a cycle, which only the garbage collector ends
    third = make_optimizer(model, rank=4)
    handle = attach_layerwise(model, third, gradients=gradients)
    third.param_groups[0]["lr"] = third.param_groups[1]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert bool(handle.without_gradient) == (gradients == "none")


def test_two_optimizers_of_one_model_part_in_peace():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    handles = []
    for layer in model:
        optimizer = APOLLOAdamW([{"params": [layer.weight], "rank": 2}])
        handles.append((optimizer, attach_layerwise(model, optimizer, gradients="none")))
    handles[0][1].remove()
    assert ["forward" in vars(layer) for layer in model] == [False, True]
