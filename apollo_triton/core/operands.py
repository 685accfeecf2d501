"""A linear layer's gradient as its two factors, G = dY^T X, which is never formed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import scratch
from .geometry import Geometry
from .scratch import Scratch

LIMITER_NORMS = ("exact", "sketch")
# Slots of the scratch, of which ``reference.apply`` has the first two for rows of W and of G.
_G, _KEPT, _SUMMED = 1, 2, 3


class Operands(NamedTuple):
    """A linear layer's gradient as two factors: G [out, in] = output_gradient^T inputs, which is never formed."""

    inputs: Tensor  # X [tokens, in], contiguous
    output_gradient: Tensor  # dY [tokens, out], contiguous, same dtype and device

    @property
    def shape(self) -> torch.Size:
        """Of G."""
        return torch.Size((self.output_gradient.shape[1], self.inputs.shape[1]))

    def of(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """The operand whose features are the channels, and the one whose features are summed over."""
        X, dY = self
        return (dY, X) if geometry.keeps_rows else (X, dY)

    @property
    def can_be_scaled(self) -> bool:
        """Whether a copy of either operand is float32, and smaller than the weight."""
        return self.inputs.dtype == torch.float32 and len(self.inputs) < min(self.shape)

    def subtract_from(self, weight: Tensor, factors: Tensor) -> None:
        """W <- W - factors * G, float32, for factors ``[rows, 1]``, ``[1, columns]`` or one on the host: the factors go
        into one operand, and the product into W."""
        X, dY = self
        if factors.numel() == 1:
            (factor,) = factors.view(1).tolist()
            weight.addmm_(dY.mT, X, alpha=-factor)
        elif factors.shape[1] == 1:
            weight.addmm_(dY.mT * factors, X, alpha=-1)
        else:
            weight.addmm_(dY.mT, X * factors, alpha=-1)

    def rows(self, rows: slice, buffers: Scratch) -> Tensor:
        """Some rows of G in float32, of products and sums in float32, in memory that is used again."""
        X, dY = self
        G = buffers.empty((rows.stop - rows.start, X.shape[1]), X.device, _G)
        if len(X) == 0:
            return G.zero_()
        for tokens in token_blocks(X):
            left, right = buffers.floats(dY[tokens, rows], _KEPT), buffers.floats(X[tokens], _SUMMED)
            torch.addmm(G, left.mT, right, beta=1 if tokens.start else 0, out=G)
        return G


def token_blocks(*operands: Tensor) -> Iterator[slice]:
    """Slices of tokens: all at once in float32, else so many that the float32 copy of each is at most 4 MB."""
    tokens, features = len(operands[0]), max(each.shape[1] for each in operands)
    step = tokens if operands[0].dtype == torch.float32 else max(1, scratch.BLOCK_ELEMENTS // max(1, features))
    for start in range(0, tokens, max(1, step)):
        yield slice(start, min(start + step, tokens))


def pays(tokens: int, rows: int, columns: int, limiter_norm: str) -> bool:
    """Whether a step from the operands of so many tokens takes no longer than one that makes the gradient and frees it.

    As long on an H100 at LLaMA-7B's shapes (bench/REPORT.md): with exact norms at 256 tokens, an eighth of
    in out / (in + out) at 4096 x 4096, with the sketch's at 1024.

    >>> pays(256, 4096, 4096, "exact"), pays(1024, 4096, 4096, "exact"), pays(1024, 4096, 4096, "sketch")
    (True, False, True)
    """
    return tokens * (rows + columns) * (8 if limiter_norm == "exact" else 2) <= rows * columns
