"""``max_grad_norm``: one norm over all gradients, as ``clip_grad_norm_`` has it, and gradients that are only read."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import OPTIONS, make_model, same_weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from apollo_triton import APOLLOAdamW, apollo_param_groups


@pytest.mark.parametrize("limit", [1e-3, 1e3])
@pytest.mark.parametrize("group", OPTIONS.values(), ids=OPTIONS.keys())
def test_clipping_equals_clip_grad_norm(limit, group):
    models = [make_model() for _ in range(2)]
    inside = APOLLOAdamW(apollo_param_groups(models[0], **group), lr=1e-2, max_grad_norm=limit)
    outside = APOLLOAdamW(apollo_param_groups(models[1], **group), lr=1e-2)
    for step in range(6):
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        given = [p.grad.clone() for p in models[0].parameters()]
        norm = nn.utils.clip_grad_norm_(models[1].parameters(), limit)
        inside.step()
        outside.step()
        torch.testing.assert_close(inside.gradient_norm, norm)
        for p, gradient in zip(models[0].parameters(), given, strict=True):
            assert torch.equal(p.grad, gradient)  # gradients are read, never written
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "group",
    [
        {"rank": 1, "scale_type": "tensor", "scale": 128.0},
        {"rank": 16, "constructor": {"state_dtype": torch.bfloat16, "stochastic_rounding": True}},
    ],
    ids=["tensor", "channel"],
)
def test_a_limit_that_is_not_reached_changes_no_bit(backend, group):
    """The norm is of sketches that are then used. A matrix that is not finite enters no other's norm. (On a GPU the two
    ways to the moments add up a channel in different orders.)"""
    if backend == "cuda":
        pytest.skip("the last bits differ there")
    shapes = [(24, 16), (16, 24), (70, 16), (2, 20, 17), (9,)]  # 70 channels take two programs
    gap, constructor = {"update_proj_gap": 1}, group.get("constructor", {})
    group = {name: value for name, value in group.items() if name != "constructor"}
    made = []
    for limit in (None, 1e9):
        parameters = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in shapes]
        groups = [{"params": parameters[:4], **group, **gap}, {"params": parameters[4:]}]
        optimizer = APOLLOAdamW(groups, lr=1e-2, max_grad_norm=limit, **constructor)
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            if step == 0:
                parameters[2].grad[69, 0] = torch.inf
            optimizer.step()
            if limit:
                norms = [parameter.grad.double().norm() for parameter in parameters]
                finite = torch.stack([norm for norm in norms if norm.isfinite()])
                torch.testing.assert_close(optimizer.gradient_norm.double(), finite.norm(), rtol=1e-6, atol=0)
        tensors = [parameters, *([x for x in s.values() if torch.is_tensor(x)] for s in optimizer.state.values())]
        made.append([tensor for each in tensors for tensor in each])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_clipping_ignores_gradients_that_are_not_finite():
    models = [make_model() for _ in range(2)]
    optimizers = [APOLLOAdamW(apollo_param_groups(model, rank=4), max_grad_norm=0.01) for model in models]
    for model in models:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    models[0]["norm"].weight.grad[3] = torch.nan
    models[1]["norm"].weight.grad = None
    for optimizer in optimizers:
        optimizer.step()
    assert optimizers[0].skipped_updates.item() == 1
    assert same_weights(*models)


def test_clipping_of_norms_whose_squares_overflow_together():
    weights = [nn.Parameter(torch.zeros(4)) for _ in range(4)]
    for weight in weights:
        weight.grad = torch.full((4,), 6e18)
    optimizer = APOLLOAdamW(weights, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.gradient_norm.item() == pytest.approx(6e18 * 4)
    assert all((weight < 0).all() for weight in weights)


def test_clipping_by_a_tiny_factor_keeps_the_norms():
    weight = nn.Parameter(torch.zeros(12, 8))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}], max_grad_norm=1e-12, eps=1e-20)
    weight.grad = torch.full((12, 8), 1e12)
    optimizer.step()
    assert optimizer.state[weight]["update_norm"].item() > 0


def test_the_gradient_norm_is_the_last_steps():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = APOLLOAdamW([weight], max_grad_norm=1.0)
    assert optimizer.gradient_norm is None
    weight.grad = torch.full((4,), 3.0)
    optimizer.step()
    assert optimizer.gradient_norm.item() == pytest.approx(6.0)
    weight.grad = None
    optimizer.step()
    assert optimizer.gradient_norm is None


def test_ranks_with_different_shards_decide_alike(monkeypatch):
    """Sketches that are kept where two of three experts are, and not where one is: beside them is a replica of another
    weight, which would then differ in its last bits."""
    updates = pytest.importorskip("apollo_triton.backends.triton.updates")
    if torch.cuda.is_available():
        pytest.skip("the kernels run in the interpreter only where there is no CUDA device")
    asked = []

    def stop_at_decision(*given):
        asked.append(given)
        raise InterruptedError

    monkeypatch.setattr(updates, "keeps_sketch", stop_at_decision)
    for rank, experts in enumerate((2, 1)):
        torch.distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (2,))
            ones = torch.ones(experts, 16, 9)
            shape = {"shape": torch.Size((3, 16, 9)), "stride": (144, 9, 1)}
            shards = [DTensor.from_local(ones, mesh, [Shard(0)], run_check=False, **shape) for _ in range(2)]
            weights = [nn.Parameter(shards[0]), nn.Parameter(torch.ones(120, 3))]
            for weight, gradient in zip(weights, (shards[1], torch.ones(120, 3)), strict=True):
                weight.grad = gradient
            groups = [{"params": weights, "rank": 2, "proj_type": "right"}]
            with pytest.raises(InterruptedError):
                APOLLOAdamW(groups, lr=1e-2, max_grad_norm=1.0, backend="triton").step()
        finally:
            torch.distributed.destroy_process_group()
    assert asked[0] == asked[1]
