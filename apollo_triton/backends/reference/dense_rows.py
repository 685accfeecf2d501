"""The dense rest with one second moment a row, as Adam-mini (arXiv 2406.16793) has it for embeddings and output layers.

    V_i <- b2 V_i + (1 - b2) mean_j G_ij^2,  W_ij <- W_ij - h M_ij / (sqrt(V_i) + eps), then the decay

M is as everywhere: floats, or 8-bit codes, which are computed here by ``core/moments_8bit.py`` on every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.moments_8bit import BLOCK, absmax_count, dequantize_blockwise, quantize_blockwise
from ...core.philox import Stream
from ...core.scratch import BLOCK_ELEMENTS as CHUNK
from ...core.scratch import Scratch, row_blocks
from ...core.settings import Settings
from ...params.member import Member
from ..interface import StepScalars
from .rounding import shrink, store


class _Move(NamedTuple):
    """What moves W and M of a part: ``factor`` is h / (sqrt(V) + eps), float32 in the shape of V."""

    finite: Tensor
    keep: float | Tensor
    factor: Tensor
    decay: Tensor | None
    gradient_scale: Tensor | None

    def __call__(self, W: Tensor, G: Tensor, M: Tensor, factor: Tensor) -> None:
        """W and M, float32, in place; ``factor`` is that of their rows, and broadcasts to them."""
        if self.gradient_scale is not None:
            G = G * self.gradient_scale
        M.lerp_(G if self.finite.device.type == "cpu" else torch.where(self.finite, G, 0), self.keep)
        W.addcmul_(M, factor, value=-1)
        if self.decay is not None:
            shrink(W, self.decay)


def row_sums(gradient: Tensor, scratch: Scratch) -> Tensor:
    """|G_i|^2 of each row of ``[rows, ...]``, float32 ``[rows]``, in blocks."""
    sums = torch.zeros(len(gradient), dtype=torch.float32, device=gradient.device)
    for rows, block in scratch.blocks(gradient):
        squares = torch.square(block, out=scratch.empty(block.shape, block.device, 1))
        sums[rows] = squares.flatten(1).sum(1)
    return sums


def adamw(member: Member, settings: Settings, scalars: StepScalars, sums: Tensor, scratch: Scratch) -> Tensor:
    """One step of a parameter and its moments.

    ``sums``: float32 ``[1 + rows]``, |G|^2 of the whole gradient, and |G_i|^2 of the whole of each row that is here.
    Returns 1 if the gradient is not finite and nothing moved, else 0: int64 scalar on the device.
    """
    finite = sums[0].isfinite()
    on_host = finite.device.type == "cpu"
    if on_host and not finite:
        return (~finite).sum()
    moves = finite.to(torch.float32)
    move = _Move(
        finite,
        1 - settings.betas[0] if on_host else moves * (1 - settings.betas[0]),
        _moved_rows(member, settings, scalars, sums[1:], finite),
        moves * (settings.lr * settings.weight_decay) if settings.weight_decay else None,
        scalars.gradient_scale,
    )
    (_step_8bit if member.is_8bit else _step)(member, settings, scalars.step, move, scratch)
    return (~finite).sum()


def _moved_rows(member: Member, settings: Settings, scalars: StepScalars, sums: Tensor, finite: Tensor) -> Tensor:
    """Move V where ``finite``. Returns h / (sqrt(V) + eps), or 0 where nothing moves."""
    V, parameter = member.local_state("exp_avg_sq"), member.parameter
    mean = sums[: V.numel()] * (len(parameter) / parameter.numel())  # none, if a cut leaves this rank no columns
    if scalars.gradient_scale is not None:
        mean = mean * scalars.gradient_scale * scalars.gradient_scale
    moves = finite.to(torch.float32)
    V.lerp_(torch.where(finite, mean, 0).view_as(V), moves * (1 - settings.betas[1]))
    factor = moves * settings.step_size(scalars.step) / (V.sqrt() + settings.eps)
    return factor.clamp_(max=torch.finfo(torch.float32).max)  # with a tiny eps it multiplies rows of zeros


def _step(member: Member, settings: Settings, step: int, move: _Move, scratch: Scratch) -> None:
    """Move W and M, floats of any strides, in blocks of rows."""
    weight, gradient, exp_avg = member.weight, member.formed_gradient, member.local_state("exp_avg")
    seed, first, size = member.state["seed"], member.shard.first_element, weight[:1].numel()
    for rows in row_blocks(weight.shape):
        W, G, M = (scratch.floats(x[rows], slot) for slot, x in enumerate((weight, gradient, exp_avg)))
        move(W, G, M, move.factor[rows])
        for target, values, stream in ((weight, W, Stream.WEIGHT), (exp_avg, M, Stream.EXP_AVG)):
            if target.dtype != torch.float32:
                store(values, target[rows], settings, seed, step, stream, first + rows.start * size)


def _step_8bit(member: Member, settings: Settings, step: int, move: _Move, scratch: Scratch) -> None:
    """Move W and M of 8 bits, in parts that are whole blocks, wherever rows end."""
    weight, seed, first = member.weight, member.state["seed"], member.shard.first_element
    codes, absmaxes = (member.local_state(name).view(-1) for name in ("exp_avg_q", "exp_avg_absmax"))
    W, G = weight.reshape(-1), member.formed_gradient.reshape(-1)
    for start in range(0, W.numel(), CHUNK):
        part = slice(start, min(start + CHUNK, W.numel()))
        moment = codes[part], absmaxes[start // BLOCK : absmax_count(part.stop)]
        M = dequantize_blockwise(*moment, signed=True)
        values = W[part].to(torch.float32, copy=True)
        move(values, scratch.floats(G[part], 1), M, _of_elements(move.factor, part, weight[:1].numel()))
        store(values, W[part], settings, seed, step, Stream.WEIGHT, first + start)
        for target, new in zip(moment, quantize_blockwise(M, signed=True), strict=True):
            target.copy_(torch.where(move.finite, new, target))  # codes are not what rounding them again would give
    if W.data_ptr() != weight.data_ptr():  # not contiguous
        weight.copy_(W.view(weight.shape))


def _of_elements(factor: Tensor, part: slice, size: int) -> Tensor:
    """The factors of some elements of rows of ``size`` elements each: float32 ``[elements]``."""
    rows = slice(part.start // size, -(-part.stop // size))
    counts = torch.full((rows.stop - rows.start,), size, device=factor.device)
    counts[0] -= part.start - rows.start * size
    counts[-1] -= rows.stop * size - part.stop
    return factor.view(-1)[rows].repeat_interleave(counts, output_size=part.stop - part.start)
