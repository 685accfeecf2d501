"""The settings whose launches are compiled.

The dtype is bfloat16 and rows are kept, as in most trainings, unless a variant says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import linear, operands

Variant = dict[str, Any]  # arguments of ``launches``

_FLOAT32, _BFLOAT16, _FLOAT16 = torch.float32, torch.bfloat16, torch.float16
_MINI, _COLUMNS = {"rank": 1, "scale_type": "tensor"}, {"proj_type": "left"}
_LAYERS = [{"linear": variant} for variant in linear.VARIANTS]
_FROM_OPERANDS = [{"operands": variant} for variant in operands.VARIANTS]
_8BIT = {"state_bits": 8, "min_8bit_size": 0}
_ROWS = {"second_moment": "row"}


def sketches(target: str) -> Iterator[Variant]:
    """The sketch as a product, at each tile and dtype: what pipelines and what races."""
    for rank in (16, 64, 128, 256):
        for dtype in (_BFLOAT16, _FLOAT16, _FLOAT32):
            yield _sketch(rank, dtype)
    yield from (_sketch(4), _sketch(32, _FLOAT32))
    for rank, dtype in ((64, _FLOAT32), (16, _BFLOAT16), (256, _BFLOAT16)):
        yield _sketch(rank, dtype, columns=True)


def essential(target: str) -> Iterator[Variant]:
    """What decides whether a target works at all, and every sketch by a product."""
    yield from _LAYERS[: linear.ESSENTIAL]
    yield from _FROM_OPERANDS[: operands.ESSENTIAL]
    yield {"group": _MINI}
    yield {"group": {"rank": 256}}
    yield {"group": {"rank": 256}, "dtype": _FLOAT32}  # three products with the largest tile
    yield {"group": {"rank": 128, "proj": "svd"}}  # float32 throughout
    yield from ({}, {"group": _ROWS})
    yield from sketches(target)


def every(target: str) -> Iterator[Variant]:
    """Every value of each constexpr argument, and all pairs that one expression of a kernel uses together, but not all
    combinations."""
    yield from essential(target)
    yield from _LAYERS[linear.ESSENTIAL :]
    yield from _FROM_OPERANDS[operands.ESSENTIAL :]
    # Rank 1, where the number of instructions per element decides the time.
    yield from ({"group": _MINI | _COLUMNS}, {"group": {"rank": 1}})
    yield {"group": {"rank": 1} | _COLUMNS, "dtype": _FLOAT32}
    yield {"group": _MINI | {"distribution": "rademacher"}}
    yield from ({"group": {"rank": 4}}, {"group": {"rank": 4, "distribution": "rademacher"}})
    # The sketch stays in registers up to rank 256, and goes through memory above.
    yield {"group": {"rank": 512}}
    yield {"group": {"rank": 256} | _COLUMNS}
    yield {"group": {"rank": 256, "distribution": "rademacher"}}
    yield {"group": {"rank": 128}, "dtype": _FLOAT32, "gradient": _BFLOAT16}
    yield {"group": {"rank": 128}, "dtype": _FLOAT16}
    yield {"group": {"rank": 4, "proj": "svd"}}
    # Stochastic rounding of weights and of moments, with one launch and with two.
    rounding = {"stochastic_rounding": True, "state_dtype": _BFLOAT16}
    for group in (_MINI, {"rank": 256}, {"rank": 512}):
        yield {"group": group, **rounding}
    # Step count and learning rate on the device, and a common scale of all gradients.
    device = {"capturable": True, "lr": torch.tensor(1e-3), "max_grad_norm": 1.0}
    yield {"group": _MINI, **device}
    yield {"group": {"rank": 128}, **device}
    # By strides, element by element.
    yield {"group": _MINI, "aligned": False}
    yield {"group": {"rank": 128}, "aligned": False, **rounding}
    for dense in ({}, {"group": _ROWS}):
        yield from (dense | {"aligned": False}, dense | {"dtype": _FLOAT32}, dense | rounding | device)
    yield from ({"group": _ROWS, **_8BIT}, {"group": _ROWS, "aligned": False, **_8BIT})
    # Sharded along the width over two ranks: sketch and rescale are two launches at any rank, and P is read.
    rows = {"proj_type": "right"}
    yield {"group": _MINI | rows, "sharded": True}
    yield {"group": {"rank": 128} | rows, "sharded": True}
    yield {"group": {"rank": 16} | rows, "dtype": _FLOAT32, "sharded": True}
    # Int8 weights. Groups whose size is no power of two go element by element.
    yield {"group": _MINI, "int8": 128}
    yield {"group": {"rank": 128}, "int8": 256}
    yield {"group": _MINI | _COLUMNS, "int8": 64}
    # 8-bit moments: two launches again. At rank 17 the sketch splits the channels of one program of the second in four.
    for group in ({"rank": 16}, {"rank": 17, "scale_type": "tensor"}, {"rank": 256} | _COLUMNS):
        yield {"group": group, **_8BIT}


def few(target: str) -> Iterator[Variant]:
    """A variant of each kernel on sm_90, and of each kind of fault on the target that shows it."""
    if target == "sm_90":
        yield _LAYERS[0]
        yield _FROM_OPERANDS[0]
        yield {"operands": {"group": _MINI, "int8": 128}}
        yield from ({"group": _MINI}, {}, {"group": _MINI, "int8": 128})
        yield _sketch(256)
        # Three products by parts of G, in registers; R goes through memory.
        kernels = ("projection_kernel", "sketch_kernel", "rescale_kernel")
        rows = {"proj_type": "right"}
        yield {"group": {"rank": 16} | rows, "dtype": _FLOAT32, "sharded": True, "only": kernels}
        yield {"group": {"rank": 256} | _COLUMNS, **_8BIT, "only": ("rescale_blockwise_kernel",)}
        yield {"group": _MINI, "capturable": True, "only": ("step_kernel",)}
        yield {"group": _ROWS, **_8BIT}
    elif target == "sm_100":
        yield _sketch(64, _FLOAT16)  # whose P is float16, too
        yield {"group": _MINI, "only": ("apply_kernel",)}
    elif target == "sm_80":
        yield _sketch(4, columns=True)


def _sketch(rank: int, dtype: torch.dtype = _BFLOAT16, columns: bool = False) -> Variant:
    return {"group": {"rank": rank} | (_COLUMNS if columns else {}), "dtype": dtype, "only": ("sketch_kernel",)}


# By the names of the command's options.
SETS: dict[str, Callable[[str], Iterator[Variant]]] = {
    "all": every,
    "essential": essential,
    "sketches": sketches,
    "few": few,
}
