"""Dense parameters with 8-bit moments: bitsandbytes' update in this package's convention."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import DEVICE, drawn, parameters_of
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.reference import dense_8bit
from apollo_triton.core.moments_8bit import dequantize_blockwise, dynamic_code

EIGHT_BITS = {"state_bits": 8, "min_8bit_size": 257}


def steps(optimizer, parameters, gradients):
    for given_ in gradients:
        for parameter, gradient in zip(parameters, given_, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def test_dense_moments_are_those_of_bitsandbytes_adamw(bitsandbytes):
    """Its optimizer on the same gradients: the same bits of state, and the same weights but for where eps stands and
    the decay, which it does first."""
    start = drawn((130, 100), 0)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = APOLLOAdamW([ours], lr=1e-2, eps=1e-12, **EIGHT_BITS)
    other = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, eps=1e-12, weight_decay=0.0)
    for step in range(5):
        gradient = drawn((130, 100), 10 + step)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    for name, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
        assert torch.equal(mine.state[ours][f"{name}_q"], other.state[theirs][f"state{number}"])
        assert torch.equal(mine.state[ours][f"{name}_absmax"], other.state[theirs][f"absmax{number}"])
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() <= 1e-5 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"correct_bias": False, "eps": 1e-3}, {"lr": torch.tensor(1e-2)}]
)
def test_a_first_dense_step_is_that_of_float_moments(options, dtype, bitsandbytes):
    """Which are zeros in both; several chunks, the last of them short."""
    start = drawn((40, 130), 0, dtype)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    ours.grad = theirs.grad = drawn((40, 130), 1, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_8bit, "CHUNK", 1024)
        APOLLOAdamW([ours], **({"lr": 1e-2, **EIGHT_BITS} | options)).step()
    APOLLOAdamW([theirs], **({"lr": 1e-2} | options)).step()
    if dtype == torch.float32:
        assert (ours - theirs).norm() <= 1e-5 * (theirs - start).norm()
    else:
        assert (ours != theirs).float().mean() < 0.01


def test_chunks_do_not_change_a_dense_step(bitsandbytes, monkeypatch):
    ends = []
    for chunk in (dense_8bit.CHUNK, 512):
        monkeypatch.setattr(dense_8bit, "CHUNK", chunk)
        weight = nn.Parameter(drawn((71, 67), 0, torch.bfloat16))
        optimizer = APOLLOAdamW([weight], lr=1e-2, **EIGHT_BITS, stochastic_rounding=True, max_grad_norm=0.1)
        steps(optimizer, [weight], [[drawn((71, 67), 5 + step, torch.bfloat16)] for step in range(3)])
        ends.append([weight.detach(), *(value for name, value in optimizer.state[weight].items() if name != "seed")])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_clipped_gradients_enter_the_moments_clipped(bitsandbytes):
    weight, gradient = nn.Parameter(drawn((64, 80), 0)), drawn((64, 80), 1)
    optimizer = APOLLOAdamW([weight], state_bits=8, max_grad_norm=0.5)
    steps(optimizer, [weight], [[gradient]])
    state = optimizer.state[weight]
    M = dequantize_blockwise(state["exp_avg_q"], state["exp_avg_absmax"], True)
    expected = 0.1 * 0.5 / gradient.norm() * gradient
    assert (M - expected).abs().max() <= 0.02 * expected.abs().max()


def test_stochastic_rounding_moves_dense_bfloat16_weights_by_less_than_a_step(bitsandbytes):
    means = []
    for stochastic in (True, False):
        weight = nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16, device=DEVICE))
        optimizer = APOLLOAdamW([weight], lr=1e-4, **EIGHT_BITS, stochastic_rounding=stochastic)
        steps(optimizer, [weight], [[torch.ones_like(weight)]] * 10)  # 10 steps of 1e-4, where 2**-8 is the least
        means.append(1 - weight.double().mean().item())
    assert means[1] == 0
    assert means[0] == pytest.approx(1e-3, rel=0.2)


def test_dense_gradients_that_are_not_finite_change_nothing(bitsandbytes):
    weight = nn.Parameter(drawn((64, 80), 0))
    optimizer = APOLLOAdamW([weight], lr=1e-2, weight_decay=0.1, **EIGHT_BITS)
    steps(optimizer, [weight], [[drawn((64, 80), 1)]])
    before = copy.deepcopy([weight.detach(), optimizer.state[weight]])
    bad = drawn((64, 80), 2)
    bad[3, 3] = math.inf
    steps(optimizer, [weight], [[bad]])
    assert torch.equal(weight, before[0])
    for name, value in before[1].items():
        if name not in ("step", "seed"):
            assert torch.equal(value, optimizer.state[weight][name]), name
    assert optimizer.skipped_updates == 1


def test_a_dense_weight_that_is_not_contiguous_is_moved(bitsandbytes):
    ends = []
    for layout in (lambda x: x, lambda x: x.t().contiguous().t()):
        weight = nn.Parameter(layout(drawn((70, 90), 0)))
        optimizer = APOLLOAdamW([weight], lr=1e-2, **EIGHT_BITS)
        steps(optimizer, [weight], [[drawn((70, 90), 1)]] * 2)
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_older_versions_of_bitsandbytes_have_fewer_arguments(monkeypatch):
    given_ = {}

    def update(  # 0.43's
        optimizer_name, g, p, state1, state2, beta1, beta2, eps, step, lr, qmap1, qmap2, absmax1, absmax2,
        weight_decay=0.0, gnorm_scale=1.0, skip_zeros=False,
    ):  # fmt: skip
        given_.update(locals())

    monkeypatch.setattr(dense_8bit, "require", lambda *_: SimpleNamespace(optimizer_update_8bit_blockwise=update))
    dense_8bit.bitsandbytes_update.cache_clear()
    try:
        (weight,) = parameters_of([(64, 64)])
        with monkeypatch.context() as patch:
            patch.setattr(dense_8bit, "obstacle", lambda device: None)
            APOLLOAdamW([weight], **EIGHT_BITS, betas=(0.8, 0.9)).step()
    finally:
        dense_8bit.bitsandbytes_update.cache_clear()
    assert (given_["beta1"], given_["beta2"], given_["weight_decay"]) == (0.8, 0.9, 0.0)
    assert torch.equal(given_["qmap2"], dynamic_code(False, DEVICE))
