"""The dense rest with 8-bit moments: bitsandbytes' own update, in APOLLO's convention.

bitsandbytes updates the moments. We call it on a buffer of zeros instead of the weight, into which it then writes -M /
(sqrt(V) + eps). Learning rate, bias correction, decay, the rounding of the weight and gradients that are not finite are
ours, so they are the same for all of its versions and devices. Nothing is read back from a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ...core.extras import require
from ...core.moments_8bit import BLOCK, absmax_count, dynamic_code
from ...core.philox import Stream
from ...core.scratch import Scratch
from ...core.settings import Settings
from ...params.member import Member
from ...params.state import ABSMAXES, MOMENTS
from ..interface import StepScalars
from .rounding import shrink, store

# Elements at a time, whole blocks. LLaMA-7B's embedding and head are 125 such.
CHUNK = 1 << 21
# The most bytes that an update takes in passing: bfloat16 weights that are rounded stochastically.
PASSING = 13 * 4 * CHUNK
# So late that bitsandbytes' own bias correction is 1, and ours the only one.
_LATE = 1 << 30


def adamw(member: Member, settings: Settings, scalars: StepScalars, squared_norm: Tensor, scratch: Scratch) -> Tensor:
    """One step of a parameter and its moments: uint8 of its shape, and the absmax of each block. Of a
    ``DTensor`` they are this rank's.

    ``squared_norm``: |G|^2. Returns 1 if it is not finite and nothing moved, else 0: int64 scalar on the device.
    """
    weight, first = member.weight, member.shard.first_element
    finite = squared_norm.isfinite().reshape(())
    if finite.device.type == "cpu" and not finite:
        return (~finite).sum()
    moves = finite.to(torch.float32)
    h = moves * settings.step_size(scalars.step)
    decay = moves * (settings.lr * settings.weight_decay) if settings.weight_decay else None
    W, G = weight.reshape(-1), member.formed_gradient.reshape(-1)
    for start in range(0, W.numel(), CHUNK):
        cut = slice(start, start + CHUNK)
        part = G[cut].to(torch.float32)
        if scalars.gradient_scale is not None:
            part = part * scalars.gradient_scale
        moments = _part_of(member, cut)
        direction = _moved(moments, part, settings.betas, settings.eps, finite)
        values = W[cut].to(torch.float32, copy=True)
        values.addcmul_(torch.where(finite, direction, 0), h)
        if decay is not None:
            shrink(values, decay)
        store(values, W[cut], settings, member.state["seed"], scalars.step, Stream.WEIGHT, first + start)
    if W.data_ptr() != weight.data_ptr():  # not contiguous
        weight.copy_(W.view(weight.shape))
    return (~finite).sum()


def _part_of(member: Member, cut: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M and V of some elements, which begin with a block, and the absmax of each block."""
    M, V = (member.moment(name).view(-1)[cut] for name in MOMENTS)
    blocks = slice(cut.start // BLOCK, cut.start // BLOCK + absmax_count(len(M)))
    absmax_M, absmax_V = (member.local_state(name).view(-1)[blocks] for name in ABSMAXES)
    return M, V, absmax_M, absmax_V


def _moved(
    moments: tuple[Tensor, Tensor, Tensor, Tensor], G: Tensor, betas: tuple[float, float], eps: float, finite: Tensor
) -> Tensor:
    """Move M and V by the float32 gradient ``[elements]`` where ``finite``; -M / (sqrt(V) + eps), float32."""
    before = [moment.clone() for moment in moments] if G.device.type != "cpu" else []
    result = torch.zeros_like(G)
    update, newer = bitsandbytes_update()
    M, V, absmax_M, absmax_V = moments
    update(
        optimizer_name="adam",
        g=G,
        p=result,
        state1=M,
        state2=V,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        step=_LATE,
        lr=1.0,
        qmap1=dynamic_code(True, G.device),
        qmap2=dynamic_code(False, G.device),
        absmax1=absmax_M,
        absmax2=absmax_V,
        **newer,
    )
    for target, old in zip(moments, before, strict=False):
        target.copy_(torch.where(finite, target, old))
    return result


@cache
def bitsandbytes_update() -> tuple[Callable[..., None], dict[str, float]]:
    """bitsandbytes' 8-bit blockwise update, and the arguments that it has had since 0.44.

    Raises ModuleNotFoundError that says what to install.
    """
    update = require("bitsandbytes.functional", "int8").optimizer_update_8bit_blockwise
    newer = {"beta3": 0.0, "alpha": 0.0}
    return update, newer if newer.keys() <= inspect.signature(update).parameters.keys() else {}


@cache
def obstacle(device: torch.device) -> str | None:
    """Why bitsandbytes cannot update 8-bit moments on ``device``; None if it can. It updates a block to find out."""
    M, V = (torch.zeros(BLOCK, dtype=torch.uint8, device=device) for _ in range(2))
    absmax_M, absmax_V = (torch.zeros(1, dtype=torch.float32, device=device) for _ in range(2))
    gradient = torch.ones(BLOCK, dtype=torch.float32, device=device)
    try:
        _moved((M, V, absmax_M, absmax_V), gradient, (0.9, 0.999), 1e-6, gradient[0] > 0)
    except Exception as error:  # of any type: versions fail in their own ways where they have no such kernel
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None
