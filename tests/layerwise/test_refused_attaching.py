"""What layer-wise updates cannot be attached to, with gradients that are freed or never made: what the error says, and
that nothing is attached by then."""

from __future__ import annotations

import pytest
import torch
from layerwise_cases import loss_of, make_model, make_optimizer
from torch import nn
from unchanged import assert_unchanged, snapshot

from apollo_triton import APOLLOAdamW, attach_layerwise

LAYER_WISE = pytest.mark.parametrize("gradients", ["freed", "none"])


def group_of(model, **keys):
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    return [{"params": matrices} | {"rank": 2} | keys]


def is_attached(model):
    return any("forward" in vars(module) for module in model.modules()) or any(
        p._post_accumulate_grad_hooks for p in model.parameters()
    )


SETTINGS = [
    ("never", {}, {}, {}, r"gradients='never' \(allowed: 'freed' or 'none' or 'auto'\)"),
    ("none", {}, {}, {"limiter_norm": "l2"}, r"limiter_norm='l2' \(allowed: 'exact' or 'sketch'\)"),
    *((each, {"max_grad_norm": 1.0}, {}, {}, "group 0: max_grad_norm=1.0") for each in ("freed", "none")),
    *((each, {"capturable": True}, {}, {}, "group 0: capturable=True") for each in ("freed", "none")),
    ("none", {}, {"proj": "svd"}, {}, r"group 0: proj='svd' takes singular vectors of a gradient.*proj=\"random\""),
    ("none", {}, {"rank": None}, {}, r"no weight of a group with a 'rank'.*use gradients=\"freed\""),
]


@pytest.mark.parametrize(("gradients", "options", "keys", "attaching", "text"), SETTINGS)
def test_settings_that_cannot_be(gradients, options, keys, attaching, text):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = APOLLOAdamW(group_of(model, **keys), **options)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=text):
        attach_layerwise(model, optimizer, gradients=gradients, **attaching)
    assert not is_attached(model)
    assert_unchanged(optimizer, before)


def tied(model):
    model["mlp"][2].weight = nn.Parameter(model["mlp"][0].weight.detach().t().contiguous())
    model["other"] = nn.Linear(40, 24)
    model["other"].weight = model["mlp"][2].weight
    return model


def a_layer_twice(model):
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.Tanh(), layer)


def flattened(model):
    model["norm"].weight._is_flat_param = True
    return model


MODELS = [
    ("freed", flattened, None, r"parameter 4 .*flattened"),
    ("none", flattened, None, r"parameter 4 .*flattened"),
    ("freed", lambda model: model, "norm", r"not in the model: parameter 0 \('mlp.0.weight'\)"),
    ("none", lambda model: model, "norm", r"not in the model: parameter 0 \('mlp.0.weight'\)"),
    ("none", tied, None, r"parameter 2 \('mlp.2.weight'\).* is tied: mlp.2.weight and other.weight are one weight"),
    ("none", a_layer_twice, None, r"is tied: 0.weight and 2.weight are one weight"),
    ("none", nn.DataParallel, None, r'gradients="none" would update .*nn\.DataParallel'),
    ("auto", nn.DataParallel, None, r'gradients="auto" would update .*nn\.DataParallel'),
]


@pytest.mark.parametrize(("gradients", "change", "part", "text"), MODELS)
def test_models_that_cannot_be(gradients, change, part, text):
    """A weight that is moved by each of its parts, and hooks that see a gradient that is not whole."""
    model = make_model()
    if change is not flattened:
        model = change(model)
    optimizer = APOLLOAdamW([{"params": list(model.named_parameters()), "rank": 2}])
    if change is flattened:  # an optimizer of what is flattened already is refused before
        change(model)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=text):
        attach_layerwise(model[part] if part else model, optimizer, gradients=gradients)
    assert not is_attached(model)
    assert_unchanged(optimizer, before)


@LAYER_WISE
def test_attaching_wants_the_optimizer_itself_and_once(gradients):
    model = make_model()
    optimizer = make_optimizer(model, rank=2)
    with pytest.raises(TypeError, match="APOLLOAdamW itself"):
        attach_layerwise(optimizer, model, gradients=gradients)
    assert not is_attached(model)
    attach_layerwise(model, optimizer, gradients=gradients)
    with pytest.raises(ValueError, match="already"):
        attach_layerwise(model, optimizer, gradients=gradients)


def test_a_dense_tied_head_is_none_of_its_business():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 6), "mlp": nn.Linear(6, 6), "head": nn.Linear(6, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    dense = [model["head"].weight, model["mlp"].bias]
    optimizer = APOLLOAdamW([{"params": [model["mlp"].weight], "rank": 2}, {"params": dense}])
    attach_layerwise(model, optimizer, gradients="none")
    before = [p.detach().clone() for p in model.parameters()]
    model["head"](model["mlp"](model["embed"](torch.arange(4)))).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@LAYER_WISE
def test_distributed_data_parallel_is_refused(gradients, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        optimizer = APOLLOAdamW([{"params": list(model.parameters()), "rank": 2}])
        for given in (model, nn.Sequential(model)):
            with pytest.raises(ValueError, match="DistributedDataParallel"):
                attach_layerwise(given, optimizer, gradients=gradients)
            assert not is_attached(given)
    finally:
        torch.distributed.destroy_process_group()


@LAYER_WISE
def test_composable_distributed_data_parallel_is_refused(gradients):
    """Each replica would move by its own gradients, and nobody would be told. No module of the model is that of DDP."""
    composable = pytest.importorskip("torch.distributed._composable")
    model = composable.replicate(nn.Linear(4, 4))
    optimizer = APOLLOAdamW([{"params": list(model.parameters()), "rank": 2}])
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        attach_layerwise(nn.Sequential(model), optimizer, gradients=gradients)
    assert not is_attached(model)


def test_ranks_without_shards_are_warned(monkeypatch):
    """A model that DistributedDataParallel wraps before or after: each rank trains alone, and no error says so."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    model = nn.Linear(4, 4)
    optimizer = APOLLOAdamW(group_of(model))
    with pytest.warns(UserWarning, match=r"4 ranks, and none .* is a DTensor.*fully_shard.*\(4, 1\)"):
        attach_layerwise(model, optimizer)


@pytest.mark.slow
@LAYER_WISE
def test_another_optimizers_hooks_are_named_and_garbage_is_not(gradients):
    """A notebook's cell that runs twice: the first optimizer's hooks would move the weights, with its own rate."""
    model = make_model()
    first = make_optimizer(model, rank=4)
    handle = attach_layerwise(model, first, gradients=gradients)
    second = make_optimizer(model, rank=4)
    with pytest.raises(ValueError, match=r"parameter 0 .*layer-wise updates of another optimizer.*remove\(\)"):
        attach_layerwise(model, second, gradients=gradients)
    handle.remove()
    attach_layerwise(model, second, gradients=gradients)
    second.itself = second  # a cycle, which only the garbage collector ends
    del handle, second
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
