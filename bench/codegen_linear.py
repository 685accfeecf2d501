"""The kernels of an int8 linear layer for bench.codegen: which variants, and the launches that specialise them."""

from __future__ import annotations

from typing import Any

import torch

from apollo_triton.int8.weight import Int8Weight

# A tile of 128 rows, one that is padded, float32 without TF32, and groups that lie otherwise in every row: those CI
# compiles for every target. Then TF32, small groups, and rows at no alignment.
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
    """Both directions, on the CPU: something must stand in for ``fused.launch``."""
    from apollo_triton.int8 import matmul as int8_matmul

    weight = Int8Weight.of(torch.zeros(outputs, inputs), group_size)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        int8_matmul.forward(torch.zeros(rows, inputs, dtype=dtype), weight, torch.zeros(outputs, dtype=dtype))
        int8_matmul.input_gradient(torch.zeros(rows, outputs, dtype=dtype), weight)
    finally:
        torch.set_float32_matmul_precision(before)


def words(at: dict[str, Any], types: dict[str, str]) -> list[str]:
    """What tells a variant apart: its tile and the dtype of its activations."""
    dtype = (types.get("p_x") or types["p_gradient"])[1:]
    tile = "x".join(str(at[f"BLOCK_{side}"]) for side in ("ROWS", "KEPT", "SUMMED"))
    return [f"runs of {at['RUN']}", tile, dtype, *(["tf32"] if at["PRECISION"] == "tf32" else [])]
