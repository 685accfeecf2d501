"""The weights that an optimizer updates: those of the paper's LLaMAs, with gradients, without the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from apollo_triton.tools.llama import paper_figures


class Shapes(NamedTuple):
    """The shapes of the matrices that APOLLO projects, and of the rest: embedding, head, norms."""

    matrices: list[tuple[int, int]]
    rest: list[tuple[int, ...]]

    @property
    def parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.matrices + self.rest)


class Weights(NamedTuple):
    """Parameters with gradients, in the two lists of ``Shapes``."""

    matrices: list[nn.Parameter]
    rest: list[nn.Parameter]

    @property
    def all(self) -> list[nn.Parameter]:
        return self.matrices + self.rest

    @property
    def bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.all)


def layer_shapes(size: str) -> list[tuple[int, int]]:
    """The shapes of one layer's seven matrices: four of attention, then gate, up and down.

    >>> layer_shapes("60M")[3:]
    [(512, 512), (1376, 512), (1376, 512), (512, 1376)]
    """
    shape = paper_figures()["llama"][size]
    hidden, wide = shape["hidden"], shape["intermediate"]
    return [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]


def llama_shapes(size: str, layers: int | None = None, matrices_only: bool = False) -> Shapes:
    """The shapes of the LLaMA of this size, with another number of ``layers`` if given.

    >>> llama_shapes("60M").parameters, llama_shapes("60M", matrices_only=True).parameters
    (58073600, 25296896)
    """
    shape = paper_figures()["llama"][size]
    hidden, vocabulary = shape["hidden"], shape["vocab"]
    layers = shape["layers"] if layers is None else layers
    norms: list[tuple[int, ...]] = [(hidden,)] * (2 * layers + 1)
    rest = [] if matrices_only else [(vocabulary, hidden), (vocabulary, hidden), *norms]
    return Shapes(layer_shapes(size) * layers, rest)


def make_weights(shapes: Shapes, dtype: torch.dtype, device: str) -> Weights:
    """Normal numbers from one seed, times 0.02 for weights and 1e-3 for gradients. Zeros would run faster."""
    generator = torch.Generator(device).manual_seed(0)

    def normals(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)

    def parameter(shape: tuple[int, ...]) -> nn.Parameter:
        made = nn.Parameter(normals(shape, 0.02))
        made.grad = normals(shape, 1e-3)
        return made

    return Weights([parameter(shape) for shape in shapes.matrices], [parameter(shape) for shape in shapes.rest])
