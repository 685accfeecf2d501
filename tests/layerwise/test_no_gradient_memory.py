"""Steps without a gradient: what backward and step allocate, that they never wait, and one thing after another."""

from __future__ import annotations

import pytest
import torch
from no_gradient_cases import NewTensors, copies
from tiers import backend_params
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model
from apollo_triton.backends.reference import verbs as reference
from apollo_triton.backends.reference.implicit import gram_is_cheaper
from apollo_triton.core import gpu, scratch
from apollo_triton.int8 import weight as int8

ROWS, COLUMNS = 160, 96
BLOCK = 2048  # elements at a time in float32, as 4 MB are of a real weight


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch, backend):
    """And the copies that Triton's interpreter makes of all that a kernel is given do not count."""
    for module in (scratch, reference, int8):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", BLOCK)
    if backend == "interpreter":
        launch = gpu.launch

        def unseen(*arguments, **constants):
            with _disable_current_modes():
                launch(*arguments, **constants)

        monkeypatch.setattr(gpu, "launch", unseen)


def run(
    gradients,
    dtype=torch.float32,
    tokens=6,
    int8_weights=False,
    steps=3,
    autocast=False,
    norm="exact",
    reentrant=None,
    **group,
):
    """A model of two matrices after three steps, and what was allocated in backward and step of all but the first,
    which makes the state."""
    torch.manual_seed(0)
    first, last = nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, COLUMNS, bias=False)
    model = nn.ModuleDict({"mlp": nn.Sequential(first, nn.Tanh(), last)}).to(dtype)
    if int8_weights:
        quantize_model(model, group_size=32)
    weights = [model["mlp"][0].weight, model["mlp"][2].weight]
    rest = [{"params": [model["mlp"][0].bias]}]
    options = {"stochastic_rounding": dtype == torch.bfloat16}
    group = {"params": weights, "rank": 4, "weight_decay": 0.1, "update_proj_gap": 5} | group
    optimizer = APOLLOAdamW([group, *rest], lr=1e-2, **options)
    if gradients == "none":
        attach_layerwise(model, optimizer, gradients="none", limiter_norm=norm)
    elif gradients == "freed":
        attach_layerwise(model, optimizer)
    allocated = NewTensors()
    before = copies(model["mlp"][0])[1:] if int8_weights else copies(model)
    for step in range(steps):
        x = torch.randn(tokens, COLUMNS, generator=torch.Generator("cpu").manual_seed(step), device="cpu")
        x = x.to(weights[0].device, torch.float32 if autocast else dtype)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            if reentrant is None:
                loss = model["mlp"](x).square().mean()
            else:
                loss = checkpoint(model["mlp"], x.requires_grad_(), use_reentrant=reentrant).square().mean()
        if step:
            with allocated:
                loss.backward()
                assert gradients == "plain" or all(p.grad is None for p in model.parameters())
                optimizer.step()
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    after = copies(model["mlp"][0])[1:] if int8_weights else copies(model)
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    return allocated


CASES = {
    "float32, by the Gram matrix": {},
    "float32, by rows of G": {"tokens": 70},
    "float32, by the sketch": {"norm": "sketch"},
    "one factor": {"rank": 1, "scale_type": "tensor"},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, by rows of G": {"dtype": torch.bfloat16, "tokens": 70},
    "autocast": {"autocast": True},
    "checkpointed": {"reentrant": False},
    "checkpointed, reentrant": {"reentrant": True},
    "int8": {"int8_weights": True},
    "int8, by rows of G": {"int8_weights": True, "tokens": 70, "dtype": torch.bfloat16},
}


# On the kernels: each way to the norm, one factor, a dtype that is no float32, int8, and a weight's copy in bfloat16.
ON_KERNELS = {"float32, by the sketch", "one factor", "bfloat16, by rows of G", "autocast", "int8"}


@pytest.mark.parametrize(
    ("backend", "case"), backend_params(CASES, {"interpreter": CASES.keys() - ON_KERNELS}), indirect=["backend"]
)
def test_nothing_of_a_weights_size_is_ever_allocated(backend, case):
    """Neither a gradient nor a copy of a weight, in any dtype; ordinary and freed gradients are found, as they must be.
    Activations are smaller than the weight here. It also sees every read of the device."""
    assert gram_is_cheaper(6, ROWS, COLUMNS)
    assert not gram_is_cheaper(70, ROWS, COLUMNS)
    options = CASES[case]
    assert run("none", **options).largest < ROWS * COLUMNS
    if options.keys() <= {"dtype", "rank", "scale_type"} and backend == "reference":
        for gradients in ("plain", "freed"):
            assert run(gradients, **options).largest >= ROWS * COLUMNS


def test_the_peak_is_below_that_of_freed_gradients_by_a_gradient(backend):
    """Live bytes of backward and step: what was freed is not counted."""
    freed, none = run("freed").peak, run("none").peak
    gradient = 4 * ROWS * COLUMNS
    assert freed > gradient
    assert none < freed - 0.5 * gradient
    assert none < 0.6 * gradient  # activations, the sketch, and a scaled operand
