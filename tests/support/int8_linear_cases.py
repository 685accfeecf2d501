"""What the tests of Int8Linear's kernels share: weights, and a pass through them on the kernels or in PyTorch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from kernel_cases import DEVICE, drawn, kernels_everywhere

pytest.importorskip("triton")

from sanitizer import Recorder

from apollo_triton.core import device_backend as backends
from apollo_triton.int8.linear import linear
from apollo_triton.int8.weight import Int8Weight


def weight_of(outputs, inputs, group_size, dtype=torch.float32, seed=0):
    """Every group has a scale and zero point of its own size, so that one taken for another shows."""
    values = drawn((outputs * inputs // group_size, group_size), seed) + drawn((outputs * inputs // group_size, 1), 1)
    sizes = 1 + torch.arange(len(values), device=DEVICE)[:, None] % 7
    return Int8Weight.of((values * sizes).view(outputs, inputs).to(dtype), group_size)


def floats(weight, dtype):
    return weight.floats(slice(0, weight.shape[0])).to(dtype)


@contextlib.contextmanager
def on_kernels(recorder=None):
    """``recorder``, or a new one, over what runs on the kernels; None on a GPU."""
    with pytest.MonkeyPatch.context() as patch, kernels_everywhere(patch):
        if torch.cuda.is_available():
            yield None
        else:
            with recorder or Recorder() as recorder:
                yield recorder


@contextlib.contextmanager
def on_pytorch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_obstacle", lambda device: "the test asks so")
        yield


def results(x, weight, bias, gradient, backend):
    """y and the gradients of x, the weight and the bias, and the recorder."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    with backend as recorder:
        y = linear(x, weight, bias)
        y.backward(gradient)
    return (y.detach(), x.grad, weight.grad, None if bias is None else bias.grad), recorder


def assert_a_product(found, left, right, addend=0.0):
    """``found`` is left @ right + addend in float64, rounded once, but for sums in float32."""
    left, right = left.double(), right.double()
    exact = left @ right + addend
    slack = 1e-5 * (left.abs() @ right.abs()) + torch.finfo(found.dtype).tiny
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= 0.51 * torch.finfo(found.dtype).eps * exact.abs() + slack).all()
