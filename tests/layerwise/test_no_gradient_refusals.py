"""Steps without a gradient: what is refused, when, and what the errors say."""

from __future__ import annotations

import pytest
import torch
from no_gradient_cases import Layer, copies, operands
from torch import nn

from apollo_triton import APOLLOAdamW, attach_layerwise


def attach(model, limiter_norm="exact", gradients="none", **group):
    options = {key: group.pop(key) for key in ("max_grad_norm", "capturable") if key in group}
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    groups = [{"params": matrices} | {"rank": 2} | group]
    return attach_layerwise(model, APOLLOAdamW(groups, **options), gradients=gradients, limiter_norm=limiter_norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": "never"}, r"gradients='never' \(allowed: 'freed' or 'none' or 'auto'\)"),
        ({"limiter_norm": "l2"}, r"limiter_norm='l2' \(allowed: 'exact' or 'sketch'\)"),
        ({"max_grad_norm": 1.0}, r"group 0: max_grad_norm=1.0"),
        ({"capturable": True}, r"group 0: capturable=True"),
        ({"proj": "svd"}, r"group 0: proj='svd' takes singular vectors of a gradient.*proj=\"random\""),
        ({"rank": None}, r"no weight of a group with a 'rank'.*use gradients=\"freed\""),
    ],
)
def test_settings_that_cannot_be(options, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=message):
        attach(model, **options)
    assert not any("forward" in layer.__dict__ or layer.weight._post_accumulate_grad_hooks for layer in model)


def test_tied_weights_are_named():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"parameter 0 \('a.weight'\).* is tied: a.weight and b.weight are one weight"):
        attach(model)


def test_a_dense_tied_head_is_none_of_its_business():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 6), "mlp": nn.Linear(6, 6), "head": nn.Linear(6, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    dense = [model["head"].weight, model["mlp"].bias]
    optimizer = APOLLOAdamW([{"params": [model["mlp"].weight], "rank": 2}, {"params": dense}])
    attach_layerwise(model, optimizer, gradients="none")
    before = copies(model)
    model["head"](model["mlp"](model["embed"](torch.arange(4)))).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_layer_that_is_there_twice_is_named():
    layer = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"is tied: 0.weight and 2.weight are one weight"):
        attach(nn.Sequential(layer, nn.Tanh(), layer))


def test_a_layer_that_runs_twice_is_refused_before_anything_moves():
    layer = nn.Linear(8, 8, bias=False)
    handle = attach(layer)
    assert len(handle.without_gradient) == 1
    before = layer.weight.detach().clone()
    loss = layer(layer(torch.ones(2, 8)).tanh()).sum()
    with pytest.raises(RuntimeError, match=r"parameter 0 .*ran forward more than once.*gradients=\"freed\""):
        loss.backward()
    assert torch.equal(layer.weight, before)


def test_accumulation_is_refused():
    layer = Layer(12, 8, {"rank": 2})
    with pytest.raises(RuntimeError, match="has no gradients that could accumulate"), layer.handle.accumulate():
        pass
    X, dY = operands(0, 3, 12, 8)
    (layer.module(X) * dY).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 0 .*second time.*call optimizer.step\(\) after each backward"):
        (layer.module(X) * dY).sum().backward()
    assert torch.equal(layer.weight, before)
    layer.optimizer.step()
    layer.step(X, dY)


def test_a_second_backward_of_one_graph_is_refused():
    layer = Layer(12, 8, {"rank": 2})
    X, dY = operands(0, 3, 12, 8)
    loss = (layer.module(X) * dY).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|second time"):
        loss.backward()


def test_second_derivatives_are_refused():
    layer = Layer(12, 8, {"rank": 2})
    X, dY = operands(0, 3, 12, 8)
    before = layer.weight.detach().clone()
    with pytest.raises(NotImplementedError, match=r"create_graph=True.*freed"):
        (layer.module(X) * dY).sum().backward(create_graph=True)
    assert torch.equal(layer.weight, before)


def test_grad_scaler_is_told():
    layer = Layer(12, 8, {"rank": 2})
    X, dY = operands(0, 3, 12, 8)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((layer.module(X) * dY).sum()).backward()
    with pytest.raises(ValueError, match=r"GradScaler.*bfloat16"):
        scaler.step(layer.optimizer)


def test_settings_that_come_later_are_refused_before_anything_moves():
    layer = Layer(12, 8, {"rank": 2})
    X, dY = operands(0, 3, 12, 8)
    before = layer.weight.detach().clone()
    for key, value, message in (
        ("proj", "svd", "group 0: proj='svd'"),
        ("max_grad_norm", 1.0, "group 0: max_grad_norm"),
        ("eps", -1.0, r"parameter 0 .*parameter group 0: Invalid epsilon"),
    ):
        old = layer.optimizer.param_groups[0][key]
        layer.optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=message):
            (layer.module(X) * dY).sum().backward()
        layer.optimizer.param_groups[0][key] = old
        assert torch.equal(layer.weight, before)
        assert not layer.optimizer.state[layer.weight]


def test_autograd_notices_a_weight_that_moved_too_early():
    """Another use of the weight whose backward comes later, and would see the new one."""
    layer = Layer(12, 8, {"rank": 2})
    x = torch.ones(3, 12, requires_grad=True)
    hidden = (x * 2) @ layer.weight.detach()  # its backward needs the old weight, and comes last
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer.module(hidden).sum().backward()


def test_a_gradient_that_is_there_already_is_named_before_anything_moves():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model(torch.ones(2, 8)).sum().backward()
    handle = attach(model)
    before = copies(model)
    with pytest.raises(RuntimeError, match=r"parameter 1 .*has a gradient of an earlier backward.*zero_grad"):
        model(torch.ones(2, 8)).sum().backward()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert handle.without_gradient


def test_autograd_grad_of_a_weight_gives_its_gradient_and_moves_nothing():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 4, bias=False))
    x, weights = torch.randn(5, 8), [model[0].weight, model[2].weight]
    expected = torch.autograd.grad(model(x).square().sum(), weights)
    before = copies(model)
    attach(model)
    for mine, other in zip(torch.autograd.grad(model(x).square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(mine, other)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_input_of_another_dtype_is_refused_as_ever():
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).bfloat16()
    attach(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.ones(2, 8))


def test_data_parallel_is_refused():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    optimizer = APOLLOAdamW([{"params": [model[0].weight], "rank": 2}])
    wrapped = nn.DataParallel(model)
    with pytest.raises(ValueError, match=r'gradients="auto" would update .*nn\.DataParallel'):
        attach_layerwise(wrapped, optimizer, gradients="auto")
