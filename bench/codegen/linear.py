"""The kernels of an int8 linear layer for bench.codegen: the variants and the launches that specialise them."""

from __future__ import annotations

from typing import Any

import torch

from apollo_triton.int8.weight import Int8Weight

# CI compiles the first four for every target: a tile of 128 rows, a padded tile, float32 without TF32, and groups that
# begin at another place in every row. Then come TF32, small groups, and rows that are not aligned.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"rows": 5},
    {"dtype": torch.float32},
    {"outputs": 1026, "group_size": 27},
    {"dtype": torch.float32, "precision": "high"},
    {"group_size": 16},
    {"inputs": 1001, "group_size": 1001, "dtype": torch.float16},
]
ESSENTIAL = 4


def forward_and_backward(
    rows: int = 4096,
    outputs: int = 1024,
    inputs: int = 1024,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "highest",
) -> None:
    """Launch the kernels of both directions on CPU tensors. The caller must have replaced ``gpu.launch``."""
    from apollo_triton.int8 import matmul as int8_matmul

    weight = Int8Weight.of(torch.zeros(outputs, inputs), group_size)
    parts = weight.q, weight.scale, weight.zero
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        int8_matmul.forward(
            torch.zeros(rows, inputs, dtype=dtype), *parts, torch.zeros(outputs, dtype=dtype), group_size
        )
        int8_matmul.input_gradient(torch.zeros(rows, outputs, dtype=dtype), *parts, group_size)
    finally:
        torch.set_float32_matmul_precision(before)


def words(at: dict[str, Any], types: dict[str, str]) -> list[str]:
    """What distinguishes a variant: its runs, its tile and the dtype of its activations."""
    dtype = (types.get("p_x") or types["p_gradient"])[1:]
    tile = "x".join(str(at[f"BLOCK_{side}"]) for side in ("ROWS", "KEPT", "SUMMED"))
    return [f"runs of {at['RUN']}", tile, dtype, *(["tf32"] if at["PRECISION"] == "tf32" else [])]
