"""The cases of ``apollo-triton validate``: shapes, dtypes, ranks and options. Each line of its table is a ``Case``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = tuple[int, ...]

# The dtypes of weights and of gradients.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32/bf16": (torch.float32, torch.bfloat16),
}
MINI: dict[str, Any] = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
STEPS, GAP = 8, 3  # two refreshes of P, and two steps after the last one


@dataclass(frozen=True)
class Case:
    """One line of the table. ``kind`` is what is run: "projection", "verbs", "steps" or "implicit". ``options`` are the
    optimizer's.

    ``layout`` is the memory layout of weights and gradients. With ``spike`` the fourth gradient holds an infinity.
    """

    kind: str
    name: str
    shapes: tuple[Shape, ...]
    dtypes: str = "fp32"
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "rows"
    spike: bool = False
    steps: int = STEPS


def _verbs(shape: Shape, dtypes: str = "fp32", name: str = "", **options: Any) -> Case:
    label = " ".join(filter(None, (_size(shape), dtypes, f"rank {options['rank']}", name)))
    return Case("verbs", label, (shape,), dtypes, options, steps=3)


def _steps(name: str, *shapes: Shape, dtypes: str = "fp32", **rest: Any) -> Case:
    """``rest`` holds fields of ``Case`` and options of the optimizer."""
    case_fields = {key: rest.pop(key) for key in ("layout", "spike", "steps") if key in rest}
    return Case("steps", f"{_size(shapes[0])} {dtypes} {name}", shapes, dtypes, rest, **case_fields)


def _implicit(name: str, shape: Shape, dtypes: str = "bf16", **options: Any) -> Case:
    return Case("implicit", f"{_size(shape)} {dtypes} {name}", (shape,), dtypes, options)


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _projections() -> Iterator[Case]:
    for rank, kind in ((1, "gaussian"), (4, "gaussian"), (20, "gaussian"), (4, "rademacher"), (20, "rademacher")):
        for side, kept in (("right", "rows"), ("left", "columns")):
            options = {"rank": rank, "distribution": kind, "proj_type": side}
            yield Case("projection", f"rank {rank} {kind}, {kept} kept", ((136, 136),), "fp32", options)


def default_cases(on_gpu: bool) -> list[Case]:
    """One case for each thing that could go wrong: about 85 s in the interpreter on 2 cores."""
    f32, bf16, tall, wide = "fp32", "bf16", (96, 64), (64, 96)
    cases = [
        *_projections(),
        _verbs(tall, f32, "tensor", **MINI),
        _verbs(wide, bf16, "tensor", **MINI),
        _verbs(tall, bf16, rank=4),
        _verbs((64, 130), f32, rank=4, weight_decay=0.1),
        _verbs((130, 70), f32, rank=16),
        _verbs((70, 130), "fp16", rank=16),
        _verbs(wide, "fp32/bf16", rank=20),
        _verbs(tall, f32, "tensor", rank=20, scale_type="tensor", scale_front=True, scale=4.0),
        _verbs(wide, f32, "rademacher", rank=20, distribution="rademacher"),
        _verbs(wide, bf16, "rademacher", rank=1, distribution="rademacher"),
        _verbs(tall, f32, rank=64),
        _verbs((24, 328), f32, rank=320, proj_type="right"),
        _verbs(tall, f32, "svd", rank=5, proj="svd"),
        _verbs((3, 40, 24), f32, "experts", rank=4),
        _verbs(tall, bf16, "stochastic", rank=4, stochastic_rounding=True, state_dtype=torch.bfloat16),
        *(_steps("Mini", shape, dtypes=dtypes, **MINI) for shape in (tall, wide) for dtypes in DTYPES),
        *(_steps("rank 4", (72, 40), dtypes=dtypes, rank=4) for dtypes in DTYPES),
        _steps("rank 4", wide, dtypes=bf16, rank=4),
        *(_steps("rank 16", (130, 70), dtypes=dtypes, rank=16) for dtypes in (bf16, "fp32/bf16")),
        _steps("rank 20", (70, 130), rank=20),
        _steps("rank 64", tall, dtypes=bf16, rank=64),
        _steps("rank 320", (24, 328), rank=320, proj_type="right", steps=2),
        _steps("rank 1, channels", tall, rank=1),
        _steps("rank 16, one factor", wide, rank=16, scale_type="tensor"),
        _steps("rank 4, reversed", wide, rank=4, proj_type="reverse_std"),
        _steps("rademacher 1", (64, 140), rank=1, distribution="rademacher"),
        _steps("rademacher 20", (140, 64), dtypes=bf16, rank=20, distribution="rademacher"),
        _steps("svd 5", tall, rank=5, proj="svd"),
        _steps("svd 20", wide, dtypes=bf16, rank=20, proj="svd"),
        _steps("decay, no limiter", tall, rank=4, weight_decay=0.1, disable_nl=True),
        _steps("Mini, decay", wide, dtypes=bf16, **MINI, weight_decay=0.1),
        _steps("scale in front, no bias", tall, rank=4, scale=4.0, scale_front=True, correct_bias=False),
        _steps("auto scale, 3 widths", tall, (24, 72), (3, 12, 40), rank=4, scale="auto"),
        _steps("auto scale in front", wide, dtypes=bf16, rank=1, scale_type="tensor", scale="auto", scale_front=True),
        _steps("bf16 moments", tall, rank=16, state_dtype=torch.bfloat16),
        _steps("stochastic", wide, dtypes=bf16, rank=4, stochastic_rounding=True, state_dtype=torch.bfloat16),
        _steps("Mini, stochastic, odd", (33, 71), dtypes=bf16, **MINI, stochastic_rounding=True),
        _steps("clipped, 5 at once", (40, 24), wide, (24, 40), (64,), (3, 17, 5), rank=3, max_grad_norm=0.5),
        _steps("transposed", tall, dtypes=bf16, rank=4, layout="transposed"),
        _steps("with gaps", wide, rank=16, layout="gaps"),
        _steps("misaligned", tall, rank=4, layout="misaligned", stochastic_rounding=True),
        _steps("experts", (3, 40, 24), dtypes=bf16, rank=4, stochastic_rounding=True, state_dtype=torch.bfloat16),
        _steps("experts, transposed", (2, 24, 40), rank=16, layout="transposed"),
        _steps("convolution", (24, 4, 3, 3), rank=4),
        _steps("channels last", (24, 4, 3, 3), rank=4, layout="channels_last"),
        _steps("an infinity, rank 4", (40, 24), (24, 40), rank=4, spike=True),
        _steps("an infinity, Mini", wide, dtypes=bf16, **MINI, spike=True),
        _steps("capturable, rank 16", tall, rank=16, capturable=True),
        _steps("capturable, Mini", wide, dtypes=bf16, **MINI, capturable=True),
        *(_steps("dense", (72, 40), (64,), (), dtypes=dtypes, weight_decay=0.1) for dtypes in DTYPES),
        _steps("dense, stochastic", (33, 71), dtypes=bf16, stochastic_rounding=True, state_dtype=torch.bfloat16),
        _steps("dense, clipped, gaps", tall, wide, max_grad_norm=0.1, layout="gaps"),
        _steps("dense, an infinity", tall, (40, 24), spike=True),
        _steps("dense, capturable", tall, dtypes=bf16, capturable=True),
        _steps("rows", (72, 40), (2, 300), (3, 17, 5), (64,), weight_decay=0.1, second_moment="row"),
        _steps("rows, stochastic", (33, 71), dtypes=bf16, second_moment="row", stochastic_rounding=True),
    ]
    cases += [
        _implicit("Mini", (200, 130), **MINI),
        _implicit("Mini", (130, 200), "fp32", **MINI),
        _implicit("rank 16, stochastic", (130, 200), rank=16, stochastic_rounding=True, weight_decay=0.1),
        _implicit("rank 4, auto scale", (70, 40), "fp32/bf16", rank=4, scale="auto"),
    ]
    if on_gpu:  # shapes of a 7B model: several programs a row, sums of many blocks, offsets of many megabytes
        for shape in ((4096, 4096), (11008, 4096), (4096, 11008)):
            for dtypes in (f32, bf16):
                cases.append(_steps("Mini", shape, dtypes=dtypes, **MINI, steps=4))
                cases.append(_steps("rank 256", shape, dtypes=dtypes, rank=256, steps=4))
            cases.append(_implicit("rank 256", shape, rank=256))
        cases.append(_steps("dense", (32000, 1024), dtypes=bf16, steps=4))
        cases.append(_steps("rows", (32000, 1024), (16, 50000), dtypes=bf16, second_moment="row", steps=4))
    return cases


_FULL_SHAPES = [(96, 64), (64, 96), (130, 70), (1, 40), (40, 1), (33, 257), (24, 328), (520, 392), (3, 40, 24)]
_FULL_OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "decay": {"weight_decay": 0.1},
    "no limiter": {"disable_nl": True},
    "front": {"scale": 4.0, "scale_front": True},
    "bf16 moments": {"state_dtype": torch.bfloat16},
    "stochastic": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    "clipped": {"max_grad_norm": 0.1},
    "infinity": {"spike": True},
    "transposed": {"layout": "transposed"},
    "gaps": {"layout": "gaps"},
    "misaligned": {"layout": "misaligned"},
    "capturable": {"capturable": True},
}
_FULL_PROJECTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "rademacher": {"distribution": "rademacher"},
    "svd": {"proj": "svd"},
}


def full_cases(on_gpu: bool) -> list[Case]:
    """The default cases, then all combinations: over ten thousand trajectories."""
    cases = default_cases(on_gpu)
    product = itertools.product(
        _FULL_SHAPES, DTYPES, (1, 4, 16, 20, 64, 320), ("right", "left"), ("channel", "tensor"), _FULL_PROJECTIONS
    )
    for shape, dtypes, rank, side, scale_type, projection in product:
        rows, columns = shape[-2:]
        if rank > (min(rows, columns) if projection == "svd" else columns if side == "right" else rows):
            continue
        fixed = {"rank": rank, "proj_type": side, "scale_type": scale_type, **_FULL_PROJECTIONS[projection]}
        for name, options in _FULL_OPTIONS.items():
            if not (name == "capturable" and projection == "svd"):  # svd reads the step count on the host
                label = " ".join(filter(None, (f"r{rank}", side, scale_type[0], projection, name)))
                cases.append(_steps(label, shape, dtypes=dtypes, **fixed, **options))
    return cases
