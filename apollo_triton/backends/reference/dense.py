"""The dense rest: AdamW in APOLLO's convention, W <- W - h M / (sqrt(V) + eps), then the decay.

In float32 blocks of rows, by PyTorch's fused kernel wherever it does exactly that (LLaMA-60M's embedding and head, 2
cores: 35 ms against 126 ms in plain operations; in bfloat16 with float32 moments, a Mini step of the whole model takes
51 ms against 101).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from ...core.philox import Stream
from ...core.scratch import Scratch
from ...core.settings import Settings
from .verbs import flattened, shrink, store

Block = tuple[Tensor, Tensor, Tensor, Tensor]  # of W, G, M and V, float32; W, M and V change in place


def adamw(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    settings: Settings,
    step: int,
    seed: int,
    gradient_scale: Tensor | None,
    squared_norm: Tensor,
    first_element: int,
    scratch: Scratch,
) -> Tensor:
    """One step of a parameter and its state (exp_avg and exp_avg_sq of its shape, ``step`` and seed given apart).

    ``squared_norm`` is that of the whole gradient, of which this may be a piece, beginning at ``first_element``.
    Returns 1 if its gradient is not finite and nothing moved, else 0: int64 scalar on the device.
    """
    finite = squared_norm.isfinite().reshape(())
    tensors = flattened([weight, gradient, state["exp_avg"], state["exp_avg_sq"]])
    update = _kernel_step if _fits_fused_kernel(tensors, settings) else _plain_step
    size = tensors[0].numel() // max(1, len(tensors[0]))
    for rows, W in scratch.blocks(tensors[0]):
        G, M, V = (scratch.floats(x[rows], slot) for slot, x in enumerate(tensors[1:], 1))
        if gradient_scale is not None:
            G = G * gradient_scale
        update((W, G, M, V), settings, step, finite)
        streams = (Stream.WEIGHT, Stream.EXP_AVG, Stream.EXP_AVG_SQ)
        for target, values, stream in zip((tensors[0], *tensors[2:]), (W, M, V), streams, strict=True):
            if target.dtype != torch.float32:
                store(values, target[rows], settings, seed, step, stream, first_element + rows.start * size)
    return (~finite).sum()


def _fits_fused_kernel(tensors: list[Tensor], settings: Settings) -> bool:
    """Contiguous (the kernel does not look at strides), on a CPU, a learning rate known on the host.

    CUDA's takes 1 - b2 of a float32 b2: V is 4e-6 off, and W 9e-6 of the distance moved, twenty times what float32
    rounds (H100, torch 2.11).
    """
    return (
        tensors[0].device.type == "cpu"
        and all(x.is_contiguous() for x in tensors)
        and not isinstance(settings.lr, Tensor)
        and settings.lr * settings.weight_decay < 1
    )


def _kernel_step(block: Block, settings: Settings, step: int, finite: Tensor) -> None:
    """PyTorch's kernel computes W <- (1 - lr' wd') W - lr' / (1 - b1^t) M / (sqrt(V) / sqrt(1 - b2^t) + eps'); these
    lr', wd' and eps' make it ours, where the decay comes after the update and eps is not corrected."""
    assert not isinstance(settings.lr, Tensor)
    beta1, beta2 = settings.betas
    weight, gradient, exp_avg, exp_avg_sq = block
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


def _plain_step(block: Block, settings: Settings, step: int, finite: Tensor) -> None:
    """The same by single operations, masked where the gradient is not finite."""
    beta1, beta2 = settings.betas
    W, G, M, V = block
    moves = finite.to(torch.float32)
    G = torch.where(finite, G, 0)
    M.lerp_(G, moves * (1 - beta1))
    V.lerp_(G.square_(), moves * (1 - beta2))
    N = torch.div(M, torch.sqrt(V, out=G).add_(settings.eps), out=G)
    W.addcmul_(N, moves * settings.step_size(step), value=-1)
    if settings.weight_decay:
        shrink(W, moves * (settings.lr * settings.weight_decay))
