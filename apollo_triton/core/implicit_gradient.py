"""A linear layer's gradient as its two factors, G = dY^T X, which is never formed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import scratch
from .scratch import Scratch

LIMITER_NORMS = ("exact", "sketch")
# Buffers of ``Scratch``. The reference path's ``apply`` has rows of W in buffer 0 and rows of G in buffer 1.
G_SLOT, KEPT_SLOT, CONTRACTED_SLOT = 1, 2, 3


class ImplicitGradient(NamedTuple):
    """A linear layer's gradient as its two factors: G ``[out, in]`` = output_gradient^T inputs.

    inputs X ``[tokens, in]`` and output_gradient dY ``[tokens, out]`` are contiguous, of one dtype and device.
    ``limiter_norm``: which norms of G the norm-growth limiter gets, one of ``LIMITER_NORMS``. "exact" are |G_c|^2;
    "sketch" puts |R_c|^2 in their place, whose mean over projections they are, and costs nothing.
    """

    inputs: Tensor
    output_gradient: Tensor
    limiter_norm: str = "exact"

    @property
    def shape(self) -> torch.Size:
        """The shape of G."""
        return torch.Size((self.output_gradient.shape[1], self.inputs.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors, which G would have."""
        return self.inputs.dtype

    def kept_and_contracted(self, keeps_rows: bool) -> tuple[Tensor, Tensor]:
        """The factor whose features are the channels, and the factor whose features the projection contracts."""
        X, dY = self.inputs, self.output_gradient
        return (dY, X) if keeps_rows else (X, dY)

    @property
    def can_be_scaled(self) -> bool:
        """Whether a copy of either factor is float32 and smaller than the weight."""
        return self.inputs.dtype == torch.float32 and len(self.inputs) < min(self.shape)

    def subtract_from(self, weight: Tensor, factors: Tensor) -> None:
        """W <- W - factors * G in float32, for factors ``[rows, 1]``, ``[1, columns]`` or ``[1, 1]`` on the host. They
        are multiplied into X or dY, and the product is added into W."""
        X, dY = self.inputs, self.output_gradient
        if factors.numel() == 1:
            (factor,) = factors.view(1).tolist()
            weight.addmm_(dY.mT, X, alpha=-factor)
        elif factors.shape[1] == 1:
            weight.addmm_(dY.mT * factors, X, alpha=-1)
        else:
            weight.addmm_(dY.mT, X * factors, alpha=-1)

    def rows(self, rows: slice, buffers: Scratch) -> Tensor:
        """Some rows of G in float32, multiplied and added in float32, in a buffer of ``buffers``."""
        X, dY = self.inputs, self.output_gradient
        G = buffers.empty((rows.stop - rows.start, X.shape[1]), X.device, G_SLOT)
        if len(X) == 0:
            return G.zero_()
        for tokens in token_blocks(X):
            left, right = buffers.floats(dY[tokens, rows], KEPT_SLOT), buffers.floats(X[tokens], CONTRACTED_SLOT)
            torch.addmm(G, left.mT, right, beta=1 if tokens.start else 0, out=G)
        return G


def token_blocks(*factors: Tensor) -> Iterator[slice]:
    """Slices of tokens: all at once in float32, else so many that the float32 copy of each is at most 4 MB."""
    tokens, features = len(factors[0]), max(factor.shape[1] for factor in factors)
    step = tokens if factors[0].dtype == torch.float32 else max(1, scratch.BLOCK_ELEMENTS // max(1, features))
    for start in range(0, tokens, max(1, step)):
        yield slice(start, min(start + step, tokens))


def pays(tokens: int, rows: int, columns: int, limiter_norm: str) -> bool:
    """Whether a step from the factors of so many tokens takes no longer than one that makes the gradient and frees it.

    On an H100 at LLaMA-7B's shapes (bench/REPORT.md) the two take equally long at 256 tokens with exact norms, an
    eighth of in out / (in + out) at 4096 x 4096, and at 1024 tokens with the sketch's.

    >>> pays(256, 4096, 4096, "exact"), pays(1024, 4096, 4096, "exact"), pays(1024, 4096, 4096, "sketch")
    (True, False, True)
    """
    return tokens * (rows + columns) * (8 if limiter_norm == "exact" else 2) <= rows * columns
