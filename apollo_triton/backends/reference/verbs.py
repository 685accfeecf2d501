"""The three verbs in plain PyTorch: the specification of a step, and the path for every device without kernels.

    sketch    G -> R, |G_c|^2        rescale    moments in place; s        apply    limiter, then W in place

Read from top to bottom it is one APOLLO step (arXiv 2412.05270, algorithm 1), of which docs/design.md shows the thirty
lines for one matrix. ``dense.py`` has AdamW for the rest, ``implicit.py`` the sketch of a gradient that is never
formed. Everything is computed in float32 whatever the dtype of weights and gradients, in blocks of rows, so that no
temporary has a weight's size. Nothing here reads a value back from an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.implicit_gradient import ImplicitGradient
from ...core.moments_8bit import Blockwise, whole_blocks
from ...core.philox import Stream
from ...core.scratch import BLOCK_ELEMENTS
from ...core.settings import Settings
from ...int8.weight import Int8Weight
from ..interface import Factors, Sketch, StepScalars
from . import implicit
from .matrices import Batch, joined_factors
from .rounding import shrink, store

_NORM_EPS = 1e-8
_GROWTH_LIMIT = 1.01


def sketch(batch: Batch, settings: Settings, scalars: StepScalars) -> Sketch:
    """R = G P^T (rows kept) or (P G)^T (columns kept), and the squared norms of G as it is, reading G once."""
    projected, squared_norms = [], []
    for gradient, P in zip(batch.gradients, _projections_for_mkl(batch), strict=True):
        if isinstance(gradient, ImplicitGradient):
            R, norms = implicit.sketch(gradient, batch.geometry.keeps_rows, P[: batch.rank], batch.scratch)
        else:
            R, norms = _sketch_matrix(batch, settings, gradient, P)
        projected.append(R)
        squared_norms.append(norms)
    return Sketch(_stack(projected), _stack(squared_norms))


def _sketch_matrix(batch: Batch, settings: Settings, gradient: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """R ``[channels, rank]``, and |G_c|^2 ``[channels]`` or |G|_F^2 ``[1]``, of one matrix."""
    keeps_rows, per_channel = batch.geometry.keeps_rows, settings.scale_type == "channel"
    R: list[Tensor] = []
    norms: list[Tensor] = []
    if not gradient.numel():  # the empty shard of a weight that is cut into more shards than it has rows
        channels = batch.geometry.channels
        return (
            gradient.new_zeros(channels, batch.rank, dtype=torch.float32),
            gradient.new_zeros(channels if per_channel else 1, dtype=torch.float32),
        )
    for rows, block in batch.scratch.blocks(gradient):
        if keeps_rows:
            R.append((block @ projection.mT)[:, : batch.rank])
        elif not R:
            R.append(block.mT @ projection[:, rows].mT)
        else:
            R[0].addmm_(block.mT, projection[:, rows].mT)
        if per_channel:
            norms.append(torch.linalg.vector_norm(block, dim=1 if keeps_rows else 0).square_())
        else:
            norms.append(_dot(block))
    return _cat(R), _cat(norms) if per_channel and keeps_rows else sum(norms[1:], norms[0]).view(-1)


def rescale(batch: Batch, settings: Settings, scalars: StepScalars, sketch: Sketch) -> Factors:
    """Adam's moments of R in place, and the scaling factors s = |N| / (|R| + 1e-8), N = M / (sqrt(V) + eps).

    A channel whose R is not finite keeps its moments; the sums then tell ``apply`` not to move the weight.
    """
    results: list[Factors] = []
    first = 0
    for part in batch.parts():
        matrices = slice(first, first + len(part))
        of_part = Sketch(sketch.projected[matrices], sketch.squared_norms[matrices])
        results.append(_rescale_part(part, settings, scalars, of_part))
        first = matrices.stop
    return joined_factors(results)


def _rescale_part(batch: Batch, settings: Settings, scalars: StepScalars, sketch: Sketch) -> Factors:
    """``rescale`` of a part of a batch, whose matrices are stacked."""
    scale = scalars.gradient_scale
    if scale is not None:
        sketch.projected.mul_(scale)
        sketch.squared_norms.mul_(scale).mul_(scale)  # its square might underflow
    matrices, channels, rank = sketch.projected.shape
    whole = whole_blocks(rank)  # 8-bit moments are cut between their blocks
    step = max(1, BLOCK_ELEMENTS // (matrices * rank * whole)) * whole
    cuts = [slice(start, start + step) for start in range(0, max(1, channels), step)]
    parts = [_rescale_channels(batch, settings, scalars, sketch, cut) for cut in cuts]
    squared_N, squared_R = (_cat(list(norms), 1) for norms in zip(*parts, strict=True))
    if settings.scale_type == "tensor":
        sums = [norms.sum(1) for norms in (squared_N, squared_R, sketch.squared_norms)]
        return Factors(None, torch.stack(sums, 1))
    s = squared_N.sqrt() / (squared_R.sqrt() + _NORM_EPS)
    return Factors(s, (s.square() * sketch.squared_norms).sum(1, keepdim=True))


def _rescale_channels(
    batch: Batch, settings: Settings, scalars: StepScalars, sketch: Sketch, channels: slice
) -> tuple[Tensor, Tensor]:
    """Update the moments of some channels of every matrix; |N_c|^2 and |R_c|^2 ``[matrices, channels]``."""
    beta1, beta2 = settings.betas
    R = sketch.projected[:, channels]
    R2 = R * R
    squared_R = R2.sum(-1)
    M, V = (_stack([_floats(state, channels) for state in states]) for states in (batch.exp_avg, batch.exp_avg_sq))
    total = _on_host(squared_R.sum())
    if total is not None and math.isfinite(total):
        M.lerp_(R, 1 - beta1)
        V.lerp_(R2, 1 - beta2)
    else:
        finite = squared_R.isfinite().unsqueeze(-1)
        weight = finite.to(torch.float32)
        M.lerp_(torch.where(finite, R, 0), weight * (1 - beta1))
        V.lerp_(torch.where(finite, R2, 0), weight * (1 - beta2))
    for states, values, stream in ((batch.exp_avg, M, Stream.EXP_AVG), (batch.exp_avg_sq, V, Stream.EXP_AVG_SQ)):
        if len(states) == 1 and isinstance(states[0], Tensor) and states[0].dtype == torch.float32:
            continue  # updated in place
        for index, (state, value) in enumerate(zip(states, values.unbind(), strict=True)):
            if isinstance(state, Blockwise):
                state.store(channels, value, squared_R[index].isfinite())
            else:
                start = (batch.moment_rounding_offsets[index] + channels.start) * state.shape[1]
                store(value, state[channels], settings, batch.seed, scalars.step, stream, start)
    N = torch.div(M, torch.sqrt(V, out=R2).add_(settings.eps), out=R2)
    return torch.linalg.vector_norm(N, dim=-1).square_(), squared_R


def _floats(state: Tensor | Blockwise, channels: slice) -> Tensor:
    """Some channels of a matrix's moment in float32: itself where it is."""
    return state.floats(channels) if isinstance(state, Blockwise) else state[channels].to(torch.float32)


def sketch_and_rescale(batch: Batch, settings: Settings, scalars: StepScalars) -> Factors:
    """Both verbs with nothing in between, a part of the batch at a time, so that little of R is alive."""
    return joined_factors(
        [_rescale_part(part, settings, scalars, sketch(part, settings, scalars)) for part in batch.parts()]
    )


def apply(batch: Batch, settings: Settings, scalars: StepScalars, factors: Factors) -> Tensor:
    """W <- W - h sqrt(scale) (s / l) G, then W <- W - lr wd W, reading G again; u_prev in place.

    Returns how many matrices were not moved because their gradient is not finite: int64 scalar on the device.
    """
    multiplier, moved = _limited_step(batch, settings, scalars, factors)
    multipliers = multiplier.unsqueeze(-1 if batch.geometry.keeps_rows else 1).unbind()
    decay = settings.lr * settings.weight_decay if settings.weight_decay else None
    known = _on_host(moved)
    if isinstance(batch.weights[0], Int8Weight):
        _apply_int8(batch, scalars, multipliers, moved, decay)
        return (~moved).sum()
    dtype = batch.weights[0].dtype
    rounds_once = dtype == torch.float32 or (decay is None and not settings.stochastic_rounding)
    is_formed = isinstance(batch.gradients[0], Tensor)
    if known is not None and factors.channel is None and rounds_once and is_formed:
        _apply_scalars(batch, multiplier[:, 0].tolist(), known, decay)
        return (~moved).sum()
    for index, weight in enumerate(batch.weights):
        if known is not None and not known[index]:
            continue
        s, gradient = multipliers[index], batch.gradients[index]
        if known is not None and dtype == torch.float32 and not isinstance(gradient, Tensor) and gradient.can_be_scaled:
            gradient.subtract_from(weight, s)
            if decay is not None:
                shrink(weight, decay)
            continue
        for rows, W in batch.scratch.blocks(weight):
            G = batch.gradient_rows(index, rows)
            if known is None:
                G = torch.where(moved[index], G, 0)
            W.addcmul_(G, s[rows] if len(s) > 1 else s, value=-1)
            if decay is not None:
                shrink(W, decay if known is not None else moved[index].to(torch.float32) * decay)
            if weight.dtype != torch.float32:
                start = batch.rounding_offsets[index] * batch.geometry.width + rows.start * weight.shape[1]
                store(W, weight[rows], settings, batch.seed, scalars.step, Stream.WEIGHT, start)
    return (~moved).sum()


def _apply_int8(
    batch: Batch, scalars: StepScalars, multipliers: Sequence[Tensor], moved: Tensor, decay: float | Tensor | None
) -> None:
    """``apply`` on int8 weights: dequantise, update and requantise with fresh scales, a block of rows at a time.

    A group that the update does not change in float32 keeps its bits: rounded anew it would wander.
    """
    known = _on_host(moved)
    for index, weight in enumerate(batch.weights):
        assert isinstance(weight, Int8Weight)
        if known is not None and not known[index]:
            continue
        s, first = multipliers[index], batch.rounding_offsets[index] * batch.geometry.width
        for rows in weight.blocks():
            before = weight.floats(rows)
            W = before.addcmul(batch.gradient_rows(index, rows), s[rows] if len(s) > 1 else s, value=-1)
            if decay is not None:
                shrink(W, decay)
            noise = weight.noise(rows, batch.seed, scalars.step, first) if weight.stochastic_rounding else None
            weight.store(rows, W, noise, (before != W) & moved[index])


def _apply_scalars(batch: Batch, multipliers: list[float], moved: list[bool], decay: float | Tensor | None) -> None:
    """``apply`` on a CPU where a matrix has one factor and is rounded once: no conversion, no temporary.

    ``addcmul_`` works in float32 inside and keeps a float32 ``value`` (``add_`` rounds its alpha to bfloat16).
    LLaMA-60M's matrices in bfloat16, 2 cores: 4.7 ms, against 11.5 ms by float32 copies.
    """
    gradients = [gradient for gradient in batch.gradients if isinstance(gradient, Tensor)]
    one = torch.ones((), dtype=gradients[0].dtype, device=gradients[0].device)
    for weight, gradient, factor, moves in zip(batch.weights, gradients, multipliers, moved, strict=True):
        if moves:
            weight.addcmul_(gradient, one, value=-factor)
            if decay is not None:
                shrink(weight, decay)


def _on_host(values: Tensor) -> Any:
    """The values as numbers where they are host memory, and free to read; None where that would wait for a device."""
    return values.tolist() if values.device.type == "cpu" else None


def _limited_step(batch: Batch, settings: Settings, scalars: StepScalars, factors: Factors) -> tuple[Tensor, Tensor]:
    """The factor of G per matrix ``[matrices, channels or 1]``, and whether the matrix moves ``[matrices]``.

    The norm-growth limiter (Fira, arXiv 2410.01623, equation 6): l = max(u / (u_prev + 1e-8), 1.01) / 1.01.
    u_prev = 0 says that there is none yet; a u of 0 leaves it as it was.
    """
    if factors.channel is None:
        squared_N, squared_R, squared_G = factors.sums.unbind(1)
        s = (squared_N.sqrt() / (squared_R.sqrt() + _NORM_EPS))[:, None]
        u = s[:, 0] * squared_G.sqrt()
    else:
        s, u = factors.channel, factors.sums[:, 0].sqrt()
    moved = u.isfinite()
    root_scale = math.sqrt(batch.scale)
    if settings.scale_front:
        s, u = s * root_scale, u * root_scale
    if not settings.disable_nl:
        previous = torch.stack(batch.update_norm)
        growth = (u / (previous + _NORM_EPS)).clamp(min=_GROWTH_LIMIT) / _GROWTH_LIMIT
        limiter = torch.where(previous > 0, growth, 1.0)
        norms = torch.where(moved & (u > 0), u / limiter, previous)
        for target, norm in zip(batch.update_norm, norms.unbind(), strict=True):
            target.copy_(norm)
        s = s / limiter[:, None]
    h = settings.step_size(scalars.step)
    s = s * (h if settings.scale_front else h * root_scale)
    if scalars.gradient_scale is not None:
        s = s * scalars.gradient_scale
    return torch.where(moved[:, None], s, 0.0), moved


def _projections_for_mkl(batch: Batch) -> list[Tensor]:
    """The projections. On a CPU at rank 1 the single row is repeated, and the second column of the product is dropped.

    MKL's product with one row (``sgemv``) uses one thread where rows are kept, a product with two rows uses both:
    LLaMA-60M's tall matrices take 9.3 ms on 2 cores with one row, 4.8 ms with two.
    """
    first = batch.projections[0]
    if batch.rank != 1 or not batch.geometry.keeps_rows or first.device.type != "cpu":
        return batch.projections
    if all(projection is first for projection in batch.projections):
        return [first.repeat(2, 1)] * len(batch)
    return [projection.repeat(2, 1) for projection in batch.projections]


def _dot(block: Tensor) -> Tensor:
    flat = block.reshape(-1)
    return torch.dot(flat, flat)


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _stack(tensors: list[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
