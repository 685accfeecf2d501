"""Stochastic rounding of weights and moments: unbiased, and apart for each place of a parameter."""

from __future__ import annotations

import pytest
import torch
from drawn_tensors import gradients_for, normals
from tiers import INTERPRETER_FULL

from apollo_triton import APOLLOAdamW

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("shape", [(2, 64, 32), (2, 32, 64)])
def test_equal_experts_round_apart(shape):
    """Random bits are counted over the whole parameter, so that the rounding errors of experts are independent."""
    weight = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    weight.grad = gradients_for(shape[1:], 1, 9)[0].bfloat16().expand(shape).clone()
    optimizer = APOLLOAdamW(
        [{"params": [weight], "rank": 4}], lr=1e-2, stochastic_rounding=True, state_dtype=torch.bfloat16
    )
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        first, second = optimizer.state[weight][name].float()
        assert not torch.equal(first, second)
        torch.testing.assert_close(first, second, rtol=2**-7, atol=0)
    assert not torch.equal(*weight.detach())


@pytest.mark.parametrize("backend", INTERPRETER_FULL, indirect=True)
@pytest.mark.parametrize("scale_type", ["channel", pytest.param("tensor", marks=pytest.mark.full)])
def test_bfloat16_moments_follow_float32_moments(scale_type):
    """Stored with stochastic rounding, b2 = 0.999 moves them; rounded to nearest, V would stand still."""
    weights = [torch.nn.Parameter(torch.zeros(64, 48)) for _ in range(2)]
    states = []
    for weight, dtype in zip(weights, (torch.float32, torch.bfloat16), strict=True):
        optimizer = APOLLOAdamW([{"params": [weight], "rank": 8, "scale_type": scale_type}], state_dtype=dtype)
        for gradient in gradients_for((64, 48), 60, 8, scale=1.0):
            weight.grad = gradient
            optimizer.step()
        states.append(optimizer.state[weight])
    assert states[1]["exp_avg"].dtype == states[1]["exp_avg_sq"].dtype == torch.bfloat16
    exact, rounded = states[0]["exp_avg_sq"], states[1]["exp_avg_sq"].float()
    # Each of 60 roundings errs by at most 2**-8 either way, at random: the mean over 512 entries stays within 1 %.
    assert abs(rounded.mean() / exact.mean() - 1) < 1e-2
    torch.testing.assert_close(rounded, exact, rtol=0.15, atol=1e-3)


@pytest.mark.parametrize("backend", INTERPRETER_FULL, indirect=True)
@pytest.mark.parametrize("steps", [60, pytest.param(200, marks=pytest.mark.full)])
def test_stochastic_rounding_moves_weights_that_rounding_to_nearest_cannot(steps):
    gradient = normals((64, 32), 0).bfloat16()
    distances = {}
    for stochastic in (False, True):
        weight = torch.nn.Parameter(torch.ones(64, 32, dtype=torch.bfloat16))
        group = {"params": [weight], "rank": 4, "scale_type": "tensor"}
        optimizer = APOLLOAdamW([group], lr=2e-5 * 200 / steps, stochastic_rounding=stochastic, correct_bias=False)
        for _ in range(steps):
            weight.grad = gradient
            optimizer.step()
        # along the gradient, so that the rounding noise averages out
        distances[stochastic] = ((1 - weight.detach().float()) * gradient.float()).sum().item()
    exact = torch.nn.Parameter(torch.ones(64, 32))
    group = {"params": [exact], "rank": 4, "scale_type": "tensor"}
    optimizer = APOLLOAdamW([group], lr=2e-5 * 200 / steps, correct_bias=False)
    for _ in range(steps):
        exact.grad = gradient.float()
        optimizer.step()
    expected = ((1 - exact.detach()) * gradient.float()).sum().item()
    assert distances[False] < 0.2 * expected
    assert distances[True] == pytest.approx(expected, rel=0.2)
