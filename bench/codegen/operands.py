"""The kernels of a step from a gradient's two factors for bench.codegen: the variants and their launches."""

from __future__ import annotations

from typing import Any

import torch

from apollo_triton.backends.interface import StepScalars
from apollo_triton.int8.weight import Int8Weight

_MINI = {"rank": 1, "scale_type": "tensor"}
# CI compiles the first four for every target: Mini and rank 256 in bfloat16, int8, and float32 without TF32. Then come
# TF32, float16 and the other variants of the epilogues.
VARIANTS: list[dict[str, Any]] = [
    {"group": _MINI},
    {"group": {"rank": 256}, "stochastic_rounding": True},
    {"group": _MINI, "int8": 128},
    {"group": {"rank": 16}, "dtype": torch.float32},
    {"group": {"rank": 64, "proj_type": "left"}, "dtype": torch.float32, "precision": "high"},
    {"group": {"rank": 64}, "dtype": torch.float32, "precision": "high"},
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
    **options: Any,
) -> None:
    """Launch the kernels of one step of a weight ``[1024, columns]`` from the two factors of its gradient, on the CPU.

    The factors have 512 tokens, and the norms are computed in both ways. The caller must have replaced ``gpu.launch``.
    """
    from apollo_triton import APOLLOAdamW
    from apollo_triton.backends.triton import implicit
    from apollo_triton.backends.triton import verbs as fused
    from apollo_triton.core.implicit_gradient import ImplicitGradient
    from apollo_triton.core.settings import Settings
    from apollo_triton.engine.agreement import Agreement
    from apollo_triton.engine.caches import Caches
    from apollo_triton.engine.plan import Plan

    parameter = torch.nn.Parameter(torch.zeros(1024, columns, dtype=weight or dtype))
    if int8:
        parameter = torch.nn.Parameter(Int8Weight.of(parameter.detach(), int8))
    optimizer = APOLLOAdamW([{"params": [parameter], **group}], lr=1e-3, backend="triton", **options)
    settings = Settings.of(optimizer.param_groups[0])
    X, dY = torch.zeros(512, columns, dtype=dtype), torch.zeros(512, 1024, dtype=dtype)
    gradient = ImplicitGradient(X, dY, limiter_norm="sketch")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    given = {parameter: gradient}
    plan = Plan(optimizer.param_groups, optimizer.state, [settings], given, False, Agreement(), Caches())
    (table,), scalars = plan.tables, StepScalars(1)
    sketch = implicit.sketch(table, settings, scalars, gradient)
    for norms in (implicit.tile_norms, implicit.gram_norms):
        norms(table, gradient)
    factors = fused.rescale(table, settings, scalars, sketch)
    implicit.apply(table, settings, scalars, factors, gradient)
    torch.set_float32_matmul_precision(before)


def words(at: dict[str, Any], types: dict[str, str], divisible: tuple[int, ...]) -> list[str]:
    """What distinguishes a variant: its tile, the dtypes of the factors and of a float weight, and whether the rows of
    either begin at multiples of 16 bytes. ``divisible``: the indices of arguments known to be multiples of 16."""
    names = ("CHANNELS", "ROWS", "COLUMNS", "RANK", "WIDTH", "TOKENS")
    tile = "x".join(str(at[f"BLOCK_{name}"]) for name in names if f"BLOCK_{name}" in at)
    kinds = [types[name][1:] for name in ("p_W", "p_dY", "p_kept", "p_summed") if name in types]
    indices = {name: index for index, name in enumerate(types)}
    unaligned = any(indices.get(name, divisible[0]) not in divisible for name in ("columns", "width", "channels"))
    return [tile, *kinds, *["unaligned"] * unaligned, *["tf32"] * (at.get("PRECISION") == "tf32")]
