"""The int8 format and its two roundings, against arithmetic in float64; the kernels' bits against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, drawn

from apollo_triton.int8.weight import Int8Weight, dequantized, quantized

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
LARGEST = torch.finfo(torch.float32).max
# A product with a reciprocal errs by 2**-23 of up to 255 steps, dequantising by as much.
HALF_A_STEP = 0.5 + 1e-4


def official(groups):
    """Q-APOLLO's arithmetic, from its formula: scale = max(max - min, 1e-5) / 255, zero = clamp(-round(min / scale)).
    The last two are in float64, not rounded yet."""
    low, high = groups.min(1, keepdim=True).values, groups.max(1, keepdim=True).values
    scale = torch.clamp(high - low, min=1e-5) / 255
    return scale[:, 0], -low.double() / scale.double(), groups.double() / scale.double()


def is_tie(steps):
    """Whether float32 may round to the one side or to the other."""
    return (steps - steps.floor() - 0.5).abs() < 1e-4


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e20])
def test_groups_of_both_signs_are_the_official_ones(scale):
    """The scale to the bit, the rest where the official fraction is not a half."""
    groups = drawn((50, 128), 0, scale=scale).cpu()
    q, scales, zero = quantized(groups)
    expected, zero_steps, steps = official(groups)
    assert torch.equal(scales, expected)
    known = ~is_tie(zero_steps)
    assert known.sum() > 45
    assert torch.equal(zero[known[:, 0]].double(), zero_steps.round().clamp(0, 255)[known])
    codes = (steps.round() + zero.double()[:, None]).clamp(0, 255)
    assert torch.equal(q.double()[~is_tie(steps)], codes[~is_tie(steps)])


def between(low, high):
    return torch.linspace(low, high, 16, device="cpu")


def ties(zero):
    """Values that lie in the middle of two steps of 1/256, of a group with this zero point."""
    steps = torch.cat((torch.tensor([0.0, 255.0]), torch.linspace(0, 252, 14, device="cpu").floor() + 0.5)) - zero
    return steps / 256


ADVERSARIAL = {
    "constant": torch.full((16,), 5.0),
    "negative constant": torch.full((16,), -0.3),
    "zeros": torch.zeros(16),
    "tiny": between(-1e-9, 1e-9),
    "subnormal": between(-1e-42, 1e-42),
    "just above the least range": between(0, 1.1e-5),
    "huge": between(-1, 1) * 3e38,
    "the largest": between(0, 1) * LARGEST,
    "positive": between(3, 4),
    "negative": between(-4, -3),
    "one outlier": torch.cat((torch.full((15,), 1e-3), torch.tensor([1e3]))),
    "an outlier beside subnormal values": torch.cat((torch.full((15,), 1e-44), torch.tensor([-3e38]))),
    "ties": ties(100),
    "ties beside an odd zero point": ties(101),
}


def check_errors(groups):
    """Every value within half a step, zeros exact; whoever rounds again, finds the same codes."""
    q, scale, zero = quantized(groups)
    back = dequantized(q, scale, zero)
    error = (back.double() - groups.double()).abs()
    assert back.isfinite().all()
    assert (error <= HALF_A_STEP * scale.double()[:, None]).all()
    assert (back[groups == 0] == 0).all()
    again = quantized(back)
    spans = (q.amin(1) == 0) & (q.amax(1) == 255)  # else the range is a step shorter, and the scale another
    assert torch.equal(again[0][spans], q[spans])
    assert torch.equal(again[2][spans], zero[spans])
    torch.testing.assert_close(again[1][spans], scale[spans], rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_groups_err_by_half_a_step_at_most(name):
    """The official zero point saturates groups of one sign: a group of fives comes back as 1e-5. A range that is larger
    than float32, a reciprocal of a scale that is 0, ties that are rounded by the parity of the zero point."""
    check_errors(ADVERSARIAL[name][None])


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=40))
@settings(deadline=None)
def test_any_group_errs_by_half_a_step_at_most(values):
    check_errors(torch.tensor([values]))


def test_stochastic_rounding_takes_each_neighbour_with_its_probability():
    """All the noise there is, once for each value: what favours one side, a neighbour's neighbour, values of the grid
    that move. Steps are 1/256, so that products are exact."""
    noise = torch.arange(1 - 2**15, 2**15, 2, device="cpu")[:, None] / 2**16
    inside = drawn((60,), 1).cpu().clamp(-2, 2) * 30
    exact = torch.cat((torch.tensor([-101.0, 154.0, 0.0, 1.0, -100.5, 3.0 + 2**-16]), inside, -inside))
    q, scale, zero = quantized((exact / 256).expand(len(noise), -1), noise.expand(-1, len(exact)))
    assert (scale == 1 / 256).all()
    assert (zero == 101).all()
    steps = q.double() - 101
    assert ((steps >= exact.floor()) & (steps <= exact.ceil())).all()
    assert ((steps == exact) | (exact != exact.round())).all()
    # The noise has a resolution of 2**-15 of a step, and float32 of up to 2**-16 below 256.
    bias = steps.mean(0) - exact.double()
    assert bias.abs().max() <= 2.0**-16 + 2.0**-17
    assert bias[6:].mean().abs() <= 2.0**-19  # of numbers and their opposites


def test_random_bits_do_not_favour_a_side():
    """-1/2, which a value of the grid may follow to its neighbour; a mean that is not 0."""
    noise = Int8Weight.of(torch.zeros(64, 64), 16).noise(slice(8, 64), seed=3, step=1) * 2**16
    assert noise.shape == (56, 64)
    assert (noise % 2 == 1).all()
    assert -(2**15) < noise.min() < -(2**14)
    assert 2**14 < noise.max() < 2**15


def test_stochastic_rounding_stays_on_the_grid():
    """Its ends lie up to half a step within the range: codes of -1 and 256, which are 255 and 0."""
    noise = torch.arange(1 - 2**15, 2**15, 2, device="cpu")[:, None] / 2**16
    for ends, codes in (([-100.4, 154.6], [{0}, {254, 255}]), ([-100.6, 154.4], [{0, 1}, {255}])):
        q, _, _ = quantized((torch.tensor(ends) / 256).expand(len(noise), 2), noise.expand(-1, 2))
        assert [set(column.tolist()) for column in q.T] == codes


def near_ties(seed):
    """Values a bit beside the middles of a grid of any scale, which a division may round otherwise."""
    groups = drawn((1, 16), seed).cpu()
    q, scale, zero = quantized(groups)
    inner = (q.float() - zero + 0.5) * scale
    inside = (inner > groups.min()) & (inner < groups.max()) & (q > 0) & (q < 255)
    return torch.where(inside, inner, groups)[0]


@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("stochastic", [False, True])
def test_kernels_give_the_bits_of_pytorch(size, stochastic):
    """Divisions, or another order of sums. On a GPU also a product and a sum that became one operation."""
    pytest.importorskip("triton")
    from int8_kernels import requantize_kernel

    groups = [*ADVERSARIAL.values(), *map(near_ties, range(32))]
    groups += [drawn((16,), seed, scale=10.0 ** (2 * seed - 30)).cpu() for seed in range(64 - len(groups))]
    values = torch.stack(groups)[:, :size].contiguous().to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(2**16, values.shape, generator=generator, device="cpu", dtype=torch.int32).to(DEVICE)
    bits[:, 2:10:2], bits[:, 3:11:2] = 0, 2**15  # noise of 0 and -1/2, were they not made odd
    q, zero = torch.empty_like(values, dtype=torch.uint8), torch.empty(64, dtype=torch.uint8, device=DEVICE)
    scale = torch.empty(64, device=DEVICE)
    requantize_kernel[(1,)](values, bits if stochastic else None, q, scale, zero, size, BLOCK_GROUP=16, BLOCK_GROUPS=64)
    noise = (torch.where(bits < 2**15, bits, bits - 2**16) // 2 * 2 + 1) / 2.0**16
    expected = quantized(values, noise if stochastic else None)
    for found, part in zip((q, scale, zero), expected, strict=True):
        assert torch.equal(found, part)
