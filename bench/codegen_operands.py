"""The kernels of a step from operands for bench.codegen: which variants, and the launches that specialise them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from apollo_triton.backends.interface import Moment
from apollo_triton.backends.triton.table import OperandTable
from apollo_triton.core import gpu
from apollo_triton.int8.weight import Int8Weight

_MINI = {"rank": 1, "scale_type": "tensor"}
# Mini and rank 256 in bfloat16, int8, and float32 without TF32: those CI compiles for every target. Then TF32, float16
# and what else the epilogues can be.
VARIANTS: list[dict[str, Any]] = [
    {"group": _MINI},
    {"group": {"rank": 256}, "stochastic_rounding": True, "roomy": True},
    {"group": _MINI, "int8": 128, "roomy": True},
    {"group": {"rank": 16}, "dtype": torch.float32},
    {"group": {"rank": 64, "proj_type": "left"}, "dtype": torch.float32, "precision": "high"},
    {"group": {"rank": 64}, "dtype": torch.float32, "precision": "high", "roomy": True},
    {"group": {"rank": 256}, "stochastic_rounding": True},
    {"group": _MINI, "int8": 128},
    {"group": _MINI, "roomy": True},
    {"group": {"rank": 128, "proj_type": "left"}, "int8": 256, "roomy": True},
    {"group": {"rank": 4, "proj_type": "left"}, "dtype": torch.float16},
    {"group": {"rank": 128}, "weight": torch.float32},
    {"group": {"rank": 128, "proj_type": "left"}, "int8": 256},
    {"group": _MINI, "columns": 1001, "stochastic_rounding": True},
]
ESSENTIAL = 4


def step(
    group: dict[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    weight: torch.dtype | None = None,
    int8: int = 0,
    columns: int = 1024,
    precision: str = "highest",
    roomy: bool = False,
    **options: Any,
) -> None:
    """One step of a weight ``[1024, columns]`` from operands of 512 tokens, norms both ways, on the CPU: something must
    stand in for ``gpu.launch``. ``roomy``: with the tiles of GPUs that have much shared memory."""
    from apollo_triton import APOLLOAdamW
    from apollo_triton.backends.triton import operands as fused_operands
    from apollo_triton.backends.triton import verbs as fused
    from apollo_triton.core.operands import Operands
    from apollo_triton.core.settings import Settings
    from apollo_triton.params.member import Label, Member, find_piece
    from apollo_triton.params.state import make_state

    parameter = torch.nn.Parameter(torch.zeros(1024, columns, dtype=weight or dtype))
    if int8:
        parameter = torch.nn.Parameter(Int8Weight.of(parameter.detach(), int8))
    optimizer = APOLLOAdamW([{"params": [parameter], **group}], lr=1e-3, **options)
    settings, label = Settings.of(optimizer.param_groups[0]), Label(0, "", parameter)
    piece = find_piece(label, settings)
    member = Member(label, parameter, make_state(label, settings, piece), 0, piece)
    operands = Operands(torch.zeros(512, columns, dtype=dtype), torch.zeros(512, 1024, dtype=dtype))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    with mock.patch.object(gpu, "is_roomy", return_value=roomy):
        table, moment = OperandTable(member, settings, set()), Moment(1, None, None)
        sketch = fused_operands.sketch(table, settings, moment, operands, "sketch")
        for norms in (fused_operands.tile_norms, fused_operands.gram_norms):
            norms(table, operands)
        factors = fused.rescale(table, settings, moment, sketch)
        fused_operands.apply(table, settings, moment, factors, operands)
    torch.set_float32_matmul_precision(before)


def words(at: dict[str, Any], types: dict[str, str], divisible: tuple[int, ...]) -> list[str]:
    """What tells a variant apart: its tile, the dtypes of the operands and of a float weight, and whether rows of
    either begin at multiples of 16 bytes; ``divisible`` are the numbers of arguments known to be multiples of 16."""
    names = ("CHANNELS", "ROWS", "COLUMNS", "RANK", "WIDTH", "TOKENS")
    tile = "x".join(str(at[f"BLOCK_{name}"]) for name in names if f"BLOCK_{name}" in at)
    kinds = [types[name][1:] for name in ("p_W", "p_dY", "p_kept", "p_summed") if name in types]
    numbers = {name: number for number, name in enumerate(types)}
    unaligned = any(numbers.get(name, divisible[0]) not in divisible for name in ("columns", "width", "channels"))
    return [tile, *kinds, *["unaligned"] * unaligned, *["tf32"] * (at.get("PRECISION") == "tf32")]
