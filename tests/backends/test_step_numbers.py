"""The numbers of a step where the device has the learning rate or t, and how many arguments a launch takes."""

import importlib
import inspect
import math
import pkgutil

import pytest
import torch
from kernel_cases import DEVICE

pytest.importorskip("triton")

import triton.language as tl

from apollo_triton import APOLLOAdamW, kernels
from apollo_triton.backends.triton.arguments import step_arguments, step_scalars
from apollo_triton.core.settings import Settings

MOST_ARGUMENTS = 16  # of a launch, besides constants: the host takes time for each


@pytest.mark.parametrize("lr_on_device", [False, True])
@pytest.mark.parametrize("t_on_device", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), None])
def test_step_numbers_are_those_of_the_paper(betas, t_on_device, lr_on_device):
    """Within 16 roundings to float32, as exp and log of a GPU are off by some. 1 - 0.999 would be off by 2e-5."""
    lr = torch.tensor(0.01, device=DEVICE) if lr_on_device else 0.01
    options = {"correct_bias": False} if betas is None else {"betas": betas}
    optimizer = APOLLOAdamW([torch.nn.Parameter(torch.zeros(2))], lr=lr, weight_decay=0.25, **options)
    settings = Settings.of(optimizer.param_groups[0])
    for t in (1, 2, 37, 5000, 2**24):
        step = torch.tensor(float(t), device=DEVICE) if t_on_device else None
        scalars = step_scalars(settings, t, step, torch.device(DEVICE))
        *numbers, found = step_arguments(settings, scalars)
        beta1, beta2 = betas or (0.0, 0.0)
        expected = [t, 0.01 * math.sqrt(1 - beta2**t) / (1 - beta1**t), 0.01 * 0.25]
        assert (found is not None) == (t_on_device or lr_on_device)
        assert (numbers if found is None else found.tolist()) == pytest.approx(expected, rel=16 * 2**-24)
        assert scalars.step == (0 if t_on_device else t)  # by which the host knows when to refresh P


def test_no_launch_takes_more_than_16_arguments():
    taken = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if name.endswith("_kernel"):
                parameters = inspect.signature(value.fn).parameters.values()
                taken[name] = sum(each.annotation is not tl.constexpr for each in parameters)
    assert len(taken) > 15
    assert {name: count for name, count in taken.items() if count > MOST_ARGUMENTS} == {}
