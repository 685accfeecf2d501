"""Random numbers in the kernels against their PyTorch twins: words, normals, signs, rounding bits."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, drawn, optimizer_of, parameters_of
from tiers import tiers

pytest.importorskip("triton")
import triton
import triton.language as tl
from apollo_triton.kernels import philox as kernels

from apollo_triton import projection_matrix
from apollo_triton.backends.interface import StepScalars
from apollo_triton.backends.triton.arguments import DTYPES
from apollo_triton.backends.triton.projections import ProjectionBuffer, _write
from apollo_triton.core.philox import Stream, philox, round_stochastic
from apollo_triton.core.projection import TENSOR_CORE_RANK
from apollo_triton.core.settings import Settings

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
ONES = 0xFFFFFFFF


@triton.jit(do_not_specialize=["seed", "key"])  # a key of 1 would be a constant, and no block of numbers
def words_kernel(p_out, seed, key, p_counters):
    w0, w1, w2, w3 = kernels.words(seed, key, tl.load(p_counters), tl.load(p_counters + 1), kernels.WEIGHT)
    tl.store(p_out, w0.to(tl.int64))
    tl.store(p_out + 1, w1.to(tl.int64))
    tl.store(p_out + 2, w2.to(tl.int64))
    tl.store(p_out + 3, w3.to(tl.int64))


@pytest.mark.parametrize(
    ("seed", "key", "counter"),
    [(0, 0, (0, 0)), (ONES, ONES, (ONES, ONES)), (0x80000000, 1, (7, 0x80000001)), (5, 9, (2, 3))],
)
def test_words_are_the_twins_also_with_all_bits_set(seed, key, counter):
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](out, seed, key, torch.tensor(counter, device=DEVICE))
    assert [word & ONES for word in out.tolist()] == list(philox((*counter, int(Stream.WEIGHT), 0), (seed, key)))


def test_streams_are_the_twins():
    for name in ("GAUSSIAN", "RADEMACHER", "WEIGHT", "EXP_AVG", "EXP_AVG_SQ"):
        assert getattr(kernels, name).value == int(Stream[name])


@triton.jit(do_not_specialize=["seed", "epoch", "start"])
def projection_rows_kernel(p_gaussian, p_signs, seed, epoch, start, RANK: tl.constexpr, COUNT: tl.constexpr):
    o = tl.arange(0, COUNT)
    for index in tl.static_range(RANK):
        tl.store(p_gaussian + index * COUNT + o, kernels.gaussian_row(seed, epoch, index, start, COUNT))
        w0, w1, w2, w3 = kernels.sign_words(seed, epoch, index, start)
        tl.store(p_signs + index * COUNT + o, kernels.signs(w0, w1, w2, w3, o))


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 2**31 - 1), block=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_entries_made_in_a_kernel_are_the_twins(seed, epoch, block):
    rank, count, start = 1, 128, 128 * block  # above rank 1 P is rounded, and read from memory
    out = torch.empty(2, rank, count, device=DEVICE)
    projection_rows_kernel[(1,)](out[0], out[1], seed, epoch, start, rank, count)
    options = {"start": start, "stop": start + count, "device": DEVICE}
    signs = projection_matrix(seed, epoch, rank, start + count, distribution="rademacher", **options)
    assert torch.equal(out[1], signs.sign())
    exact = projection_matrix(seed, epoch, rank, start + count, **options) * rank**0.5
    # An angle up to pi has an error of 2**-23, a radius up to 5.8 one of two ulps: the last bit or two.
    torch.testing.assert_close(out[0], exact, rtol=3e-7, atol=8e-7)


def test_every_default_is_one_that_all_versions_of_triton_take():
    """A plain string for a default, which triton 3.6 does not compile and 3.7 takes."""
    given = []
    for path in sorted((Path(__file__).parents[2] / "kernels").glob("[!_]*.py")):
        module = importlib.import_module(f"apollo_triton.kernels.{path.stem}")
        functions = [each.fn for each in vars(module).values() if hasattr(each, "fn")]
        for function in functions:
            given += [each.default for each in inspect.signature(function).parameters.values()]
    given = [each for each in given if each is not inspect.Parameter.empty]
    assert given
    assert all(isinstance(each, tl.constexpr) for each in given)


FAST_PROJECTIONS = {
    ((16, 0, 64), "gaussian", 0),
    ((17, 0, 100), "rademacher", ONES),
    ((17, 0, 100), "gaussian", ONES),
    ((16, 131, 1100), "gaussian", 0),
    ((16, 131, 1100), "rademacher", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "distribution", "seed"),
    tiers(
        [
            (sizes, distribution, seed)
            for sizes in ((16, 0, 64), (17, 0, 100), (64, 0, 1030), (16, 131, 1100))
            for distribution in ("gaussian", "rademacher")
            for seed in (0, ONES)
        ],
        lambda *case: case in FAST_PROJECTIONS,
    ),
)
def test_the_materialised_projection_is_the_twins_bit_for_bit(sizes, distribution, seed):
    rank, start, width = sizes
    assert rank >= TENSOR_CORE_RANK
    optimizer = optimizer_of(parameters_of([(width, width)]), rank=rank, update_proj_gap=5)
    own = Settings.of(optimizer.param_groups[0])
    projection = ProjectionBuffer.empty(distribution, seed, rank, start, width, torch.bfloat16, torch.device(DEVICE))
    projection.buffer.fill_(float("nan"))
    for step in (1, 5, 6, 23):
        _write(projection, own, StepScalars(step), force=True)
        whole = projection_matrix(seed, (step - 1) // 5, rank, start + width, distribution=distribution, device=DEVICE)
        exact = whole[:, start:]
        torch.testing.assert_close(projection.buffer[:, :width].float() / rank**0.5, exact, rtol=2e-7, atol=0)
        assert torch.equal(projection.buffer[:, :width], (exact * rank**0.5).to(torch.bfloat16))
        assert torch.all(projection.buffer[:, width:] == 0)  # what tensor cores multiply besides


@triton.jit
def round_kernel(p_values, p_element, p_row, seed, step, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row_length = COLUMNS
    o = tl.arange(0, ROWS)[:, None] * row_length + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(p_values + o)
    bits = kernels.rounding_bits(seed, step, first + o.to(tl.int64), kernels.EXP_AVG)
    tl.store(p_element + o, kernels.round_stochastic(values, bits))
    bits = kernels.rounding_bits_by_row(seed, step, first, row_length, ROWS, COLUMNS, kernels.EXP_AVG)
    tl.store(p_row + o, kernels.round_stochastic(values, bits))


@pytest.mark.parametrize("first", [0, 8, 2**35 + 16])
def test_stochastic_rounding_is_the_twins(first):
    values = drawn((8, 16), 0)
    values[0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    element, row = (torch.empty(8, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    round_kernel[(1,)](values, element, row, 3, 11, first, 8, 16)
    expected = round_stochastic(values, 3, 11, Stream.EXP_AVG, first)
    for result in (element, row):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(expected[1:], values[1:].to(torch.bfloat16))


@triton.jit
def nearest_kernel(p_values, p_out, DTYPE: tl.constexpr, COUNT: tl.constexpr):
    o = tl.arange(0, COUNT)
    tl.store(p_out + o, kernels.round_nearest(tl.load(p_values + o), DTYPE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_nearest_is_torchs(dtype):
    values = drawn((1024,), 1)
    ties = torch.arange(256, dtype=torch.float32, device=DEVICE) / 256 + 1 + 2**-9  # half way between two bfloat16
    values[:256] = ties
    values[256:259] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    out = torch.empty(1024, dtype=dtype, device=DEVICE)
    nearest_kernel[(1,)](values, out, DTYPES[dtype], 1024)
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)
