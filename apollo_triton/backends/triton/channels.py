"""The channels of a table's matrices, as ``rescale`` reads them: all of a table's, or those whose moments are here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels import table
from ...params.member import Member


class Channels:
    """What ``rescale`` reads of a table.

    ``addresses`` int64 ``[matrices, 16]`` (kernels/table.py). ``channels``: how many all matrices have together.
    ``channel_programs`` int32: the index of the matrix of each program of ``sketch`` and ``rescale``, of which
    ``program_counts`` int64 ``[matrices]`` says how many a matrix has. ``channel_blocks``: their tile sizes.
    ``absmaxes`` int64 ``[matrices, 2]``: addresses, where moments are 8-bit, None otherwise. ``previous`` float32
    ``[matrices]``: where ``rescale`` puts u_prev aside, because ``apply`` reads the old one while it writes the new
    one.
    """

    device: torch.device
    matrices: int
    rank: int
    keeps_rows: bool
    aligned: bool
    state_dtype: torch.dtype
    addresses: Tensor
    channels: int
    channel_programs: Tensor
    program_counts: Tensor
    channel_blocks: dict[str, int]
    absmaxes: Tensor | None
    previous: Tensor

    def scratch(self, *shape: int) -> Tensor:
        """Memory of a step for float32 numbers, in two thirds of ``torch.empty``'s 1.2 us."""
        return self.previous.new_empty(*shape)


class MomentTable(Channels):
    """The channels of a table's matrices whose moments are on this rank, where sketches are summed over ranks."""

    def __init__(self, whole: Channels, rows: list[list[int]], members: Sequence[Member]) -> None:
        """``rows`` are those of the whole table's addresses."""
        self.device, self.rank, self.state_dtype = whole.device, whole.rank, whole.state_dtype
        self.keeps_rows, self.aligned, self.channel_blocks = whole.keeps_rows, whole.aligned, whole.channel_blocks
        self.matrices, self.previous = whole.matrices, whole.previous
        self.absmaxes = whole.absmaxes  # they are on the rank that has the moments
        counts = [member.shard.moments for member in members for _ in member.shard.moment_rounding_offsets]
        offsets = [offset for member in members for offset in member.shard.moment_rounding_offsets]
        programs = [programs_for(count, self.channel_blocks["BLOCK_CHANNELS"]) for count in counts]
        self.channels = first_program = 0
        rows = [[*row] for row in rows]
        for row, count, offset, own_programs in zip(rows, counts, offsets, programs, strict=True):
            row[(table.ROWS if self.keeps_rows else table.COLUMNS).value] = count
            row[table.ROUNDING_OFFSET.value] = offset
            row[table.FIRST_CHANNEL.value], row[table.FIRST_CHANNEL_PROGRAM.value] = self.channels, first_program
            self.channels += count
            first_program += own_programs
        self.addresses = torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.device)
        self.program_counts = torch.tensor(programs, dtype=torch.int64, device="cpu").to(self.device)
        self.channel_programs = owners_of(programs).to(self.device)


def programs_for(length: int, block: int) -> int:
    """How many programs share ``length``: one where it is 0, so that the matrix of an empty shard keeps its u_prev."""
    return max(1, -(-length // block))


def owners_of(programs: list[int]) -> Tensor:
    """The index of the matrix of each program, int32."""
    counts = torch.tensor(programs, dtype=torch.int64, device="cpu")
    return torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32, device="cpu"), counts)
