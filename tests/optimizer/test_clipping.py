"""``max_grad_norm``: one norm over all gradients, as ``clip_grad_norm_`` has it, and gradients that are only read."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import OPTIONS, make_model, same_weights
from torch import nn

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
