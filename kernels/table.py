"""The pointer table: one row of 16 int64 per matrix, which tells every kernel where the matrix and its state are.

Addresses of gradients are a vector of their own, since they alone may change at every step. A row is one 128-byte
cache line. Strides count elements.
"""

import os

import triton.language as tl

FIELDS = 16

WEIGHT = tl.constexpr(0)  # address of the weight [rows, columns]
EXP_AVG = tl.constexpr(1)  # of its moments [channels, rank]
EXP_AVG_SQ = tl.constexpr(2)
UPDATE_NORM = tl.constexpr(3)  # of u_prev, a float32
PROJECTION = tl.constexpr(4)  # of P [rank, width], 0 where the kernel makes it
SEED = tl.constexpr(5)
ROWS = tl.constexpr(6)
COLUMNS = tl.constexpr(7)
WEIGHT_ROW_STRIDE = tl.constexpr(8)
WEIGHT_COLUMN_STRIDE = tl.constexpr(9)
GRADIENT_ROW_STRIDE = tl.constexpr(10)
GRADIENT_COLUMN_STRIDE = tl.constexpr(11)
# The number of its first channel among those of all experts and pieces, times the width that of its first element:
# rounding bits are counted by it. Of a dense parameter that of its first element, a multiple of 8.
ROUNDING_OFFSET = tl.constexpr(12)
FIRST_CHANNEL = tl.constexpr(13)  # where its channels start among those of all matrices
FIRST_CHANNEL_PROGRAM = tl.constexpr(14)  # the first program of its channels, in sketch and rescale
FIRST_TILE_PROGRAM = tl.constexpr(15)  # and the first of its tiles, in apply and in the dense step

# A dense parameter has no projection and no u_prev; its moments have strides of their own there.
STATE_ROW_STRIDE = UPDATE_NORM
STATE_COLUMN_STRIDE = PROJECTION

# An int8 weight is contiguous, and has scales and zero points instead of strides.
SCALE = WEIGHT_ROW_STRIDE  # address of its scales [groups], float32
ZERO = WEIGHT_COLUMN_STRIDE  # and of its zero points, uint8

# The interpreter multiplies the raw 16-bit words of bfloat16 operands in tl.dot (triton 3.2 to 3.9): they go in as
# float32 there, which holds them exactly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
