"""The kernels of Int8Linear: against float64 and against the PyTorch path, and as launches under the recorder.

On a machine with a GPU the numbers are those of the compiled kernels; what needs the recorder is skipped there.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_linear_cases import assert_a_product, floats, on_kernels, on_pytorch, results, weight_of
from kernel_cases import DEVICE, drawn
from tiers import tiers, values

pytest.importorskip("triton")

from apollo_triton.kernels.linear import blocks, run_length
from sanitizer import Recorder

from apollo_triton.core import gpu
from apollo_triton.int8.linear import linear
from apollo_triton.int8.weight import Int8Weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows of x, out, in, group size. What differs is where groups lie in rows, and which tiles are filled, cut or alone.
CASES = [
    (0, 33, 48, 16),
    (1, 33, 48, 16),
    (5, 70, 96, 48),
    (130, 33, 64, 48),  # groups across the ends of rows
    (5, 36, 25, 12),  # and ends of rows at any place in a group
    (130, 25, 36, 12),
    (5, 130, 128, 128),
    (33, 24, 200, 40),
    (130, 21, 40, 280),  # a group of seven rows
    (5, 6, 200, 200),  # of one
    (3, 5, 7, 35),  # of all
    (2, 1, 1, 1),
    (300, 150, 16, 16),  # ten blocks of rows in float32, three in half precision
]
in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the recorder needs Triton's interpreter")


@pytest.mark.parametrize(("case", "dtype"), values(CASES, DTYPES), ids=str)
def test_forward_and_gradients(case, dtype):
    """Wrong tiles at the ends, scales of a neighbour, W or a sum not rounded where it should be, or twice."""
    rows, outputs, inputs, group_size = case
    weight = weight_of(outputs, inputs, group_size, dtype)
    x, gradient = drawn((rows, inputs), 2, dtype), drawn((rows, outputs), 3, dtype)
    bias = drawn((outputs,), 4, dtype, scale=20.0) if outputs % 2 else None
    mine, recorder = results(x, weight, bias, gradient, on_kernels())
    theirs, _ = results(x, weight, bias, gradient, on_pytorch())
    W = floats(weight, dtype)
    assert_a_product(mine[0], x, W.mT, 0.0 if bias is None else bias.double())
    assert_a_product(mine[1], gradient, W)
    for one, other in zip(mine[:2], theirs[:2], strict=True):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(
            one, other, rtol=4 * torch.finfo(dtype).eps, atol=0.5 if dtype.itemsize == 2 else 1e-3
        )
    assert torch.equal(mine[2], theirs[2])
    assert bias is None or torch.equal(mine[3], theirs[3])
    if recorder and rows:
        recorder.assert_clean()
        assert [launch.kernel for launch in recorder.launches] == ["forward_kernel", "input_gradient_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), values(CASES[1:-1], DTYPES), ids=str)
def test_the_weight_is_dequantised_to_the_bit(case, dtype):
    """Products with the identity give back what the tiles held: any scale, zero point or rounding that is off."""
    _, outputs, inputs, group_size = case
    weight = weight_of(outputs, inputs, group_size, dtype)
    forward_identity = torch.eye(inputs, dtype=dtype, device=DEVICE).requires_grad_()
    with on_kernels():
        y = linear(forward_identity, weight)
        x = torch.zeros(outputs, inputs, dtype=dtype, device=DEVICE, requires_grad=True)
        linear(x, weight).backward(torch.eye(outputs, dtype=dtype, device=DEVICE))
    W = floats(weight, dtype)
    if dtype == torch.float32 and torch.cuda.is_available():
        torch.testing.assert_close(y.mT, W, rtol=1e-6, atol=0)
    else:
        assert torch.equal(y.mT, W)
    assert torch.equal(x.grad, W)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_shape(data):
    rows, outputs, inputs = (data.draw(st.integers(1, most)) for most in (40, 70, 90))
    sizes = [each for each in range(1, outputs * inputs + 1) if outputs * inputs % each == 0]
    weight = weight_of(outputs, inputs, data.draw(st.sampled_from(sizes)))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight = weight.to(dtype)
    x, gradient = drawn((rows, inputs), 2, dtype), drawn((rows, outputs), 3, dtype)
    (y, of_x, *_), recorder = results(x, weight, None, gradient, on_kernels())
    assert_a_product(y, x, floats(weight, dtype).mT)
    assert_a_product(of_x, gradient, floats(weight, dtype))
    if recorder:
        recorder.assert_clean()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_any_layout(dtype):
    """Batches of sequences, transposed activations, a gradient that is expanded: read by the wrong strides."""
    weight = weight_of(24, 48, 16, dtype)
    for x in (drawn((2, 3, 48), 2, dtype), drawn((48, 9), 2, dtype).mT, drawn((7, 96), 2, dtype)[:, ::2],
              drawn((7, 96), 2, dtype)[:, 3:51], drawn((48,), 2, dtype)):  # fmt: skip
        gradient = drawn((*x.shape[:-1], 1), 3, dtype).expand(*x.shape[:-1], 24)
        (y, of_x, of_weight, _), recorder = results(x, weight, None, gradient, on_kernels())
        assert y.shape == gradient.shape
        assert of_x.shape == x.shape
        assert_a_product(y.reshape(-1, 24), x.reshape(-1, 48), floats(weight, dtype).mT)
        assert_a_product(of_x.reshape(-1, 48), gradient.reshape(-1, 24), floats(weight, dtype))
        assert of_weight.shape == (24, 48)
        if recorder:
            recorder.assert_clean()


def test_autocast():
    """Float32 activations and bias over a float32 weight, multiplied in bfloat16; gradients in float32."""
    weight, x, bias = weight_of(24, 48, 16), drawn((6, 48), 2), drawn((24,), 4)
    gradient = drawn((6, 24), 3, torch.bfloat16)
    ends = []
    for backend in (on_kernels, on_pytorch):
        with torch.autocast(DEVICE, torch.bfloat16):
            found, _ = results(x, weight, bias, gradient, backend())
        assert [each.dtype for each in found] == [torch.bfloat16, *[torch.float32] * 3]
        ends.append(found)
    for mine, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=0.25)
    assert_a_product(ends[0][0], x.bfloat16(), floats(weight, torch.bfloat16).mT, bias.bfloat16().double())


@pytest.mark.slow
@in_interpreter
@pytest.mark.parametrize(
    ("rows", "turns", "dtype"),
    tiers(
        [(*rows, dtype) for rows in ((7, 1), (128, 1), (130, 2)) for dtype in (torch.bfloat16, torch.float32)],
        lambda rows, turns, dtype: (rows, dtype) in {(7, torch.bfloat16), (130, torch.bfloat16), (128, torch.float32)},
    ),
)
def test_bytes_moved(rows, turns, dtype, monkeypatch):
    """Through memory go q, once for each block of rows, a scale and a zero point per run, and activations; nothing
    else is read, and only the result written. A float copy of the weight anywhere fails."""
    monkeypatch.setattr("apollo_triton.int8.weight.dequantized", None)
    outputs, inputs, group_size = 192, 160, 32
    weight = weight_of(outputs, inputs, group_size, dtype)
    x, gradient = drawn((rows, inputs), 2, dtype), drawn((rows, outputs), 3, dtype)
    bias = drawn((outputs,), 4, dtype)
    size = blocks(rows, tensor_cores=dtype != torch.float32)
    turns = -(-rows // size["BLOCK_ROWS"]) if dtype == torch.float32 else turns
    (y, of_x, *_), recorder = results(x, weight, bias, gradient, on_kernels())
    recorder.assert_clean()
    cases = ((x, y, "BLOCK_SUMMED", bias.nbytes * turns), (gradient, of_x, "BLOCK_KEPT", 0))
    for launch, (activations, result, columns, extra) in zip(recorder.launches, cases, strict=True):
        runs = outputs * inputs // run_length(group_size, inputs, size[columns])
        assert launch.traffic(weight.q).loaded == turns * outputs * inputs
        assert launch.traffic(weight.scale).loaded == turns * runs * 4
        assert launch.traffic(weight.zero).loaded == turns * runs
        read = activations.nbytes * -(-result.shape[1] // size["BLOCK_KEPT"])
        assert launch.loaded == turns * (outputs * inputs + 5 * runs) + read + extra
        assert launch.stored == launch.traffic(result).stored == result.nbytes


def test_scales_are_loaded_once_for_as_many_columns_as_share_one():
    assert [run_length(group, 4096, 64) for group in (16, 32, 64, 128, 4096)] == [16, 32, 64, 64, 64]
    assert run_length(48, 96, 64) == 16
    assert run_length(12, 25, 64) == 1
    assert run_length(400, 100, 64) == 64  # four rows: no row is of two groups


@pytest.mark.slow
@in_interpreter
@pytest.mark.parametrize("side", ["outputs", "rows"])
def test_more_than_two_to_the_31_elements(side):
    """Offsets of 32 bits, which wrap. Of the weight and the activations only the pages at the end ever exist."""
    inputs, many = 4096, 2**19 + 3
    outputs, rows = (many, 2) if side == "outputs" else (20, many)
    q = torch.empty(outputs, inputs, dtype=torch.uint8)
    groups = q.numel() // inputs
    weight = Int8Weight(q, torch.empty(groups), torch.empty(groups, dtype=torch.uint8), inputs, torch.bfloat16)
    x = torch.empty(rows, inputs, dtype=torch.bfloat16)
    last = slice(-3, None)
    weight.scale.zero_()
    x[last], q[last] = drawn((min(rows, 3), inputs), 2), torch.arange(inputs) % 251
    weight.scale[last], weight.zero[last] = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([9, 8, 7], dtype=torch.uint8)
    tiles = blocks(rows, tensor_cores=True)
    program = -(-rows // tiles["BLOCK_ROWS"]) * -(-outputs // tiles["BLOCK_KEPT"]) - 1
    with on_kernels(Recorder(only=[(program,)])) as recorder:
        y = linear(x, weight)
    recorder.assert_clean()
    W = (q[last].float() - weight.zero[last].float()[:, None]) * weight.scale[last][:, None]
    assert_a_product(y[last, -3:], x[last], W.bfloat16().mT)


@in_interpreter
def test_more_than_two_to_the_31_elements_in_the_gradient():
    """Rows of W that the input gradient sums over: those at the end are met in its last turns."""
    inputs, outputs = 2**25 + 16, 65
    q = torch.empty(outputs, inputs, dtype=torch.uint8)
    weight = Int8Weight(q, torch.zeros(outputs), torch.zeros(outputs, dtype=torch.uint8), inputs, torch.bfloat16)
    q[-1, -16:], weight.scale[-1] = torch.arange(16, dtype=torch.uint8), 2.0
    x = torch.empty(1, inputs, dtype=torch.bfloat16).requires_grad_()
    tiles = blocks(1, tensor_cores=True)
    with on_kernels(Recorder(only=[(-(-inputs // tiles["BLOCK_KEPT"]) - 1,)])) as recorder:
        y = linear(x, weight)
        y.backward(torch.ones_like(y))
    forward, backward = recorder.launches
    assert forward.programs == 0
    assert not backward.strays
    assert torch.equal(x.grad[0, -16:].float(), 2.0 * torch.arange(16))


@pytest.mark.parametrize(
    ("dtype", "setting", "expected"),
    [(torch.float32, "highest", "ieee"), (torch.float32, "high", "tf32"), (torch.bfloat16, "high", "ieee")],
)
def test_float32_is_multiplied_as_pytorch_would(dtype, setting, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "launch", lambda *_, **constants: seen.append(constants))
    monkeypatch.setattr(torch.version, "hip", None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        results(drawn((40, 48), 2, dtype), weight_of(24, 48, 16, dtype), None, drawn((40, 24), 3, dtype), on_kernels())
    finally:
        torch.set_float32_matmul_precision(before)
    assert [each["PRECISION"] for each in seen] == [expected] * 2
    # A product of 64 rows or more is TF32 on sm_100 whatever PRECISION says.
    assert all((each["BLOCK_ROWS"] <= 32) == (expected == "ieee" and dtype == torch.float32) for each in seen)


@in_interpreter
def test_when_the_kernels_run():
    """Not on a CPU, not for float64, and no product that nothing needs."""
    weight, x, gradient = weight_of(24, 48, 16), drawn((6, 48), 2), drawn((6, 24), 3)
    with Recorder() as recorder:
        linear(x, weight)
    assert not recorder.launches
    with on_kernels() as recorder:
        y = linear(x.double(), weight.to(torch.float64))
    assert not recorder.launches
    assert y.dtype == torch.float64
    with on_kernels() as recorder:
        linear(x, weight.detach().requires_grad_()).backward(gradient)
    assert [launch.kernel for launch in recorder.launches] == ["forward_kernel"]


def test_activations_of_the_wrong_width_are_refused():
    """A view of them as rows of the right one would be multiplied, or memory beyond them."""
    weight = weight_of(24, 48, 16)
    for shape in ((6, 24), (6, 96), (0, 24)):
        with on_kernels(), pytest.raises(RuntimeError, match=r"cannot be multiplied: .* int8 weight of \(24, 48\)"):
            linear(drawn(shape, 2), weight)


def test_a_gradient_of_a_gradient_is_that_of_pytorch():
    """Kernels leave no graph: a penalty on the input's gradient would lose its terms without a word."""
    weight, gradient = weight_of(24, 48, 16), drawn((6, 24), 3)
    ends = []
    for backend in (on_kernels, on_pytorch):
        x, scale = drawn((6, 48), 2).requires_grad_(), torch.ones(24, device=DEVICE, requires_grad=True)
        with backend():
            (of_x,) = torch.autograd.grad(linear(x, weight) * scale, x, gradient, create_graph=True)
            of_x.square().sum().backward()
        ends.append(scale.grad)
    torch.testing.assert_close(*ends)
    assert ends[0].abs().max() > 0


def test_a_gradient_of_a_gradient_of_a_trained_weight_is_refused():
    """The input's gradient depends on it, and terms would be lost without a word."""
    weight, x = torch.nn.Parameter(weight_of(24, 48, 16)), drawn((6, 48), 2).requires_grad_()
    with pytest.raises(NotImplementedError, match="create_graph=True through an int8 weight that is trained"):
        torch.autograd.grad(linear(x, weight).sum(), x, create_graph=True)
