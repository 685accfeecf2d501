"""Stage (a), second half: every kernel once, on odd shapes, against the reference path on the CPU.

Two trainings of a few steps, with the same weights, gradients and seed: one on the kernels, one in plain PyTorch. They
may differ as ``LIMITS`` says, which is far less than a wrong tile, stride or mask makes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model
from apollo_triton.core import device_backend
from apollo_triton.int8.weight import Int8Weight

from ..contenders import MINI
from ..results_file import Row

STEPS = 2
# The largest difference of two trainings, as a share of the way that the weights went. In Triton's interpreter float32
# ones are 2e-7 apart, and tensor cores cut off a few times as much. 16-bit weights are up to 5e-4 apart there: a last
# bit of a sum takes a few to the next number. One wrong element of the smallest shapes makes 1e-2.
LIMITS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-3, "int8": 5e-3}


@dataclass(frozen=True)
class Shape:
    """A training of weights of some ``shapes``. ``int8``: the size of their groups. ``tokens``: the weight is that of a
    linear layer, which is updated within backward, from the inputs and output gradients of so many tokens."""

    name: str
    group: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ((130, 70), (70, 130), (3, 33, 71))
    dtype: torch.dtype = torch.float32
    int8: int = 0
    tokens: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def _rank(rank: int, **keys: Any) -> dict[str, Any]:
    return {"rank": rank, **keys}


HALF = (torch.bfloat16, torch.float16)
LARGER, LARGEST = ((200, 150), (150, 200)), ((300, 270), (270, 300))
_ROWS = {"second_moment": "row"}
_stochastic = {"stochastic_rounding": True, "state_dtype": torch.bfloat16}
SHAPES = (
    *(Shape(f"rank {rank}, float32", _rank(rank)) for rank in (16, 32, 20)),
    *(Shape(f"rank {rank}, float32", _rank(rank), LARGER) for rank in (64, 128)),
    Shape("rank 256, float32", _rank(256), LARGEST),
    Shape("rank 256, bfloat16", _rank(256), LARGEST, torch.bfloat16),
    *(Shape(f"rank {rank}, {str(dtype)[6:]}", _rank(rank), dtype=dtype) for rank in (4, 16, 32) for dtype in HALF),
    *(Shape(f"rank {rank}, {str(dtype)[6:]}", _rank(rank), LARGER, dtype) for rank in (64, 128) for dtype in HALF),
    Shape("rank 320, in two launches", _rank(320), ((330, 340),)),
    Shape("Mini, float32", MINI),
    Shape("Mini, bfloat16", MINI, dtype=torch.bfloat16),
    Shape("Mini, clipped", MINI, options={"max_grad_norm": 0.05}),
    Shape("rank 4, signs", _rank(4, distribution="rademacher")),
    Shape("rank 20, signs", _rank(20, distribution="rademacher")),
    Shape("rank 20, clipped", _rank(20), options={"max_grad_norm": 0.05}),
    Shape("rank 20, stochastic", _rank(20), dtype=torch.bfloat16, options=_stochastic),
    Shape("8-bit moments", _rank(20), ((320, 70),), options={"state_bits": 8, "min_8bit_size": 0}),
    Shape("dense", {}, ((33, 71), (5,))),
    Shape("step count on the device", MINI, options={"capturable": True}),
    Shape("dense, clipped", {}, ((33, 71), (5,)), options={"max_grad_norm": 0.05}),
    Shape("rows", _ROWS, ((33, 71), (130, 72), (5,))),
    Shape("rows, bfloat16", _ROWS, ((33, 71), (130, 72)), torch.bfloat16, options=_stochastic),
    Shape("rows, 8-bit", _ROWS, ((130, 72), (33, 71)), options={"state_bits": 8, "min_8bit_size": 0}),
    Shape("rows, clipped", _ROWS, ((33, 71), (3, 20000)), options={"max_grad_norm": 0.05}),
    Shape("int8, Mini", MINI, ((128, 72), (72, 128)), int8=32),
    Shape("int8, rank 16", _rank(16), ((130, 70), (70, 130)), int8=35),
    Shape("a layer from operands, Mini", MINI, ((130, 72),), tokens=200),
    Shape("a layer from operands, rank 16", _rank(16), ((72, 130),), torch.bfloat16, tokens=200),
    Shape("a layer from few operands", _rank(16), ((136, 130),), tokens=9),
    Shape("an int8 layer from operands, Mini", MINI, ((130, 128),), int8=64, tokens=200),
    Shape("an int8 layer from operands, rank 16", _rank(16), ((72, 256),), torch.bfloat16, int8=128, tokens=200),
)


def measured(job: tuple[Shape, str]) -> Row:
    """The row of a shape on a device: how far apart both trainings end, as a share of the way."""
    shape, device = job
    ways = {}
    for name, context, where in (("kernels", contextlib.nullcontext(), device), ("reference", on_reference(), "cpu")):
        with context, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ways[name] = [end.double().cpu() - start.double() for start, end in trained(shape, where, name)]
    apart = [(mine - theirs).norm() / theirs.norm() for mine, theirs in zip(*ways.values(), strict=True)]
    difference = float(torch.stack(apart).max())
    limit = LIMITS["int8" if shape.int8 else str(shape.dtype).removeprefix("torch.")]
    return {"difference": difference, "limit": limit, "right": difference <= limit}


@contextlib.contextmanager
def on_reference() -> Iterator[None]:
    """Everything runs in plain PyTorch, also where the kernels could."""
    with mock.patch.object(device_backend, "_obstacle", return_value="the reference is asked for"):
        yield


def trained(shape: Shape, device: str, name: str) -> list[tuple[Tensor, Tensor]]:
    """The weights before and after, in float32 on the CPU; int8 ones as the floats that they stand for."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(device, shape.dtype)

    if shape.tokens:
        (outputs, inputs), *_ = shape.shapes
        model = nn.Linear(inputs, outputs, bias=False, device=device, dtype=shape.dtype)
        model.weight.data = drawn(outputs, inputs, scale=0.02)
        model = nn.Sequential(model)
        if shape.int8:
            quantize_model(model, "all-linear", shape.int8)
        weights = list(model.parameters())
    else:
        weights = [nn.Parameter(drawn(*size, scale=0.02)) for size in shape.shapes]
        if shape.int8:
            weights = [nn.Parameter(Int8Weight.of(weight.detach(), shape.int8)) for weight in weights]
    before = [_floats(weight) for weight in weights]
    backend, options = ("triton", shape.options) if name == "kernels" else ("reference", dict(shape.options))
    if backend == "reference":
        options.pop("capturable", None)  # which is for kernels
    optimizer = APOLLOAdamW([{"params": weights, **shape.group}], lr=1e-2, backend=backend, seed=1, **options)
    if shape.tokens:
        attach_layerwise(model, optimizer, gradients="none")
    for _ in range(STEPS):
        if shape.tokens:
            x, gradient = drawn(shape.tokens, inputs).requires_grad_(), drawn(shape.tokens, outputs, scale=1e-2)
            model(x).backward(gradient)
        else:
            for weight in weights:
                weight.grad = drawn(*weight.shape, scale=1e-2)
        optimizer.step()
    return [(start, _floats(weight)) for start, weight in zip(before, weights, strict=True)]


def _floats(weight: Tensor) -> Tensor:
    value = weight.detach()
    if isinstance(value, Int8Weight):
        value = value.floats(slice(0, len(value)))
    return value.float().cpu().clone()
