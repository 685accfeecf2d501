"""Kernels with and without planted bugs, for the tests of the launch recorder (``sanitizer.py``)."""

import numpy as np
import torch
import triton
import triton.language as tl
from sanitizer import Recorder


@triton.jit
def double(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n) * 2, mask=o < n)


@triton.jit
def double_unmasked(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o) * 2)


@triton.jit
def shift(p_x, BLOCK: tl.constexpr):
    """x[i] <- x[i + BLOCK] + 1, which the next program writes."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o + BLOCK) + 1)


@triton.jit
def overlap(p_x, STEP: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(p_x + tl.program_id(0) * STEP + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def publish(p_x, p_y, WRITER: tl.constexpr):
    """All programs read x[0], WRITER among them, which writes it too."""
    program = tl.program_id(0)
    tl.store(p_y + program, tl.load(p_x))
    if program == WRITER:
        tl.store(p_x, 1.0)


@triton.jit
def both(p_x, p_y):
    tl.store(p_x, 1.0)
    tl.store(p_y, 1.0)


@triton.jit
def mixed_sizes(p_words, p_bytes):
    """Program 0 writes an int32, program 1 the third of its bytes."""
    if tl.program_id(0) == 0:
        tl.store(p_words, 1)
    else:
        tl.store(p_bytes + 2, tl.full([], 7, tl.int8))


@triton.jit
def count(p_x, p_counter, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(p_counter + o, tl.load(p_x + o), mask=o < 3)


@triton.jit
def swap(p_x, OFFSET: tl.constexpr):
    tl.atomic_cas(p_x + OFFSET, 0, 5)


@triton.jit
def last_writer(p_x):
    tl.store(p_x, tl.program_id(0))


@triton.jit
def stream(p_table, p_sizes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """table: int64 [matrices, 2], the addresses of a source and a destination; program (matrix, block)."""
    matrix = tl.program_id(0)
    p_x = tl.load(p_table + matrix * 2).to(tl.pointer_type(DTYPE))
    p_y = tl.load(p_table + matrix * 2 + 1).to(tl.pointer_type(DTYPE))
    n = tl.load(p_sizes + matrix)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.jit
def row_sums(p_x, p_y, COLUMNS: tl.constexpr, PASSES: tl.constexpr):
    """Reads its row PASSES times, and writes its sum once."""
    row = tl.program_id(0)
    total = tl.zeros([COLUMNS], tl.float32)
    for _ in range(PASSES):
        total += tl.load(p_x + row * COLUMNS + tl.arange(0, COLUMNS))
    tl.store(p_y + row * COLUMNS + tl.arange(0, COLUMNS), total)


@triton.jit
def touch_rows(p_table, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """x[row, :BLOCK] <- itself; where not WIDE, offsets are int32 and overflow."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    p_x = tl.load(p_table).to(tl.pointer_type(tl.bfloat16)) + row * columns
    o = tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o))


@triton.jit
def coordinates(p_y):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(p_y + (x * tl.num_programs(1) + y) * tl.num_programs(2) + z, x * 100 + y * 10 + z)


@triton.jit
def undefined_lanes(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n))


def recorded(kernel, grid, *arguments, recorder=None, **constants):
    with recorder or Recorder() as recorder:
        kernel[grid](*arguments, **constants)
    (launch,) = recorder.launches
    return launch


def guarded(count, dtype=torch.float32):
    """A tensor in the middle of memory that torch does not know, and that memory."""
    memory = np.full(count * 4 + 4096, 0xAB, np.uint8)
    # from_numpy of a slice: its storage is the slice, so its neighbourhood is mapped and yet belongs to no tensor.
    return torch.from_numpy(memory[2048 : 2048 + count * 4]).view(dtype), memory
