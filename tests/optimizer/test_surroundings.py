"""What a training script may have set or done around the optimizer: default dtypes and devices, tensor learning rates,
frozen and late parameters, named groups, huge gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apollo_triton import APOLLOAdamW, apollo_param_groups
from apollo_triton.core import projection

CLIPPED_AND_ROUNDED = {"max_grad_norm": 0.5, "state_dtype": torch.bfloat16, "stochastic_rounding": True}


@pytest.fixture(autouse=True)
def restore_defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def parameters(dtype=torch.float32):
    """Two orientations of a matrix, and a vector, with gradients; the second matrix's gradient is broken."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((24, 10), (10, 24), (24, 10), (7,)):
        weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype))
        weight.grad = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        made.append(weight)
    made[1].grad[2, 3] = torch.nan
    return made


def after_two_steps(dtype, **options):
    weights = parameters(dtype)
    optimizer = APOLLOAdamW([{"params": weights[:3], "rank": 3}, {"params": weights[3:]}], weight_decay=0.1, **options)
    optimizer.step()
    optimizer.step()
    state = [optimizer.state[w][name] for w in weights for name in ("exp_avg", "exp_avg_sq")]
    return [*(weight.detach() for weight in weights), *state], optimizer


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5, "state_dtype": torch.bfloat16, "stochastic_rounding": True}]
)
def test_the_default_dtype_does_not_matter(default, dtype, options):
    expected, _ = after_two_steps(dtype, **options)
    torch.set_default_dtype(default)
    found, optimizer = after_two_steps(dtype, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert optimizer.gradient_norm is None or optimizer.gradient_norm.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "seed_per_param": True}])
def test_the_default_device_does_not_matter(options):
    expected, _ = after_two_steps(torch.float32, **options)
    torch.set_default_device("meta")  # whatever is made there can neither be computed with nor read
    found, optimizer = after_two_steps(torch.float32, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert optimizer.skipped_updates.item() == 2
    assert APOLLOAdamW(parameters()).skipped_updates.item() == 0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_learning_rate_of_any_shape_is_the_number_in_it(shape, lr_dtype, dtype):
    expected, _ = after_two_steps(dtype, lr=2**-7)
    found, _ = after_two_steps(dtype, lr=torch.full(shape, 2**-7, dtype=lr_dtype))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-8)


def count_projections(monkeypatch):
    made = []
    original = projection.projection_matrix

    def counted(seed, epoch, *args, **kwargs):
        made.append(epoch)
        return original(seed, epoch, *args, **kwargs)

    monkeypatch.setattr(projection, "projection_matrix", counted)
    return made


def test_each_projection_is_made_once_however_many_epochs_are_under_way(monkeypatch):
    made = count_projections(monkeypatch)
    early, late = (nn.Parameter(torch.ones(12, 8)) for _ in range(2))
    other = nn.Parameter(torch.ones(12, 8))
    groups = [{"params": [early, late], "rank": 2, "update_proj_gap": 10}]
    optimizer = APOLLOAdamW([*groups, {"params": [other], "rank": 2, "update_proj_gap": 5}])
    for step in range(30):
        early.grad, other.grad = torch.ones(12, 8), torch.ones(12, 8)
        late.grad = torch.ones(12, 8) if step >= 5 else None
        optimizer.step()
    # Epochs 0 to 2 of the gap of 10, from step 0 and again from step 5, are under way as 0 to 5 of the gap of 5 pass.
    # One whose last user has gone on may be needed again by a late parameter: 0, 1 and 2 at most twice.
    assert sorted(set(made)) == [0, 1, 2, 3, 4, 5]
    assert len(made) <= 9


def test_projections_that_are_over_are_forgotten():
    weight = nn.Parameter(torch.ones(12, 8))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2, "update_proj_gap": 1}])
    for _ in range(5):
        weight.grad = torch.ones(12, 8)
        optimizer.step()
    assert len(optimizer._engine._projections._matrices) == 1


def test_a_group_without_names_can_join_named_ones():
    optimizer = APOLLOAdamW(apollo_param_groups(nn.ModuleDict({"mlp": nn.Linear(8, 8)}), rank=2))
    late = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(6, 4))]
    optimizer.add_param_group({"params": late, "rank": 2})
    for weight in late:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all((weight < 1).any() for weight in late)


def test_frozen_weights_may_have_any_dtype_until_they_are_trained():
    frozen = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64), requires_grad=False)
    quantised = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    optimizer = APOLLOAdamW([weight, frozen, quantised])
    optimizer.step()
    frozen.requires_grad_().grad = torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(4, 4\) has dtype torch.float64"):
        optimizer.step()
    assert optimizer.state[weight]["step"].item() == 1


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
