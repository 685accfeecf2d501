"""What ``skipped_updates`` counts: gradients that are not finite, and no step that a GradScaler has skipped."""

from __future__ import annotations

import pytest
import torch
from tiers import BACKEND_MARKS, tiers
from torch import nn

from apollo_triton import APOLLOAdamW, attach_layerwise

SHAPES = [(6, 4), (2, 4, 6), (5,)]  # rows kept; two experts, columns kept; dense
MATRICES = 4  # all of them together
KERNELS = [pytest.param(name, marks=BACKEND_MARKS[name]) for name in ("interpreter", "cuda")]


def run_of(**options):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    return parameters, APOLLOAdamW([{"params": parameters, "rank": 2}], **options)


def set_gradients(parameters, value=1.0):
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, value if index else 0.0)  # one is all zeros


def device_of(backend):
    return "cuda" if backend == "cuda" else "cpu"


CASES = tiers(
    [({"max_grad_norm": 1.0}, True), ({}, False), ({}, True), ({"capturable": True}, False)],
    fast=lambda options, unscale_first: "max_grad_norm" in options,
)


@pytest.mark.parametrize(("options", "unscale_first"), CASES)
def test_a_scalers_skip_is_none(backend, options, unscale_first):
    """The kernels skip by a NaN scale, which they counted: six where the reference path had none. An overflow before
    the first step, one after it, and one after a step whose gradient was not finite without the scaler."""
    if backend == "reference":
        options = {name: value for name, value in options.items() if name != "capturable"}  # which needs the kernels
    parameters, optimizer = run_of(**options)
    scaler = torch.amp.GradScaler(device_of(backend), init_scale=4.0)
    for overflows in (True, False, True):
        set_gradients(parameters, 4.0)
        if overflows:
            parameters[1].grad[0, 0, 0] = torch.inf
        scaler.scale(torch.ones(1))
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.skipped_updates == 0
    assert {int(optimizer.state[parameter]["step"]) for parameter in parameters} == {1}
    set_gradients(parameters, torch.nan)
    optimizer.step()
    assert optimizer.skipped_updates == MATRICES - 1
    set_gradients(parameters)
    scaler.scale(torch.ones(1))
    parameters[2].grad[0] = torch.inf
    scaler.step(optimizer)
    assert optimizer.skipped_updates == MATRICES - 1


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_who_tells_the_step_of_an_overflow_is_understood(backend):
    """``found_inf`` is PyTorch's contract with any optimizer. A sum over devices may be above 1, and over no gradients
    it is the integer 0."""
    parameters, optimizer = run_of()
    for found in (torch.tensor(2.0), torch.tensor([1.0]), torch.tensor(0.0), 0):
        if isinstance(found, torch.Tensor):
            set_gradients(parameters)
        optimizer.found_inf = found
        before = parameters[1].detach().clone()
        optimizer.step()
        assert torch.equal(before, parameters[1]) == (not isinstance(found, torch.Tensor) or bool(found > 0))
        optimizer.zero_grad()
    assert optimizer.skipped_updates == 0
    assert {float(optimizer.state[parameter]["step"]) for parameter in parameters} == {1.0}


@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_without_a_scaler_every_matrix_counts(backend, gradients):
    """Also one whose update a hook has done, with a gradient or without."""
    layer = nn.Linear(6, 4)
    optimizer = APOLLOAdamW([{"params": [layer.weight], "rank": 2}, {"params": [layer.bias]}])
    attach_layerwise(layer, optimizer, gradients=gradients)
    for step in range(1, 3):
        (layer(torch.ones(3, 6)) * torch.inf).sum().backward()
        optimizer.step()
        assert optimizer.skipped_updates == 2 * step
