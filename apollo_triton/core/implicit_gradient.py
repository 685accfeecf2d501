"""A linear layer's gradient G = dY^T X, kept as its two factors dY and X. G itself is never formed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import scratch
from .scratch import Scratch

LIMITER_NORMS = ("exact", "sketch")
# Buffers of ``Scratch``. The reference backend's ``apply`` keeps rows of W in buffer 0 and rows of G in buffer 1.
G_SLOT, KEPT_SLOT, CONTRACTED_SLOT = 1, 2, 3


class ImplicitGradient(NamedTuple):
    """A linear layer's gradient as its two factors: G ``[out, in]`` = output_gradient^T inputs.

    inputs X ``[tokens, in]`` and output_gradient dY ``[tokens, out]`` are contiguous and have the same dtype and
    device. ``limiter_norm`` says which norms of G the norm-growth limiter gets, one of ``LIMITER_NORMS``: "exact" is
    |G_c|^2; "sketch" is |R_c|^2, which costs nothing. The mean of |R_c|^2 over random projections is |G_c|^2.
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
        """The dtype of the two factors. G would have the same."""
        return self.inputs.dtype

    def kept_and_contracted(self, keeps_rows: bool) -> tuple[Tensor, Tensor]:
        """First the factor whose features are the channels, then the factor whose features the projection contracts."""
        X, dY = self.inputs, self.output_gradient
        return (dY, X) if keeps_rows else (X, dY)

    @property
    def can_be_scaled(self) -> bool:
        """Whether ``subtract_from`` pays: the factors are float32, and a copy of either is smaller than the weight."""
        return self.inputs.dtype == torch.float32 and len(self.inputs) < min(self.shape)

    def subtract_from(self, weight: Tensor, factors: Tensor) -> None:
        """W <- W - factors * G in float32, for ``factors`` s of shape ``[rows, 1]``, ``[1, columns]`` or, on the host,
        ``[1, 1]``. s is multiplied into X or dY, and the product of the two is added into W."""
        X, dY = self.inputs, self.output_gradient
        if factors.numel() == 1:
            (factor,) = factors.view(1).tolist()
            weight.addmm_(dY.mT, X, alpha=-factor)
        elif factors.shape[1] == 1:
            weight.addmm_(dY.mT * factors, X, alpha=-1)
        else:
            weight.addmm_(dY.mT, X * factors, alpha=-1)

    def rows(self, rows: slice, buffers: Scratch) -> Tensor:
        """Some rows of G, float32 ``[rows, in]``, in a buffer of ``buffers``. Products and sums are float32."""
        X, dY = self.inputs, self.output_gradient
        G = buffers.empty((rows.stop - rows.start, X.shape[1]), X.device, G_SLOT)
        if len(X) == 0:
            return G.zero_()
        for tokens in token_blocks(X):
            left, right = buffers.floats(dY[tokens, rows], KEPT_SLOT), buffers.floats(X[tokens], CONTRACTED_SLOT)
            torch.addmm(G, left.mT, right, beta=1 if tokens.start else 0, out=G)
        return G


def token_blocks(*factors: Tensor) -> Iterator[slice]:
    """Slices of tokens. float32 factors get one slice; for others a float32 copy of a slice is at most 4 MB."""
    tokens, features = len(factors[0]), max(factor.shape[1] for factor in factors)
    step = tokens if factors[0].dtype == torch.float32 else max(1, scratch.BLOCK_ELEMENTS // max(1, features))
    for start in range(0, tokens, max(1, step)):
        yield slice(start, min(start + step, tokens))


def pays(tokens: int, rows: int, columns: int, limiter_norm: str) -> bool:
    """Whether a step from the two factors takes at most as long as a step that forms the gradient and frees it.

    Measured on an H100 at LLaMA-7B's shapes (bench/REPORT.md): at 4096 x 4096 both take equally long at 256 tokens with
    exact norms, an eighth of in out / (in + out), and at 1024 tokens with the sketch's norms, a half of it.

    >>> pays(256, 4096, 4096, "exact"), pays(1024, 4096, 4096, "exact"), pays(1024, 4096, 4096, "sketch")
    (True, False, True)
    """
    return tokens * (rows + columns) * (8 if limiter_norm == "exact" else 2) <= rows * columns
