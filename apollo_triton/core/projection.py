"""The random projection P, made from four numbers, and a cache of the projections that steps keep in memory.

P is never state: ``projection_matrix`` makes any slice of it from (seed, epoch, rank index, width index). The one
projection that cannot be made again is that of ``proj="svd"``, from ``top_singular_vectors``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .philox import Stream, philox
from .streams import Uses

# From this rank on P is multiplied on tensor cores. Its normals then have the 8 significant bits of bfloat16, so that
# bfloat16 products are exact: the rounded matrix *is* the projection, for every dtype and in both backends.
TENSOR_CORE_RANK = 2
_WIDTH_PER_CALL = {"gaussian": 4, "rademacher": 128}


def projection_matrix(
    seed: int,
    epoch: int,
    rank: int,
    width: int,
    *,
    distribution: str = "gaussian",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Columns ``start`` to ``stop`` of the projection matrix P that a step uses: ``[rank, stop - start]``.

    Entries have mean 0 and variance ``1 / rank``. With ``distribution="gaussian"`` they are normal (Box-Muller); from
    rank 2 on they are rounded to 8 significant bits before the division by ``sqrt(rank)``. With "rademacher" they are
    ``+-1 / sqrt(rank)``. Step t (1, 2, ...) of an optimizer uses ``epoch = (t - 1) // update_proj_gap``. The same
    numbers give the same entry on every device and in every slice.

    Source: APOLLO, arXiv 2412.05270, section 4. The random words are Philox4x32-10 with the key (seed, epoch) and the
    counter (width index, rank index).

    Raises ValueError for a number outside its range, an unknown distribution, or a slice outside the width.

    >>> whole = projection_matrix(0, 0, rank=4, width=10)
    >>> torch.equal(projection_matrix(0, 0, rank=4, width=10, start=3, stop=8), whole[:, 3:8])
    True
    """
    stop = width if stop is None else stop
    _check(seed, epoch, rank, width, distribution, start, stop)
    if torch.device(device).type == "mps":  # which has no float64
        return projection_matrix(
            seed, epoch, rank, width, distribution=distribution, dtype=dtype, start=start, stop=stop
        ).to(device)
    per_call = _WIDTH_PER_CALL[distribution]
    first = start // per_call
    calls = torch.arange(first, -(-stop // per_call), device=device)
    ranks = torch.arange(rank, device=device)[:, None]
    entries = (
        _gaussian(calls, ranks, (seed, epoch)) if distribution == "gaussian" else _signs(calls, ranks, (seed, epoch))
    )
    columns = entries.reshape(rank, -1)[:, start - first * per_call :][:, : stop - start]
    if distribution == "gaussian" and rank >= TENSOR_CORE_RANK:
        columns = columns.to(torch.float32).to(torch.bfloat16).double()
    return (columns / math.sqrt(rank)).to(torch.float32).to(dtype).contiguous()


def _gaussian(calls: Tensor, ranks: Tensor, key: tuple[int, int]) -> Tensor:
    """Four normals for each call of Philox, ``[rank, calls, 4]``: Box-Muller on 24-bit uniforms, exact in float32.

    Computed in float64 and rounded at the end, so that devices and vector widths cannot differ in the last bit.
    """
    uniforms = [word >> 8 for word in philox((calls, ranks, int(Stream.GAUSSIAN), 0), key)]
    normals = []
    for first, second in (uniforms[:2], uniforms[2:]):
        radius = torch.sqrt(-2 * torch.log((first.double() + 1) * 2**-24))
        angle = second.double() * (2 * math.pi * 2**-24)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, dim=-1)


def _signs(calls: Tensor, ranks: Tensor, key: tuple[int, int]) -> Tensor:
    """128 signs for each call of Philox, ``[rank, calls, 4, 32]``: 32 consecutive widths a word, lowest bit first. A
    set bit is +1."""
    words = torch.stack(philox((calls, ranks, int(Stream.RADEMACHER), 0), key), dim=-1)
    bits = words[..., None] >> torch.arange(32, device=words.device) & 1
    return (2 * bits - 1).double()


def _check(seed: int, epoch: int, rank: int, width: int, distribution: str, start: int, stop: int) -> None:
    for name, value, least, most in (
        ("seed", seed, 0, 2**32 - 1),
        ("epoch", epoch, 0, 2**32 - 1),
        ("rank", rank, 1, 2**31 - 1),
        ("width", width, 0, 2**31 - 1),
        ("start", start, 0, width),
        ("stop", stop, start, width),
    ):
        if not least <= value <= most:
            raise ValueError(f"Invalid {name}: {value} (allowed: {least} to {most})")
    if distribution not in _WIDTH_PER_CALL:
        raise ValueError(f"Invalid distribution: {distribution!r} (allowed: 'gaussian' or 'rademacher')")


class ProjectionCache:
    """The projections that steps keep in memory. This is a cache, never state: a missing projection is made again.

    There is one float32 matrix ``[rank, stop - start]`` for each distinct (seed, epoch, rank, start, stop,
    distribution, device). By default all parameters share a seed, and there is one matrix per width. With
    ``seed_per_param`` there is one per parameter.
    """

    def __init__(self) -> None:
        self._matrices: dict[tuple[Any, ...], tuple[Tensor, Uses]] = {}
        self._used: set[tuple[Any, ...]] = set()

    def get(
        self, seed: int, epoch: int, rank: int, start: int, stop: int, distribution: str, device: torch.device
    ) -> Tensor:
        """Columns ``start`` to ``stop`` of P, ``[rank, stop - start]``, made at their first use."""
        key = (seed, epoch, rank, start, stop, distribution, device)
        self._used.add(key)
        if key not in self._matrices:
            matrix = projection_matrix(seed, epoch, rank, stop, distribution=distribution, device=device, start=start)
            uses = Uses([matrix])
            uses.written()
            self._matrices[key] = matrix, uses
        matrix, uses = self._matrices[key]
        uses.read()
        return matrix

    def end_step(self) -> None:
        """Forget the projections that no parameter used since the last call: those of earlier epochs."""
        self._matrices = {key: matrix for key, matrix in self._matrices.items() if key in self._used}
        self._used.clear()


def top_singular_vectors(gradient: Tensor, rank: int, keeps_rows: bool) -> Tensor:
    """The top ``rank`` singular vectors of a ``[rows, columns]`` gradient along its projected side: ``[rank, width]``.

    The rows are orthonormal, in float32. This is ``proj="svd"``, as in Fira and GaLore (arXiv 2403.03507, equation 12).
    Non-finite entries count as 0, because the decomposition would raise on them.
    """
    matrix = torch.nan_to_num(gradient.to(torch.float32), nan=0.0, posinf=0.0, neginf=0.0)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    top = right[:rank] if keeps_rows else left[:, :rank].mT
    return top.clone(memory_format=torch.contiguous_format)  # a view would keep all singular vectors alive
