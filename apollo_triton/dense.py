"""The dense rest: AdamW in APOLLO's convention, W <- W - h M / (sqrt(V) + eps), then the decay.

PyTorch's fused kernel wherever it does exactly that in float32, which is most vectors and embeddings (LLaMA-60M's
embedding and head, 2 cores: 35 ms against 126 ms in plain operations); else the same step in blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from .philox import Stream
from .reference import flattened, shrink, squared_norm, store
from .scratch import Scratch
from .settings import Settings


def adamw(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    settings: Settings,
    step: int,
    seed: int,
    gradient_scale: Tensor | None,
    scratch: Scratch,
) -> Tensor:
    """One step of a parameter and its state (exp_avg and exp_avg_sq of its shape, ``step`` and seed given apart).

    Returns 1 if its gradient is not finite and nothing moved, else 0: int64 scalar on the device.
    """
    finite = squared_norm(gradient, scratch).isfinite()
    tensors = [weight, gradient, state["exp_avg"], state["exp_avg_sq"]]
    # With a gradient scale the kernel would write into the gradient.
    if gradient_scale is None and _fits_fused_kernel(tensors, settings):
        _fused_step(tensors, settings, step, finite)
    else:
        _plain_step(tensors, settings, step, seed, gradient_scale, finite, scratch)
    return (~finite).sum()


def _fits_fused_kernel(tensors: list[Tensor], settings: Settings) -> bool:
    """Float32 throughout, contiguous (the kernel does not look at strides), a learning rate known on the host."""
    return (
        tensors[0].device.type in ("cpu", "cuda")
        and all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
        and not isinstance(settings.lr, Tensor)
        and settings.lr * settings.weight_decay < 1
    )


def _fused_step(tensors: list[Tensor], settings: Settings, step: int, finite: Tensor) -> None:
    """PyTorch's kernel computes W <- (1 - lr' wd') W - lr' / (1 - b1^t) M / (sqrt(V) / sqrt(1 - b2^t) + eps'); these
    lr', wd' and eps' make it ours, where the decay comes after the update and eps is not corrected."""
    assert not isinstance(settings.lr, Tensor)
    beta1, beta2 = settings.betas
    weight, gradient, exp_avg, exp_avg_sq = tensors
    kept = 1 - settings.lr * settings.weight_decay
    root = math.sqrt(1 - beta2**step)
    lr = settings.lr * kept if settings.correct_bias else settings.lr * kept * (1 - beta1**step) / root
    torch_adamw(
        [weight],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.full((), step - 1.0, dtype=torch.float32, device=weight.device)],
        fused=True,
        found_inf=(~finite).to(torch.float32),
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=settings.lr * settings.weight_decay / lr if lr else 0.0,
        eps=settings.eps / root,
    )


def _plain_step(
    tensors: list[Tensor],
    settings: Settings,
    step: int,
    seed: int,
    gradient_scale: Tensor | None,
    finite: Tensor,
    scratch: Scratch,
) -> None:
    """The same in blocks of rows, masked where the gradient is not finite, with our roundings."""
    beta1, beta2 = settings.betas
    scale = gradient_scale if gradient_scale is not None else 1.0
    tensors = flattened(tensors)
    weight = tensors[0]
    size = weight.numel() // max(1, len(weight))
    moves = finite.to(torch.float32)
    h = moves * settings.step_size(step)
    decay = moves * (settings.lr * settings.weight_decay)
    keep1, keep2 = moves * (1 - beta1), moves * (1 - beta2)
    for rows, W in scratch.blocks(weight):
        G, M, V = (scratch.floats(x[rows], slot) for slot, x in enumerate(tensors[1:], 1))
        G = torch.where(finite, G * scale, 0)
        M.lerp_(G, keep1)
        V.lerp_(G.square_(), keep2)
        N = torch.div(M, torch.sqrt(V, out=G).add_(settings.eps), out=G)
        W.addcmul_(N, h, value=-1)
        if settings.weight_decay:
            shrink(W, decay)
        streams = (Stream.WEIGHT, Stream.EXP_AVG, Stream.EXP_AVG_SQ)
        for target, values, stream in zip((weight, *tensors[2:]), (W, M, V), streams, strict=True):
            if target.dtype != torch.float32:
                store(values, target[rows], settings, seed, step, stream, rows.start * size)
