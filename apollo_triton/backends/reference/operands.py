"""A linear layer's gradient as the two factors that a backward pass has of it, and what the verbs need of them.

    G = dY^T X        R = kept^T (summed P^T)        |G_c|^2 = kept_c^T (summed summed^T) kept_c

``kept`` is the operand whose features are the channels: dY where rows are kept, X where columns are. ``rescale`` and
``apply`` are those of ``reference.py``, which asks a batch for rows of its gradient and gets them made, one block at a
time. So what follows the sketch is the ordinary step, and no tensor of the weight's size is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import scratch
from ...core.operands import _KEPT, _SUMMED, Operands, token_blocks
from ...core.scratch import Scratch
from ..interface import Sketch
from .batch import Batch


def sketch(batch: Batch, limiter_norm: str) -> Sketch:
    """R and |G_c|^2 of a batch of one matrix whose gradient is ``Operands``; G itself is not formed.

    With ``limiter_norm="sketch"`` |R_c|^2 stands for |G_c|^2, its mean over projections: free, and an estimate.
    """
    (gradient,) = batch.gradients
    assert isinstance(gradient, Operands)
    kept, summed = gradient.of(batch.geometry)
    P = batch.projections[0]
    R = torch.zeros(batch.geometry.channels, len(P), dtype=torch.float32, device=kept.device)
    for tokens in token_blocks(kept, summed):
        left, right = batch.scratch.floats(kept[tokens], _KEPT), batch.scratch.floats(summed[tokens], _SUMMED)
        R.addmm_(left.mT, right @ P.mT)
    if limiter_norm == "sketch":
        norms = R.square().sum(1)
    elif gram_is_cheaper(len(kept), *gradient.shape):
        norms = gram_norms(kept, summed, batch.scratch)
    else:
        norms = _tile_norms(gradient, batch)
    return Sketch(R.unsqueeze(0), norms.unsqueeze(0))


def gram_is_cheaper(tokens: int, rows: int, columns: int) -> bool:
    """Whether T^2 (in + out) multiplications are fewer than the T in out of G itself: at 4096 x 4096 below 2048
    tokens. The Gram matrix is then at most a quarter of the weight's size."""
    return tokens * (rows + columns) < rows * columns


def gram_norms(kept: Tensor, summed: Tensor, buffers: Scratch) -> Tensor:
    """|G_c|^2 = kept_c^T K kept_c by K = summed summed^T ``[tokens, tokens]``."""
    K = torch.zeros(len(kept), len(kept), dtype=torch.float32, device=kept.device)
    for _, block in buffers.blocks(summed.mT, _SUMMED):
        K.addmm_(block.mT, block)
    norms = [((block @ K) * block).sum(1) for _, block in buffers.blocks(kept.mT, _KEPT)]
    return torch.cat(norms).clamp_(min=0)  # a sum of terms of both signs may end below 0; NaN stays NaN


def _tile_norms(gradient: Operands, batch: Batch) -> Tensor:
    """|G_c|^2 by blocks of rows of G, which the next block overwrites."""
    keeps_rows = batch.geometry.keeps_rows
    norms = [
        torch.linalg.vector_norm(gradient.rows(rows, batch.scratch), dim=1 if keeps_rows else 0).square_()
        for rows in scratch.row_blocks(gradient.shape)
    ]
    return torch.cat(norms) if keeps_rows else torch.stack(norms).sum(0)
