"""Weights that a step changes are changed for autograd too: a graph made before the step has the old ones in mind.

Kernels write to addresses, and PyTorch's fused AdamW counts no version, so autograd notices neither. A backward pass
through such a graph would use new weights with old activations. ``torch.optim`` with ``foreach`` makes it an error.
"""

from __future__ import annotations

import pytest
import torch
from tiers import backend_params
from torch import nn

from apollo_triton import APOLLOAdamW, quantize_model

KINDS = ("low-rank", "svd", "dense", "dense bfloat16", "8-bit", "int8", "clipped")


def of_kind(kind):
    """A layer and its optimizer."""
    layer = nn.Linear(16, 32, bias=False).to(torch.get_default_device())
    group = {} if kind in ("dense", "dense bfloat16") else {"rank": 4}
    if kind == "dense bfloat16":
        layer = layer.to(torch.bfloat16)
    if kind == "int8":
        quantize_model(model := nn.ModuleDict({"layer": layer}), "all-linear", group_size=32)
        layer = model["layer"]
    options = {
        "svd": {"proj": "svd"},
        "8-bit": {"state_bits": 8, "min_8bit_size": 0},
    }.get(kind, {})
    limit = {"max_grad_norm": 1.0} if kind == "clipped" else {}
    return layer, APOLLOAdamW([{"params": [layer.weight], **group, **options}], lr=1e-2, **limit)


@pytest.mark.parametrize(
    ("backend", "kind"), backend_params(KINDS, full={"interpreter": ("svd", "8-bit", "clipped")}), indirect=["backend"]
)
def test_a_graph_made_before_the_step_notices_it(backend, kind):
    """Bug: its backward pass takes the weights after the step for those before it."""
    layer, optimizer = of_kind(kind)
    weight = layer.weight
    x = torch.ones(3, 16, dtype=weight.dtype, device=weight.device, requires_grad=True)
    for _ in range(2):  # by a new plan, and by one that is kept
        loss = layer(x).sum()
        weight.grad = torch.ones(weight.shape, dtype=weight.dtype, device=weight.device)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        layer(x).sum().backward()


def test_a_parameter_without_gradient_is_not_touched():
    """Bug: a frozen weight counts as changed, and a discriminator's step breaks the generator's graph."""
    trained, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = APOLLOAdamW([{"params": [*trained.parameters(), *other.parameters()], "rank": 2}])
    x = torch.ones(3, 4, requires_grad=True)
    loss = other(x).sum()
    trained(x).sum().backward()
    x.grad = None
    optimizer.step()
    loss.backward()
    assert x.grad is not None
