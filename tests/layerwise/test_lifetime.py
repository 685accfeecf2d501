"""How long things live under layer-wise updates: as long as with plain steps, without the garbage collector's help."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from layerwise_cases import loss_of, make_model, make_optimizer
from torch import nn

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model

GRADIENTS = pytest.mark.parametrize("gradients", ["plain", "freed", "none", "auto"])


@pytest.fixture(scope="module", autouse=True)
def no_collector():
    """A gigabyte of weights that waits for the collector is a gigabyte too much."""
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer of a process leaves frames behind, whichever it is
    gc.disable()
    yield
    gc.enable()


class Stack(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def run_of(gradients, model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = APOLLOAdamW([{"params": matrices, "rank": 2}, {"params": others}])
    handle = attach_layerwise(model, optimizer, gradients=gradients) if gradients != "plain" else None
    return optimizer, handle


def step(model, optimizer):
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def alive(references):
    return [name for name, reference in references.items() if reference() is not None]


@GRADIENTS
def test_what_is_in_no_group_any_more_goes_with_the_step(gradients):
    """Layers that are replaced six times (progressive stacking, surgery in a notebook): each old weight stayed, with
    its state and its engine."""
    model = Stack()
    optimizer, handle = run_of(gradients, model)
    step(model, optimizer)
    old = {}
    for index in range(6):
        layer = model.layers[1]
        weight = layer.weight
        new = nn.Linear(6, 6)
        for group, before, after in zip(optimizer.param_groups, (weight, layer.bias), new.parameters(), strict=True):
            group["params"] = [after if p is before else p for p in group["params"]]
        old |= {f"{index} {name}": weakref.ref(p) for name, p in layer.named_parameters()}
        old |= {
            f"{index} layer": weakref.ref(layer),
            f"{index} moments": weakref.ref(optimizer.state[weight]["exp_avg"]),
        }
        for before in layer.parameters():
            del optimizer.state[before]  # torch.optim's own, and the user's to drop
        model.layers[1] = new
        del layer, weight, group, before, after, new
        step(model, optimizer)
    assert alive(old) == []
    if handle is not None:
        assert handle.updates == set(model.parameters())


def test_a_frozen_layer_that_is_replaced_goes_though_no_group_had_it():
    """A base model's weights under LoRA: the list of layers that can do without a gradient held them."""
    model = Stack(3)
    matrix, bias = model.layers[0].parameters()
    optimizer = APOLLOAdamW([{"params": [matrix], "rank": 2}, {"params": [bias]}])
    attach_layerwise(model, optimizer, gradients="none")
    for parameter in model.layers[1:].parameters():
        parameter.requires_grad_(False)
    gone = {f"weight {index}": weakref.ref(model.layers[index].weight) for index in (1, 2)}
    del parameter
    model.layers[1] = nn.Identity()
    model.layers[2].weight = nn.Parameter(torch.ones(6, 6))
    assert alive(gone) == []


@GRADIENTS
@pytest.mark.parametrize("last", ["model", "optimizer", "handle"])
def test_everything_goes_with_its_last_name(gradients, last):
    """The handle and the optimizer held each other, and a layer and its forward."""
    model = Stack()
    optimizer, handle = run_of(gradients, model)
    for _ in range(2):
        step(model, optimizer)
    named = {"model": model, "optimizer": optimizer} | ({"handle": handle} if handle is not None else {})
    things = named | {"layer": model.layers[0], "weight": model.layers[0].weight}
    references = {name: weakref.ref(thing) for name, thing in things.items()}
    references["moments"] = weakref.ref(optimizer.state[things["weight"]]["exp_avg"])
    kept = named.get(last)
    del things, named, model, optimizer, handle
    kept_alive = {"model": {"model", "layer", "weight"}, "optimizer": {"optimizer", "handle", "weight", "moments"}}
    if gradients == "plain":
        kept_alive["optimizer"] -= {"handle"}
    expected = kept_alive.get(last, {"handle"}) if kept is not None else set()
    assert set(alive(references)) == expected
    del kept
    assert alive(references) == []


def test_a_copy_of_an_attached_model_goes_at_once():
    """A copy for an exponential moving average had a forward that held it."""
    model = Stack()
    optimizer, _ = run_of("none", model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(torch.ones(2, 6)), model(torch.ones(2, 6)))
    twin(torch.ones(2, 6)).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(twin(torch.ones(2, 6)), again(torch.ones(2, 6)))
    gone = weakref.ref(twin.layers[0].weight)
    del twin
    assert gone() is None
    step(model, optimizer)


@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_a_handle_whose_optimizer_is_gone_says_so(gradients):
    """``attach_layerwise(model, APOLLOAdamW.mini(model))`` and a loop without step(): nothing would be trained."""
    model = make_model()
    handle = attach_layerwise(model, make_optimizer(model, rank=4), gradients=gradients)
    with pytest.raises(RuntimeError, match=r"optimizer of these layer-wise updates is gone.*keep it.*remove\(\)"):
        loss_of(model, 0).backward()
    assert repr(handle) == "Layerwise(removed)"
    second = make_optimizer(model, rank=4)
    attach_layerwise(model, second, gradients=gradients)  # and what is left of the first is in nobody's way
    model.zero_grad()
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    handle.remove()
    assert second._layerwise is not None


def test_skips_of_a_parameter_that_has_left_its_group_stay_counted():
    model = Stack(1)
    optimizer, handle = run_of("freed", model)
    (model(torch.ones(2, 6)) * torch.inf).sum().backward()
    optimizer.param_groups[1]["params"] = []
    optimizer.step()
    assert optimizer.skipped_updates == 2
    handle.remove()
    assert optimizer.skipped_updates == 2


def test_a_handle_says_what_it_is():
    model = Stack()
    optimizer, handle = run_of("none", model)
    assert repr(handle) == "Layerwise(gradients='none', 4 parameters, 2 without gradient)"
    handle.remove()
    assert repr(handle) == "Layerwise(removed)"
    assert not any("forward" in vars(layer) for layer in model.layers)
    step(model, optimizer)


def test_a_converted_model_lets_its_float_weights_go():
    """What remembers that they were replaced must not keep them."""
    model = nn.ModuleDict({"mlp": nn.Linear(128, 4)})
    gone = weakref.ref(model["mlp"].weight)
    quantize_model(model)
    assert gone() is None


@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_where_nobody_kept_either_a_warning_says_so_once(gradients):
    """The handle goes with its optimizer, and the hooks were silent then. After a step() both may go: see above."""
    model = make_model()
    attach_layerwise(model, make_optimizer(model, rank=4), gradients=gradients)
    with pytest.warns(UserWarning, match=r"optimizer of these layer-wise updates is gone.*keep it") as found:
        loss_of(model, 0).backward()
    assert len(found) == 1
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, 0).backward()
    model = make_model()
    optimizer = make_optimizer(model, rank=4)
    attach_layerwise(model, optimizer, gradients=gradients)
    optimizer.step()
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, 0).backward()
