"""The sketch of a linear layer's gradient that is never formed, from its two factors.

    G = dY^T X        R = kept^T (contracted P^T)        |G_c|^2 = kept_c^T (contracted contracted^T) kept_c

``kept`` is the factor whose features are the channels: dY where rows are kept, X where columns are. ``rescale`` and
``apply`` are those of ``verbs.py``: they ask the batch for rows of its gradient, which are made one block at a time. So
no tensor of the weight's size is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import scratch
from ...core.implicit_gradient import CONTRACTED_SLOT, KEPT_SLOT, ImplicitGradient, token_blocks
from ...core.scratch import Scratch


def sketch(gradient: ImplicitGradient, keeps_rows: bool, P: Tensor, buffers: Scratch) -> tuple[Tensor, Tensor]:
    """R ``[channels, rank]`` and |G_c|^2 ``[channels]``, float32, of G = dY^T X.

    With ``limiter_norm="sketch"`` |R_c|^2 takes the place of |G_c|^2, its mean over projections: free, an estimate.
    """
    kept, contracted = gradient.kept_and_contracted(keeps_rows)
    R = torch.zeros(kept.shape[1], len(P), dtype=torch.float32, device=kept.device)
    for tokens in token_blocks(kept, contracted):
        left, right = buffers.floats(kept[tokens], KEPT_SLOT), buffers.floats(contracted[tokens], CONTRACTED_SLOT)
        R.addmm_(left.mT, right @ P.mT)
    if gradient.limiter_norm == "sketch":
        return R, R.square().sum(1)
    return R, squared_norms(gradient, keeps_rows, buffers)


def squared_norms(gradient: ImplicitGradient, keeps_rows: bool, buffers: Scratch) -> Tensor:
    """|G_c|^2 ``[channels]``, float32, by the way that takes fewer multiplications."""
    kept, contracted = gradient.kept_and_contracted(keeps_rows)
    if 0 in gradient.shape:  # an empty shard of a weight that is cut into more shards than it has rows or columns
        return torch.zeros(kept.shape[1], dtype=torch.float32, device=kept.device)
    if gram_is_cheaper(len(kept), *gradient.shape):
        return gram_norms(kept, contracted, buffers)
    return tile_norms(gradient, keeps_rows, buffers)


def tile_norms(gradient: ImplicitGradient, keeps_rows: bool, buffers: Scratch) -> Tensor:
    """|G_c|^2 by blocks of rows of G, each of which overwrites the last one."""
    norms = [
        torch.linalg.vector_norm(gradient.rows(rows, buffers), dim=1 if keeps_rows else 0).square_()
        for rows in scratch.row_blocks(gradient.shape)
    ]
    return torch.cat(norms) if keeps_rows else torch.stack(norms).sum(0)


def gram_norms(kept: Tensor, contracted: Tensor, buffers: Scratch) -> Tensor:
    """|G_c|^2 = kept_c^T K kept_c with K = contracted contracted^T ``[tokens, tokens]``: DP-SGD's "ghost norms"."""
    K = torch.zeros(len(kept), len(kept), dtype=torch.float32, device=kept.device)
    for _, block in buffers.blocks(contracted.mT, CONTRACTED_SLOT):
        K.addmm_(block.mT, block)
    norms = [((block @ K) * block).sum(1) for _, block in buffers.blocks(kept.mT, KEPT_SLOT)]
    return torch.cat(norms).clamp_(min=0)  # a sum of terms of both signs may end below 0; NaN stays NaN


def gram_is_cheaper(tokens: int, rows: int, columns: int) -> bool:
    """Whether T^2 (in + out) multiplications are fewer than the T in out of G itself: at 4096 x 4096 below 2048 tokens.

    The Gram matrix is then at most a quarter of the weight's size. ``kernels.operand_sketch.gram_is_cheaper`` is the
    same question for a GPU.
    """
    return tokens * (rows + columns) < rows * columns
