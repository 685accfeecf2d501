"""Steps without a gradient: the trajectories of ordinary steps, from the operands of the backward pass."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from no_gradient_cases import (
    GROUPS,
    SHAPES,
    Layer,
    copies,
    operands,
    optimizer_of,
)
from oracle import OracleMatrix
from tiers import backend_params
from torch import nn
from torch.utils.checkpoint import checkpoint

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model

CASES = {
    f"{shape}, {name}": (shape, name)
    for shape, name in [(shape, "rank 16") for shape in SHAPES] + [(SHAPES[i], name) for i in (0, 3) for name in GROUPS]
}
# On the kernels each shape and each group once.
ON_KERNELS = {
    f"{shape}, {name}"
    for shape, name in [
        (SHAPES[1], "rank 16"),
        (SHAPES[2], "rank 16"),
        (SHAPES[4], "rank 16"),
        (SHAPES[0], "mini"),
        (SHAPES[3], "rank 4"),
        (SHAPES[0], "rademacher"),
        (SHAPES[3], "left"),
        (SHAPES[3], "right"),
    ]
}


def fitting(name, shape):
    return GROUPS[name] | {"rank": min(GROUPS[name]["rank"], *shape[1:])}


@pytest.mark.parametrize(
    ("backend", "case"), backend_params(CASES, {"interpreter": CASES.keys() - ON_KERNELS}), indirect=["backend"]
)
def test_a_layer_follows_the_equations(backend, case):
    """Against float64, across two refreshes, with the limiter at work in every step: a wrong operand or orientation, a
    norm that is not G's, a decay before the update, a factor of the wrong channel."""
    shape, name = CASES[case]
    group = fitting(name, shape)
    layer = Layer(*shape[1:], group)
    oracle = OracleMatrix(layer.weight.cpu(), **(group | {"lr": 1e-2, "weight_decay": 0.1, "update_proj_gap": 3}))
    start = oracle.weight.clone()
    for step in range(7):
        X, dY = operands(step, *shape)
        layer.step(X, dY)
        oracle.step(dY.cpu().double().T @ X.cpu().double())
    moved = (oracle.weight - start).norm()
    # R's rounding, which cancellation multiplies; G's own sums over tokens.
    assert (layer.weight.detach().cpu().double() - oracle.weight).norm() <= 1e-6 * (1 + oracle.conditioning) * moved


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_the_sketchs_norm_is_that_of_the_rescaled_sketch(backend, scale_type):
    """u^2 = sum s_c^2 |R_c|^2, from float64: the exact norm, or one that forgets s, differs by tens of per cent."""
    shape = (9, 40, 24)
    layer = Layer(*shape[1:], {"rank": 4, "scale_type": scale_type, "weight_decay": 0.0}, limiter_norm="sketch")
    oracle = OracleMatrix(layer.weight.cpu(), 4, scale_type=scale_type)
    X, dY = operands(0, *shape)
    layer.step(X, dY)
    oracle.step(dY.cpu().double().T @ X.cpu().double())
    N = oracle.M / (oracle.V.sqrt() + 1e-6)
    u = N.norm().item()  # s_c |R_c| = |N_c|
    assert layer.optimizer.state[layer.weight]["update_norm"].item() == pytest.approx(u, rel=1e-5)
    assert abs(oracle.update_norm / u - 1) > 1e-3


def test_a_recomputed_output_that_someone_keeps_is_no_second_use():
    """Its graph lives on, and never goes backward."""

    kept = []
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    optimizer = APOLLOAdamW([{"params": [p for p in model.parameters() if p.dim() > 1], "rank": 2}])
    attach_layerwise(model, optimizer, gradients="none")
    before = copies(model)
    for _ in range(2):
        checkpoint(model, torch.ones(3, 12), use_reentrant=False).square().sum().backward()
        optimizer.step()
        model.zero_grad()
        kept.clear()
    assert not torch.equal(model[0].weight, before[0])


def errors(dtype, autocast, steps=4):
    """Of bfloat16 operands: RMS distance from float64, of an ordinary run and of one without a gradient."""
    found = {}
    for gradients in ("plain", "none"):
        layer = Layer(160, 96, {"rank": 8}, gradients, dtype)
        with torch.no_grad():
            layer.weight.zero_()
        oracle = OracleMatrix(layer.weight.cpu(), 8, lr=1e-2, weight_decay=0.1, update_proj_gap=3)
        for step in range(steps):
            X, dY = operands(step, 24, 160, 96, torch.float32 if autocast else dtype)
            layer.step(X, dY, autocast)
            oracle.step(dY.cpu().double().T @ X.cpu().double())
        found[gradients] = (layer.weight.detach().cpu().double() - oracle.weight).norm() / oracle.weight.norm()
    return found


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.full), 4])
def test_bfloat16_weights_are_no_farther_from_float64_than_ordinary_ones(backend, steps):
    """The ordinary gradient is rounded to bfloat16 on its way: one rounding more. An operand or a factor that is
    rounded would be one more here."""
    found = errors(torch.bfloat16, autocast=False, steps=steps)
    assert found["none"] <= found["plain"]
    assert found["none"] < 2**-8


def test_autocast_loses_nothing(backend):
    """bfloat16 operands of float32 weights: the ordinary gradient has 8 bits, here all 24 are left."""
    found = errors(torch.float32, autocast=True)
    assert found["plain"] > 1e-4
    assert found["none"] < 3e-6 if backend == "reference" else found["none"] < 2e-5  # P X in two bfloat16 parts


def test_int8_weights_go_the_ordinary_way(backend):
    """A gradient that differs in its last bit may move an entry by one step of its group, and a scale by its last bit;
    a weight that is rounded to float32 first, or a group requantised by another's scale, would move most."""
    found = []
    for gradients in ("plain", "none"):
        torch.manual_seed(0)
        model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64, bias=False))})
        quantize_model(model, group_size=32, stochastic_rounding=False)
        weights = [model["mlp"][0].weight, model["mlp"][2].weight]
        start = [weight.q.clone() for weight in weights]
        optimizer = optimizer_of(model, update_proj_gap=2)
        if gradients == "none":
            handle = attach_layerwise(model, optimizer, gradients="none")
            assert len(handle.without_gradient) == 2
        for step in range(3):
            model["mlp"](operands(step, 6, 96, 64)[0]).square().mean().backward()
            assert gradients == "plain" or all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        found.append([weight.q.int() for weight in weights])
    for first, second, before in zip(*found, start, strict=True):
        assert (first != before).float().mean() > 0.5
        assert (first - second).abs().max() <= 1
        assert (first != second).float().mean() < 5e-3


def test_the_input_gradient_is_that_of_the_old_weight(backend):
    """An update before it would be seen by all layers below."""
    layer = Layer(24, 16, {"rank": 4})
    before = layer.weight.detach().clone()
    X, dY = operands(0, 6, 24, 16)
    X.requires_grad_()
    (layer.module(X) * dY).sum().backward()
    torch.testing.assert_close(X.grad, dY @ before, rtol=1e-6, atol=1e-6)
    assert not torch.equal(layer.weight, before)


def test_inputs_without_a_gradient_and_of_any_shape(backend):
    """A first layer; leading dimensions, a transposed input, no tokens at all, a vector."""
    for X in (torch.randn(2, 3, 16), torch.randn(16, 6).T, torch.zeros(0, 16), torch.randn(16)):
        weights = []
        for gradients in ("plain", "none"):
            layer = Layer(24, 16, {"rank": 4}, gradients, bias=True)
            layer.module(X).square().sum().backward()
            assert gradients == "plain" or (layer.weight.grad is None and layer.module.bias.grad is None)
            layer.optimizer.step()
            weights.append([layer.weight.detach(), layer.module.bias.detach()])
        for one, other in zip(*weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_ways_may_change_in_mid_run(backend):
    """State and step counts are one: plain, without a gradient, and plain again."""
    weights = []
    for handles in (False, True):
        layer = Layer(40, 24, {"rank": 4}, "plain")
        for step in range(6):
            if handles and step == 2:
                layer.handle = attach_layerwise(layer.module, layer.optimizer, gradients="none")
            if handles and step == 4:
                layer.handle.remove()
                layer.handle.remove()
            layer.step(*operands(step, 5, 40, 24))
        weights.append(layer.weight.detach())
    assert layer.optimizer.state[layer.weight]["step"] == 6
    torch.testing.assert_close(*weights, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("limiter_norm", "most"), [("exact", 2), ("sketch", 9)])
def test_auto_makes_a_gradient_where_that_is_faster(backend, limiter_norm, most):
    """A batch that goes the slower way, a rule of the other norm, a step count that one way keeps from the other."""
    shape = (48, 32)  # in out / (in + out) is 19.2 tokens: an eighth, and a half
    plain = Layer(*shape, GROUPS["rank 4"], "plain")
    layer = Layer(*shape, GROUPS["rank 4"], "auto", limiter_norm=limiter_norm)
    ways = []
    layer.weight.register_hook(lambda gradient: ways.append("made") if gradient is not None else None)
    for step, tokens in enumerate((most, most + 1, 1, 40)):
        ways.append(tokens)
        X, dY = operands(step, tokens, *shape)
        for each in (plain, layer):
            each.step(X, dY)
        assert layer.weight.grad is None
    assert ways == [most, most + 1, "made", 1, 40, "made"]
    assert layer.optimizer.state[layer.weight]["step"] == 4
    if limiter_norm == "exact":
        moved = (plain.weight - Layer(*shape, GROUPS["rank 4"], "plain").weight).norm()
        assert (layer.weight - plain.weight).norm() <= 5e-6 * moved


def test_removing_brings_plain_behaviour_back():
    layer = Layer(40, 24, {"rank": 4})
    X, dY = operands(0, 5, 40, 24)
    layer.step(X, dY)
    y = layer.module(X)
    with layer.handle:
        pass
    before = layer.weight.detach().clone()
    for output in (y, layer.module(X)):  # of before and after: the gradient is made
        layer.weight.grad = None
        (output * dY).sum().backward()
        torch.testing.assert_close(layer.weight.grad, dY.T @ X)
    assert torch.equal(layer.weight, before)
    assert "forward" not in layer.module.__dict__


def test_gradients_that_are_not_finite_are_skipped_and_counted(backend):
    """In X, in dY and in both; norms by the Gram matrix and by rows of G, and the sketch's."""
    for tokens, norm in ((3, "exact"), (64, "exact"), (3, "sketch")):
        layer = Layer(40, 24, {"rank": 4, "weight_decay": 0.1}, limiter_norm=norm)
        before = layer.weight.detach().clone()
        for step, (bad_X, bad_dY) in enumerate(((torch.inf, 1), (1, torch.nan), (torch.nan, torch.inf)), 1):
            X, dY = operands(0, tokens, 40, 24)
            X[0, 0] *= bad_X
            dY[1, 2] *= bad_dY
            layer.step(X, dY)
            assert torch.equal(layer.weight, before)
            assert layer.optimizer.skipped_updates.item() == step
        assert all(torch.as_tensor(value).isfinite().all() for value in layer.optimizer.state[layer.weight].values())
        layer.handle.remove()
        assert layer.optimizer.skipped_updates.item() == 3


def test_forwards_that_do_not_train():
    """eval(), no_grad and a graph that is thrown away move nothing and are no second use."""
    layer = Layer(40, 24, {"rank": 4})
    X, dY = operands(0, 5, 40, 24)
    expected = X @ layer.weight.detach().T
    with torch.no_grad():
        assert torch.equal(layer.module(X), nn.functional.linear(X, layer.weight))
    layer.module.eval()
    torch.testing.assert_close(layer.module(input=X), expected)
    x = X.clone().requires_grad_()
    before = layer.weight.detach().clone()
    (slope,) = torch.autograd.grad((layer.module(x) * dY).sum(), x)
    torch.testing.assert_close(slope, dY @ before)
    assert torch.equal(layer.weight, before)
    layer.step(X, dY)
    assert not torch.equal(layer.weight, before)


def test_frozen_weights_and_late_ones():
    """A frozen weight stays; unfrozen, and in a group that is added later, it is updated without a gradient."""
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False), nn.Linear(24, 40, bias=False))
    frozen, trained, late = (layer.weight for layer in model)
    frozen.requires_grad_(False)
    optimizer = APOLLOAdamW([{"params": [frozen, trained], "rank": 4}], lr=1e-2)
    attach_layerwise(model, optimizer, gradients="none")
    before = copies(model)

    def step():
        model(torch.ones(3, 24)).square().sum().backward()
        found = [p.grad is None for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        return found

    assert step() == [True, True, False]
    assert [torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)] == [True, False, True]
    frozen.requires_grad_()
    optimizer.add_param_group({"params": [late], "rank": 4})
    step()
    assert step() == [True, True, True]
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_layers_that_are_not_plain_keep_their_gradients_hooks():
    """A parametrization computes the weight, a subclass does what it likes; a use outside of the layer is ordinary."""

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict({"mlp": nn.ModuleList([nn.Linear(12, 12, bias=False) for _ in range(3)])})
    model["mlp"].append(Own(12, 12, bias=False))
    torch.nn.utils.parametrizations.orthogonal(model["mlp"][1])
    parameters = list(model.parameters())
    optimizer = APOLLOAdamW([{"params": parameters, "rank": 4}], lr=1e-2)
    handle = attach_layerwise(model, optimizer, gradients="none")
    assert len(handle.without_gradient) == 2
    before = copies(model)
    first, second, third, own = model["mlp"]
    own(second(first(torch.ones(3, 12))) @ third.weight).square().sum().backward()
    assert all(p.grad is None for p in parameters)
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert torch.equal(second.weight @ second.weight.T, second.weight @ second.weight.T)
    optimizer.step()


def test_copies_pickles_and_state_dicts_know_nothing_of_it():
    """A copy's forward must be its own: the attached one would compute with, and move, the old weights."""
    layer = Layer(40, 24, {"rank": 4})
    X, dY = operands(0, 5, 40, 24)
    assert list(layer.module.state_dict()) == ["weight"]
    for other in (copy.deepcopy(layer.module), pickle.loads(pickle.dumps(layer.module))):
        before = layer.weight.detach().clone()
        (other(X) * dY).sum().backward()
        assert torch.equal(layer.weight, before)
        torch.testing.assert_close(other.weight.grad, dY.T @ X)
        again = copy.deepcopy(other)
        optimizer = APOLLOAdamW([{"params": [again.weight], "rank": 4}], lr=1e-2)
        again.weight.grad = None
        attach_layerwise(again, optimizer, gradients="none")
        (again(X) * dY).sum().backward()
        assert again.weight.grad is None
        assert not torch.equal(again.weight, other.weight)


def test_a_model_whose_optimizer_is_gone_is_as_it_was():
    layer = Layer(40, 24, {"rank": 4})
    module, X = layer.module, torch.ones(3, 24)
    del layer
    import gc

    gc.collect()
    module(X).sum().backward()
    assert module.weight.grad is not None
