"""Philox, the projection matrix and stochastic rounding: known answers, slices, and what the statistics must be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_triton import projection_matrix
from apollo_triton.core.philox import Stream, parameter_seed, philox, round_stochastic

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's published vectors for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert tuple(int(word) for word in philox((torch.tensor(counter[0]), *counter[1:]), key)) == words


@given(
    width=st.integers(1, 600),
    cut=st.tuples(st.integers(0, 600), st.integers(0, 600)),
    rank=st.integers(1, 9),
    distribution=st.sampled_from(["gaussian", "rademacher"]),
)
@settings(max_examples=60, deadline=None)
def test_a_slice_is_the_slice_of_the_whole(width, cut, rank, distribution):
    start, stop = sorted(min(edge, width) for edge in cut)
    whole = projection_matrix(3, 7, rank, width, distribution=distribution)
    part = projection_matrix(3, 7, rank, width, distribution=distribution, start=start, stop=stop)
    assert part.shape == (rank, stop - start)
    assert torch.equal(part, whole[:, start:stop])


def test_an_entry_depends_on_rank_index_not_on_the_number_of_ranks():
    narrow, wide = projection_matrix(1, 2, 3, 50), projection_matrix(1, 2, 12, 50)
    torch.testing.assert_close(narrow * math.sqrt(3), wide[:3] * math.sqrt(12), rtol=3e-7, atol=0)
    longer = projection_matrix(1, 2, 3, 90)
    assert torch.equal(narrow, longer[:, :50])


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_moments(distribution):
    rank, width = 64, 4096
    entries = projection_matrix(11, 0, rank, width, distribution=distribution).double() * math.sqrt(rank)
    n = entries.numel()
    # Five standard errors of each moment's estimate over n independent entries.
    assert abs(entries.mean()) < 5 / math.sqrt(n)
    assert abs(entries.square().mean() - 1) < 5 * math.sqrt(2 / n)
    fourth = 3.0 if distribution == "gaussian" else 1.0
    assert abs(entries.pow(4).mean() - fourth) < 5 * math.sqrt(96 / n)
    if distribution == "rademacher":
        assert torch.equal(entries.float().abs().unique(), torch.ones(1))


def test_gaussian_tail_is_normal():
    entries = projection_matrix(5, 0, 1, 1 << 20).double().flatten()
    for bound in (1.0, 2.0, 3.0, 4.0):
        probability = math.erfc(bound / math.sqrt(2))
        error = 5 * math.sqrt(probability / entries.numel())
        assert abs((entries.abs() > bound).double().mean() - probability) < error


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_seeds_epochs_and_indices_are_independent(distribution):
    def entries(seed, epoch):
        return projection_matrix(seed, epoch, 32, 1024, distribution=distribution).double().flatten() * math.sqrt(32)

    base = entries(0, 0)
    others = [entries(1, 0), entries(0, 1), entries(1, 1), base.view(32, 1024).roll(1, 0).flatten(), base.roll(1)]
    others += [base.roll(4), base.roll(32), base.roll(128), base.view(32, 1024).flip(1).flatten()]
    for other in others:
        # The correlation of n independent pairs has standard deviation 1/sqrt(n). Flipped, pairs come twice.
        assert abs((base * other).mean()) < 5 * math.sqrt(2) / math.sqrt(base.numel())
    assert not torch.equal(entries(0, 1), entries(1, 0))


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [8, 64])
def test_johnson_lindenstrauss_error(distribution, rank):
    """E |P x|^2 = |x|^2, with relative variance 2/rank (a little less for signs): paper, theorem 4.1."""
    x = torch.randn(512, 2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratios = []
    for epoch in range(40):
        P = projection_matrix(0, epoch, rank, 512, distribution=distribution).double()
        ratios.append((P @ x).square().sum(0) / x.square().sum(0))
    ratio = torch.stack(ratios)
    assert abs(ratio.mean() - 1) < 5 * math.sqrt(2 / rank / 40) / math.sqrt(20)
    assert ratio.var().item() == pytest.approx(2 / rank, rel=0.2)


def test_dtype_and_default_slice():
    exact = projection_matrix(0, 3, 5, 33)
    assert exact.dtype == torch.float32
    half = projection_matrix(0, 3, 5, 33, dtype=torch.bfloat16)
    assert torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"seed": -1}, "seed: -1"),
        ({"seed": 2**32}, "seed: 4294967296"),
        ({"epoch": -1}, "epoch: -1"),
        ({"rank": 0}, "rank: 0"),
        ({"start": 5, "stop": 3}, "stop: 3 .allowed: 5 to 8"),
        ({"stop": 9}, "stop: 9 .allowed: 0 to 8"),
        ({"distribution": "normal"}, "distribution: 'normal'"),
    ],
)
def test_bad_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        projection_matrix(**({"seed": 0, "epoch": 0, "rank": 2, "width": 8} | arguments))


def test_parameter_seeds_differ_and_repeat():
    seeds = [parameter_seed(seed, index) for seed in (0, 1) for index in range(500)]
    assert len(set(seeds)) == 1000
    assert parameter_seed(1, 7) == seeds[507]
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_stochastic_rounding_is_unbiased_and_picks_a_neighbour():
    value = torch.tensor(1.0 + 0.3 * 2**-7)  # three tenths of the way between two bfloat16 numbers
    for sign in (1, -1):
        rounded = round_stochastic((sign * value).expand(1 << 16), 0, 1, Stream.WEIGHT, 0).double() * sign
        assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
        share = (rounded > 1).double().mean().item()
        assert abs(share - 0.3) < 5 * math.sqrt(0.21 / (1 << 16))


def test_stochastic_rounding_leaves_what_needs_no_rounding():
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, math.nan]).repeat(50)
    rounded = round_stochastic(values, 9, 4, Stream.EXP_AVG, 0)
    assert torch.equal(rounded.nan_to_num(7.0), values.bfloat16().nan_to_num(7.0))


@given(length=st.integers(1, 100), cut=st.integers(0, 100), start=st.integers(0, 2**34))
@settings(max_examples=60, deadline=None)
def test_stochastic_rounding_does_not_depend_on_blocks(length, cut, start):
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    cut = min(cut, length)
    whole = round_stochastic(values, 1, 2, Stream.WEIGHT, start)
    first = round_stochastic(values[:cut], 1, 2, Stream.WEIGHT, start)
    second = round_stochastic(values[cut:], 1, 2, Stream.WEIGHT, start + cut)
    assert torch.equal(whole, torch.cat((first, second)))


def test_stochastic_rounding_differs_between_steps_streams_and_seeds():
    values = torch.full((512,), 1.0 + 2**-8)
    base = round_stochastic(values, 1, 2, Stream.WEIGHT, 0)
    for seed, step, stream in ((2, 2, Stream.WEIGHT), (1, 3, Stream.WEIGHT), (1, 2, Stream.EXP_AVG)):
        agreement = (round_stochastic(values, seed, step, stream, 0) == base).double().mean()
        assert 0.35 < agreement < 0.65  # half the coins agree; 512 of them have a standard deviation of 0.022
