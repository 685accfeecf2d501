"""What the study tries and the package does not have: each against its rule, by hand or in float64."""

from __future__ import annotations

import math

import pytest
import torch

from apollo_triton import projection_matrix
from bench.quality.experiments import CarriedMomentum, FlooredLimiter, RowMomentum

np = pytest.importorskip("numpy")

BETA1, BETA2 = 0.9, 0.999


def make(cls, shape=(12, 8), **keys):
    weight = torch.nn.Parameter(torch.zeros(shape))
    return weight, cls([{"params": [weight], "rank": 3, "scale": 1.0, "update_proj_gap": 2, **keys}], lr=0.1, seed=5)


def step(weight, optimizer, gradient):
    weight.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_a_carried_moment_is_the_new_projection_of_the_smallest_gradient_with_the_old_one(shape):
    """P and P' the wrong way round, a carry at a step without a refresh or none at one, a second moment that is
    carried too. The smallest G with G P^T = M is numpy's least squares of P x = m, a row m at a time."""
    weight, optimizer = make(CarriedMomentum, shape)
    gradients = torch.randn((5, *shape), generator=torch.Generator().manual_seed(0))
    matrices = [projection_matrix(5, epoch, 3, 8).double().numpy() for epoch in range(3)]
    first = second = np.zeros((12, 3))
    for number, gradient in enumerate(gradients):
        epoch = number // 2
        if number in (2, 4):
            smallest = np.linalg.lstsq(matrices[epoch - 1], first.T, rcond=None)[0].T
            assert smallest @ matrices[epoch - 1].T == pytest.approx(first)
            first = smallest @ matrices[epoch].T
        tall = gradient.double().numpy() if shape[0] > shape[1] else gradient.double().numpy().T
        sketch = tall @ matrices[epoch].T
        first, second = BETA1 * first + (1 - BETA1) * sketch, BETA2 * second + (1 - BETA2) * sketch**2
        step(weight, optimizer, gradient)
        state = optimizer.state[weight]
        # float32 rounds to 6e-8 of entries of about 1.
        assert state["exp_avg"].numpy() == pytest.approx(first, abs=1e-5)
        assert state["exp_avg_sq"].numpy() == pytest.approx(second, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_a_small_update_may_grow_to_the_floor_at_once_and_a_large_one_as_before(scale):
    """A floor of the norm instead of the size a weight, of the update without its scale, or one that is no least
    size but a size. The floor is 0.1 rates a weight, and the limiter lets an update grow by 1.01 times."""

    def moved(cls, norm):
        weight, optimizer = make(cls, scale=scale, scale_type="tensor")
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        step(weight, optimizer, gradient)
        optimizer.state[weight]["update_norm"].fill_(norm)
        with torch.no_grad():
            weight.zero_()  # so that it is the update, unrounded
        step(weight, optimizer, gradient)
        rate = 0.1 * math.sqrt(1 - BETA2**2) / (1 - BETA1**2)  # with Adam's corrections of the second step
        return weight.detach().square().mean().sqrt().item() / rate

    assert moved(FlooredLimiter, 1e-3) == pytest.approx(0.1 * 1.01, rel=1e-4)  # float32, sums of 96
    tiny = 1e-3 * math.sqrt(scale / 96)
    assert moved(FlooredLimiter.__base__, 1e-3) == pytest.approx(1.01 * tiny, rel=1e-4)
    assert moved(FlooredLimiter, 1e3) == moved(FlooredLimiter.__base__, 1e3) > 0.2


def test_momentum_alone_moves_each_row_by_the_same_size():
    """The size of a column or of the whole matrix; a gradient that is added whole; a share that does nothing."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    still = torch.nn.Parameter(torch.ones(2, 2))  # it has no gradient
    optimizer = RowMomentum([weight, still], lr=0.1, share=0.5)
    root = math.sqrt(12.5)  # the root mean square of 3 and 4
    step(weight, optimizer, torch.tensor([[3.0, 4.0], [1.0, -1.0]]))
    expected = torch.tensor([[3 / root, 4 / root], [1.0, -1.0]]) * -0.05
    assert torch.allclose(weight, expected, rtol=1e-6)
    # M is 0.1 G + 0.09 G' now, in the first row (0.1 * 4 + 0.09 * 3, 0.1 * -3 + 0.09 * 4) = (0.67, 0.06).
    step(weight, optimizer, torch.tensor([[4.0, -3.0], [0.0, 0.0]]))
    root = math.sqrt((0.67**2 + 0.06**2) / 2)
    expected = expected - 0.05 * torch.tensor([[0.67 / root, 0.06 / root], [1.0, -1.0]])
    assert torch.allclose(weight, expected, rtol=1e-5)
    assert torch.equal(still, torch.ones(2, 2))
    step(weight, optimizer, torch.zeros(2, 2))
    assert torch.isfinite(weight).all()
