"""The kernels of ``Int8Linear``: PyTorch's numbers at any shape, exact bytes, no stray access, in any order."""

from __future__ import annotations

import pytest
import torch
from fused_cases import DEVICE, drawn, kernels_everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")

from apollo_triton import int8_linear, quantize_model
from apollo_triton.int8 import Int8Weight

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
# Sums of so many products in another order, and where results are rounded once: of twice.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    with kernels_everywhere(monkeypatch):
        yield


def case(rows, outputs, columns, group_size, dtype=torch.float32, seed=0):
    weight = Int8Weight.of(drawn((outputs, columns), seed, dtype), group_size)
    x, gradient = drawn((rows, columns), seed + 1, dtype), drawn((rows, outputs), seed + 2, dtype)
    return weight, x, gradient, drawn((outputs,), seed + 3, dtype)


def check(weight, x, gradient, bias):
    """Both products against float64 ones of the weight as it is rounded to the dtype of x."""
    W = weight.floats(slice(0, weight.shape[0])).to(x.dtype).double()
    y, dx = int8_linear.forward(x, weight, bias), int8_linear.input_gradient(gradient, weight)
    assert (y.dtype, dx.dtype, dx.shape) == (x.dtype, x.dtype, x.shape)
    expected = x.double() @ W.T + (0 if bias is None else bias.double())
    for found, exact, size in (
        (y, expected, x.double().abs() @ W.abs().T + 1),
        (dx, gradient.double() @ W, gradient.double().abs() @ W.abs() + 1),
    ):
        error = (found.double() - exact).abs()
        rounding = TOLERANCES[x.dtype] / 2 * exact.abs() if x.dtype != torch.float32 else 0
        assert (error <= rounding + 1e-6 * size).all()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "group_size"),
    [
        (130, 40, 256, 128),  # two tiles of rows, a scale a row of a tile
        (5, 140, 128, 64),
        (17, 33, 96, 32),
        (5, 33, 48, 16),  # a scale an element
        (1, 3, 40, 12),  # groups that go on in the next row
        (9, 64, 64, 512),  # groups of several rows
        (7, 150, 1, 50),
    ],
)
def test_products_are_those_of_floats(rows, outputs, columns, group_size, dtype):
    weight, x, gradient, bias = case(rows, outputs, columns, group_size, dtype)
    check(weight, x, gradient, bias)
    check(weight, x, gradient, None)


@given(
    rows=st.integers(1, 40),
    outputs=st.integers(1, 70),
    groups=st.integers(1, 5),
    group_size=st.sampled_from([1, 3, 16, 20, 32, 64]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(rows, outputs, groups, group_size, seed):
    weight, x, gradient, bias = case(rows, outputs, groups * group_size, group_size, seed=seed)
    check(weight, x, gradient, bias)


def test_tiles_of_rows_beyond_a_band_are_all_computed():
    """More than eight tiles of rows: the order that keeps a tile of W in the cache."""
    weight, x, gradient, bias = case(9 * 128 + 3, 130, 16, 16)
    check(weight, x, gradient, bias)


def test_a_layer_trains_as_by_pytorch(monkeypatch):
    """Output and all gradients, for activations of three dimensions that are not contiguous; gradients that are
    expanded, as those of a sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).to(DEVICE)
    quantize_model(model, "all-linear", group_size=16)
    results = []
    for use in (True, False):
        with monkeypatch.context() as patch:
            if not use:
                patch.setattr(int8_linear, "_has_kernels", lambda *_: False)
            x = drawn((64, 3, 5), 1).permute(2, 1, 0).requires_grad_()
            model.zero_grad()
            y = model(x)
            y.sum().backward()
            results.append([y, x.grad, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_autocast_and_empty_batches():
    layer = quantize_model(nn.ModuleDict({"mlp": nn.Linear(32, 16)}).to(DEVICE), group_size=32)["mlp"]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layer(torch.ones(2, 32, device=DEVICE)).dtype == torch.bfloat16
    x = torch.ones(0, 32, device=DEVICE, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape) == ((0, 16), (0, 32))
    assert layer.weight.grad.count_nonzero() == 0


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the recorder needs Triton's interpreter")


@interpreted
@pytest.mark.parametrize("group_size", [64, 12])
def test_a_weight_is_read_once_a_tile_of_rows_and_never_stored(group_size):
    from sanitizer import Recorder

    weight, x, gradient, bias = case(40, 96, 192, group_size, torch.bfloat16)
    with Recorder() as recorder:
        y = int8_linear.forward(x, weight, bias)
        dx = int8_linear.input_gradient(gradient, weight)
    recorder.assert_clean()
    for launch, result, given_ in zip(recorder.launches, (y, dx), (x, gradient), strict=True):
        assert launch.traffic(weight.q).loaded == weight.numel()
        assert launch.traffic(result).stored == launch.stored == result.nbytes
        assert launch.traffic(given_).loaded == given_.nbytes * (3 if result is dx else 1)  # tiles of 64 columns
        if group_size == 64:
            assert launch.traffic(weight.scale).loaded == weight.scale.nbytes


@interpreted
def test_programs_in_any_order_give_the_same_bits():
    """Accesses beyond the ends, where sentinels are, and tiles that two programs write."""
    from sanitizer import Recorder

    weight, x, gradient, bias = case(150, 140, 72, 12)
    ends = []
    for order in (None, 1):
        with Recorder(shuffle=order) as recorder:
            ends.append((int8_linear.forward(x, weight, bias), int8_linear.input_gradient(gradient, weight)))
        recorder.assert_clean()
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))
