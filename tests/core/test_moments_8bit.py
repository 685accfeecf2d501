"""8-bit moments: the PyTorch twin against exact arithmetic and bitsandbytes, the kernels against the twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE
from tiers import pairs

from apollo_triton.core.moments_8bit import (
    BLOCK,
    code_and_thresholds,
    dequantize_blockwise,
    dynamic_code,
    quantize_blockwise,
)

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
SIZES = [1, 255, 256, 257, 1000]
INFINITY, NAN = float("inf"), float("nan")
LEAST_NORMAL = 2.0**-126
CPU_STEP = 2 / 65535  # bitsandbytes' CPU library rounds x / absmax to multiples of it


def drawn(kind, size):
    """float32 ``[size]`` on the CPU, of both signs."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size), device="cpu")
    if kind == "zeros":
        return torch.zeros_like(values)
    if kind == "outlier":
        values[size // 2] = 1e6
    if kind == "log":  # every decade of the tables
        values *= 10.0 ** (-7 * torch.rand(size, generator=torch.Generator().manual_seed(size), device="cpu"))
    return values * {"tiny": 1e-30, "huge": 1e37, "subnormal": 1e-42, "straddling": 4e-39}.get(kind, 1.0)


KINDS = ["normal", "tiny", "huge", "subnormal", "straddling", "zeros", "outlier", "log"]
NORMAL_KINDS = ["normal", "tiny", "huge", "outlier", "log"]


def bits(values):
    return values.contiguous().view(torch.int32)


def same(one, other):
    """Bit for bit, any NaN being as good as another."""
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(bits(one)[~nan], bits(other)[~nan])


def by_block(absmax, size):
    return absmax.repeat_interleave(BLOCK)[:size]


# --- the format


def test_tables_are_sorted_and_shared():
    for signed in (True, False):
        code = dynamic_code(signed)
        assert code.shape == (256,)
        assert code.dtype == torch.float32
        assert (code[1:] > code[:-1]).all()
        assert code.max() == 1
        assert (code == 0).sum() == 1
        assert dynamic_code(signed, torch.device("cpu")) is code
    assert dynamic_code(True)[0] == pytest.approx(-1 + 0.9 / 128)
    assert dynamic_code(False)[1] == pytest.approx(3.25e-7)


@SIGNED
def test_every_entry_comes_back_and_ties_go_to_the_even_index(signed):
    code = dynamic_code(signed)
    values = code.clone()
    assert quantize_blockwise(values, signed)[0].tolist() == list(range(256))
    middles = (code[:-1] + code[1:]) / 2
    lower = torch.arange(255)
    for number, expected in (
        (middles, lower + lower % 2),
        (torch.nextafter(middles, torch.tensor(-2.0)), lower),
        (torch.nextafter(middles, torch.tensor(2.0)), lower + 1),
    ):
        q, absmax = quantize_blockwise(torch.cat((number, torch.ones(1))), signed)
        assert absmax.tolist() == [1.0]
        assert torch.equal(q[:-1].long(), expected)


@SIGNED
@pytest.mark.parametrize("kind", NORMAL_KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_nearest_entry_is_chosen(signed, kind, size):
    values = drawn(kind, size)
    q, absmax = quantize_blockwise(values, signed)
    expected = torch.stack([block.abs().max() for block in values.split(BLOCK)])
    assert same(absmax, expected)
    ratio = values.double() / by_block(absmax, size).double()
    distances = (ratio[:, None] - dynamic_code(signed).double()).abs()
    chosen = distances.gather(1, q.long()[:, None])[:, 0]
    # The reciprocal, the product and the middle are rounded to float32: 2^-24 each, 2^-22 near float32's end, where
    # the reciprocal is subnormal.
    assert (chosen <= distances.amin(1) + ratio.abs() * 2.0**-21).all()


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    signed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_error_is_at_most_half_the_gap_to_a_neighbour(values, signed):
    values = torch.tensor(values, dtype=torch.float32)
    values = values if signed else values.abs()
    q, absmax = quantize_blockwise(values, signed)
    code, scale = dynamic_code(signed).double(), by_block(absmax, values.numel()).double()
    gaps = code[1:] - code[:-1]
    # Below the first entry is as much room as to half a gap: -1 to -0.993.
    half = torch.maximum(torch.cat((gaps[:1], gaps)), torch.cat((gaps, gaps[-1:])))[q.long()] / 2
    error = (dequantize_blockwise(q, absmax, signed).double() - values.double()).abs()
    # Three roundings of x / absmax, one of the result, which may be subnormal.
    most = half * scale + values.double().abs() * 2.0**-20 + 2.0**-149
    assert (error <= torch.where(scale < LEAST_NORMAL, scale, most)).all()


@SIGNED
def test_blocks_that_are_not_normal(signed):
    for values, absmax, read in (
        ([0.0, -0.0], 0.0, 0.0),
        ([1e-45, 0.0, 1e-40], 1e-40, 0.0),
        ([LEAST_NORMAL / 2], LEAST_NORMAL / 2, 0.0),
        ([1.0, NAN, 2.0], INFINITY, NAN),
        ([NAN], INFINITY, NAN),
        ([INFINITY, 1.0], INFINITY, NAN),
        ([1.0, -INFINITY, NAN], INFINITY, NAN),
    ):
        block = torch.ones(3 * BLOCK)
        block[BLOCK : 2 * BLOCK] = values[-1] if len(values) == 1 else 0.0
        block[BLOCK : BLOCK + len(values)] = torch.tensor(values)
        q, found = quantize_blockwise(block, signed)
        assert same(found, torch.tensor([1.0, absmax, 1.0]))
        assert (q[BLOCK : 2 * BLOCK] == (127 if signed else 0)).all()
        back = dequantize_blockwise(q, found, signed)
        assert same(back, torch.tensor([1.0, read, 1.0]).repeat_interleave(BLOCK))  # neighbours are left alone
    least = torch.tensor([LEAST_NORMAL, LEAST_NORMAL / 4])
    assert dequantize_blockwise(*quantize_blockwise(least, signed), signed)[0] == LEAST_NORMAL


@SIGNED
def test_zeros_read_as_zeros_whatever_the_index(signed):
    q = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert (dequantize_blockwise(q, torch.zeros(1), signed) == 0).all()


@SIGNED
def test_shape_order_and_dtype(signed):
    values = drawn("log", 600).view(20, 30)
    q, absmax = quantize_blockwise(values, signed)
    assert (q.shape, q.dtype, absmax.shape, absmax.dtype) == ((20, 30), torch.uint8, (3,), torch.float32)
    flat = quantize_blockwise(values.reshape(-1), signed)
    assert torch.equal(flat[0].view(20, 30), q)
    assert dequantize_blockwise(q, absmax, signed).shape == (20, 30)
    # Row-major whatever the strides.
    transposed = quantize_blockwise(values.t(), signed)
    copied = quantize_blockwise(values.t().contiguous(), signed)
    assert torch.equal(transposed[0], copied[0])
    assert torch.equal(
        dequantize_blockwise(q.t(), transposed[1], signed),
        dequantize_blockwise(q.t().contiguous(), transposed[1], signed),
    )
    for empty in (torch.empty(0), torch.empty(0, 3)):
        q, absmax = quantize_blockwise(empty, signed)
        assert (q.shape, absmax.shape) == (empty.shape, (0,))
        assert dequantize_blockwise(q, absmax, signed).shape == empty.shape
    scalar = quantize_blockwise(torch.tensor(3.0), signed)
    assert dequantize_blockwise(*scalar, signed).item() == 3.0


# --- bitsandbytes


@pytest.fixture(scope="module")
def functional():
    pytest.importorskip("bitsandbytes", minversion="0.50")
    return pytest.importorskip("bitsandbytes.functional")


def bitsandbytes_default(values, code):
    """bitsandbytes' plain PyTorch kernel, which is that of devices without one of their own."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    return torch.ops.bitsandbytes.quantize_blockwise.default.redispatch(keys, values, code, BLOCK)


@SIGNED
def test_tables_are_those_of_bitsandbytes(functional, signed):
    assert same(dynamic_code(signed), functional.create_dynamic_map(signed=signed))


@SIGNED
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_dequantized_values_and_absmax_are_those_of_bitsandbytes(functional, signed, kind, size):
    values = drawn(kind, size)
    code = dynamic_code(signed).clone()
    q, absmax = quantize_blockwise(values, signed)
    _, theirs = functional.quantize_blockwise(values, code=code, blocksize=BLOCK)
    assert same(absmax, theirs.absmax)
    theirs = functional.dequantize_blockwise(q, absmax=absmax, code=code, blocksize=BLOCK)
    assert same(dequantize_blockwise(q, absmax, signed), theirs)


@SIGNED
@pytest.mark.parametrize("kind", [*NORMAL_KINDS, "zeros"])
@pytest.mark.parametrize("size", [256, 1024, 8192])
def test_indices_are_those_of_bitsandbytes_in_pytorch(functional, signed, kind, size):
    # Whole blocks: it divides by absmax in the last one if that is cut short, and multiplies elsewhere.
    values = drawn(kind, size)
    q, absmax = quantize_blockwise(values, signed)
    theirs = bitsandbytes_default(values, dynamic_code(signed))
    assert same(absmax, theirs[1])
    assert torch.equal(q, theirs[0])


@SIGNED
@pytest.mark.parametrize("kind", NORMAL_KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_indices_are_those_of_bitsandbytes_on_the_cpu_but_for_its_steps(functional, signed, kind, size):
    values = drawn(kind, size)
    code = dynamic_code(signed).clone()
    q, absmax = quantize_blockwise(values, signed)
    theirs, _ = functional.quantize_blockwise(values, code=code, blocksize=BLOCK)
    ratio = values.double() / by_block(absmax, size).double()
    error, their_error = ((code.double()[index.long()] - ratio).abs() for index in (q, theirs))
    assert (error <= their_error + 2.0**-21).all()
    assert (their_error <= error + CPU_STEP).all()


@SIGNED
def test_what_sets_bitsandbytes_on_the_cpu_apart_is_its_steps(functional, signed):
    """Not followed by the package. Should this fail with a newer bitsandbytes, its CPU library has changed."""
    values = drawn("log", 4096).clamp(-1, 1).view(-1, BLOCK)
    values[:, 0] = 1.0  # absmax
    theirs, _ = functional.quantize_blockwise(values, code=dynamic_code(signed).clone(), blocksize=BLOCK)
    assert not torch.equal(theirs, quantize_blockwise(values, signed)[0])
    steps = ((values + 1) * 0.5 * 65535 + 0.5).floor()
    assert torch.equal(theirs, quantize_blockwise(steps / 65535 * 2 - 1, signed)[0])


# --- kernels


def kernels():
    pytest.importorskip("triton")
    import moments_8bit_kernels as module

    return module


SENTINEL = 171


def run_kernels(values, signed):
    """q, absmax and values of the kernels; checks that nothing was written beyond the end."""
    count = values.numel()
    blocks = -(-count // BLOCK)
    code = code_and_thresholds(signed, torch.device(DEVICE))
    q = torch.full((count + BLOCK,), SENTINEL, dtype=torch.uint8, device=DEVICE)
    absmax = torch.full((blocks + 2,), float(SENTINEL), device=DEVICE)
    back = torch.full((count + BLOCK,), float(SENTINEL), device=DEVICE)
    # Beyond the end are values that would spoil absmax.
    padded = torch.cat((values.to(DEVICE), torch.full((BLOCK,), INFINITY, device=DEVICE)))
    kernels().requantize_kernel[(blocks,)](padded, q, absmax, code, count)
    kernels().dequantize_kernel[(blocks,)](q, absmax, code, back, count)
    for tensor, used in ((q, count), (absmax, blocks), (back, count)):
        assert (tensor[used:] == SENTINEL).all()
    return q[:count].cpu(), absmax[:blocks].cpu(), back[:count].cpu()


def check_kernels(values, signed):
    q, absmax = quantize_blockwise(values, signed)
    found_q, found_absmax, back = run_kernels(values, signed)
    assert torch.equal(found_q, q)
    assert same(found_absmax, absmax)
    assert same(back, dequantize_blockwise(q, absmax, signed))


def test_kernels_know_the_block():
    assert kernels().BLOCK.value == BLOCK


@pytest.mark.parametrize(("kind", "size", "signed"), pairs(KINDS, SIZES, [True, False]))
def test_kernels_give_the_bits_of_the_twin(kind, size, signed):
    check_kernels(drawn(kind, size), signed)


@SIGNED
def test_kernels_give_the_bits_of_the_twin_at_ties_and_beside_them(signed):
    code = dynamic_code(signed)
    middles = (code[:-1] + code[1:]) / 2
    below, above = (torch.nextafter(middles, torch.tensor(end)) for end in (-2.0, 2.0))
    for number in (code[:-1], middles, below, above, -middles):
        check_kernels(torch.cat((number, torch.ones(1))), signed)


@SIGNED
def test_the_ratio_is_a_product_with_the_reciprocal(signed):
    """Beside a middle a quotient rounds to the other side now and then; blocks of 255 middles times absmax."""
    code = dynamic_code(signed)
    absmax = 1 + torch.rand(16, 1, generator=torch.Generator().manual_seed(0), device="cpu")
    values = torch.cat(((code[:-1] + code[1:]) / 2 * absmax, absmax), dim=1)
    middles, is_odd = (code[:-1] + code[1:]) / 2, torch.arange(255) % 2 == 1

    def indices(ratio):
        return ((ratio[..., None] > middles) | ((ratio[..., None] == middles) & is_odd)).sum(-1)

    expected = indices(values * (1 / absmax))
    assert not torch.equal(expected, indices(values / absmax))
    assert torch.equal(quantize_blockwise(values, signed)[0].long(), expected)
    check_kernels(values.view(-1), signed)


@SIGNED
def test_kernels_give_the_bits_of_the_twin_in_blocks_that_are_not_normal(signed):
    values = torch.ones(9, BLOCK)
    for row, number in enumerate((NAN, INFINITY, -INFINITY, 0.0, -0.0, LEAST_NORMAL, 3.4e38)):
        values[row, row] = number
    values[7] = LEAST_NORMAL / 2
    values[8] = -LEAST_NORMAL
    check_kernels(values.view(-1), signed)


@given(seed=st.integers(0, 2**31), exponent=st.integers(-45, 38), signed=st.booleans())
@settings(max_examples=25, deadline=None)
def test_kernels_give_the_bits_of_the_twin_at_any_scale(seed, exponent, signed):
    values = torch.randn(512, generator=torch.Generator().manual_seed(seed), device="cpu").double() * 10.0**exponent
    check_kernels(values.float(), signed)
