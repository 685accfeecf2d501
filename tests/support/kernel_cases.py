"""What the tests of the kernels share: parameters with gradients, and optimizers that run on the kernels anywhere."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.core import device_backend as backends
from apollo_triton.int8.weight import Int8Weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}


def drawn(shape, seed, dtype=torch.float32, scale=1.0):
    """Normals of a seed, the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu") * scale
    return values.to(DEVICE, dtype)


def set_gradient(parameter, gradient):
    """Also where the gradient has another dtype than its parameter."""
    parameter.grad = None
    if gradient.dtype != parameter.dtype:
        if not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this torch has no gradients of another dtype")
        parameter.grad_dtype = gradient.dtype
    parameter.grad = gradient


def parameters_of(shapes, dtype=torch.float32, seed=0, gradient_dtype=None, scale=1e-2):
    """One parameter a shape, with a gradient."""
    parameters = []
    for offset, shape in enumerate(shapes):
        parameters.append(nn.Parameter(drawn(shape, seed + 100 + offset, dtype)))
        set_gradient(parameters[-1], drawn(shape, seed + offset, gradient_dtype or dtype, scale))
    return parameters


def optimizer_of(low_rank, dense=(), backend="triton", lr=1e-2, constructor=None, **group):
    """``low_rank`` parameters in one group and ``dense`` ones in another."""
    groups = [{"params": list(low_rank), **group}] if low_rank else []
    if dense:
        groups.append({"params": list(dense)})
    return APOLLOAdamW(groups, lr=lr, backend=backend, **(constructor or {}))


def new_gradients(parameters, seed, scale=1e-2):
    for offset, parameter in enumerate(parameters):
        dtype = parameter.dtype if parameter.grad is None else parameter.grad.dtype
        set_gradient(parameter, drawn(parameter.shape, seed * 1000 + offset, dtype, scale))


def train(low_rank, dense=(), steps=2, seed=1, backend="triton", **options):
    """Copies of the parameters after some steps with drawn gradients, and the optimizer of the copies."""
    copies = [[nn.Parameter(each.detach().clone()) for each in group] for group in (low_rank, dense)]
    optimizer = optimizer_of(*copies, backend=backend, **options)
    everything = copies[0] + copies[1]
    for step in range(steps):
        for offset, (parameter, given) in enumerate(zip(everything, [*low_rank, *dense], strict=True)):
            dtype = parameter.dtype if given.grad is None else given.grad.dtype
            set_gradient(parameter, drawn(parameter.shape, (seed + step) * 1000 + offset, dtype, 1e-2))
        optimizer.step()
    return everything, optimizer


def state_tensors(optimizer, parameter):
    return {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}


def parts_of(weight):
    return (weight.q, weight.scale, weight.zero) if isinstance(weight, Int8Weight) else (weight.detach(),)


def assert_same_bits(ours, theirs, optimizers=None):
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.detach(), other.detach())
        if optimizers:
            states = [state_tensors(optimizer, each) for optimizer, each in zip(optimizers, (mine, other), strict=True)]
            assert states[0].keys() == states[1].keys()
            for name, value in states[0].items():
                assert torch.equal(value, states[1][name]), name


@contextmanager
def kernels_everywhere(monkeypatch):
    """``backend="auto"`` means the kernels, also for CPU tensors."""
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_obstacle", lambda device: None)
        yield
