"""The pointer table: one row of 16 int64 per matrix, which tells every kernel where the matrix and its state are.

The addresses of gradients are in a separate vector, because only they may change at every step. A row is one 128-byte
cache line, and full: the roots of the scales, which ``apply`` alone reads, are in memory of their own.
Strides are in elements.
"""

import os

import triton.language as tl

FIELDS = tl.constexpr(16)

WEIGHT = tl.constexpr(0)  # address of the weight [rows, columns]
EXP_AVG = tl.constexpr(1)  # addresses of its moments [channels, rank]
EXP_AVG_SQ = tl.constexpr(2)
UPDATE_NORM = tl.constexpr(3)  # address of u_prev, a float32
PROJECTION = tl.constexpr(4)  # address of P [rank, width], 0 if the kernel makes P
SEED = tl.constexpr(5)
ROWS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)
WEIGHT_ROW_STRIDE = tl.constexpr(8)
WEIGHT_COLUMN_STRIDE = tl.constexpr(9)
GRADIENT_ROW_STRIDE = tl.constexpr(10)
GRADIENT_COLUMN_STRIDE = tl.constexpr(11)
# Index of the matrix's first channel in the whole, unsharded parameter. Times the width, it is the index of the first
# element, from which the bits for stochastic rounding are drawn. For a dense parameter it is the index of the first
# element itself, a multiple of 8.
ROUNDING_OFFSET = tl.constexpr(12)
FIRST_CHANNEL = tl.constexpr(13)  # index of its first channel among the channels of all matrices of the table
FIRST_CHANNEL_PROGRAM = tl.constexpr(14)  # index of its first program in sketch and rescale
FIRST_TILE_PROGRAM = tl.constexpr(15)  # index of its first program in apply and in the dense step

# A dense parameter has no projection and no u_prev. In their place are the strides of its moments.
STATE_ROW_STRIDE = UPDATE_NORM
STATE_COLUMN_STRIDE = PROJECTION

# An int8 weight is contiguous, and has scales and zero points instead of strides.
SCALE = WEIGHT_ROW_STRIDE  # address of its scales, float32 [groups]
ZERO = WEIGHT_COLUMN_STRIDE  # address of its zero points, uint8 [groups]

# In tl.dot the interpreter multiplies the raw 16-bit words of bfloat16 operands (triton 3.2 to 3.9). There they are
# converted to float32 first, which holds them exactly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least ``least``."""
    return 1 << max(0, least - 1).bit_length()
