"""Philox4x32-10 in PyTorch: the counter-based random words behind the projection and stochastic rounding.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11. A word depends on its key and counter
alone, so a slice, another device or another tiling gives the same bits, and nothing needs to be stored.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(enum.IntEnum):
    """The third counter word. It keeps apart what is drawn under the same key, (seed, epoch) or (seed, step)."""

    GAUSSIAN = 0
    RADEMACHER = 1
    WEIGHT = 2
    EXP_AVG = 3
    EXP_AVG_SQ = 4
    PARAMETER_SEED = 5


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Ten rounds of Philox4x32 on integers or broadcastable int64 tensors: four 32-bit words, or tensors of them.

    >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, so their bits are those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32 & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return c0, c1, c2, c3


def parameter_seed(seed: int, index: int) -> int:
    """The seed of the ``index``-th parameter under ``seed_per_param``: 32 bits drawn from the optimizer's seed."""
    return philox((index, 0, int(Stream.PARAMETER_SEED), 0), (seed, 0))[0]


def random_halves(start: int, count: int, seed: int, step: int, stream: Stream, device: torch.device) -> Tensor:
    """16 random bits for each of the elements ``start`` to ``start + count`` of a parameter, int32 ``[count]``.

    Element i takes its bits from Philox counter ``i // 8`` under key ``(seed, step)``: word ``(i % 8) // 2``, the low
    half first.
    """
    first = start // 8
    calls = torch.arange(first, (start + count + 7) // 8, dtype=torch.int64, device=device)
    words = torch.stack(philox((calls & _MASK, calls >> 32, int(stream), 0), (seed, step)), dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)
    return halves[start - 8 * first :][:count].to(torch.int32)


def round_stochastic(values: Tensor, seed: int, step: int, stream: Stream, start: int) -> Tensor:
    """Round float32 ``values`` to bfloat16, up or down with probability equal to the fraction lost.

    ``start`` is the index of the first value in the whole parameter, so that blocks of any size round alike.
    Infinities and NaNs stay what they are.
    """
    flat = values.reshape(-1)
    noise = random_halves(start, flat.numel(), seed, step, stream, values.device)
    # A bfloat16 is the upper half of a float32: adding 16 random bits carries with the right probability.
    rounded = ((flat.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(flat.isfinite(), rounded, flat).to(torch.bfloat16).view_as(values)
