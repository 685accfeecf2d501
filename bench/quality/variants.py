"""What the study varies: the state of embeddings and head, the limiter, the refresh. A variant takes the best rate of
the tuned method that it varies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW, apollo_param_groups
from apollo_triton.core.settings import AUTO

from .experiments import CarriedMomentum, FlooredLimiter, RowMomentum
from .methods import APOLLO, FACTOR, FAST_MINI, MINI, RATE_FACTOR, TUNED, Build, Together, apollo, int8, mini


class Variant(NamedTuple):
    """An optimizer, and the tuned method that it varies."""

    build: Build
    base: str


def _embeddings(factor: float = FACTOR, **keys: Any) -> Build:
    """Mini with group keys of their own for embeddings and head, and their rate over that of the run."""

    def build(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
        own, groups = _without_embeddings(model)
        return APOLLOAdamW([*groups, {"params": own, RATE_FACTOR: factor, **keys}], lr=rate, seed=seed)

    return build


def _momentum_head(share: float) -> Build:
    """Mini with momentum alone for the head."""

    def build(model: nn.Module, rate: float, seed: int) -> Any:
        (embeddings, head), groups = _without_embeddings(model)
        body = APOLLOAdamW([*groups, {"params": [embeddings], RATE_FACTOR: FACTOR}], lr=rate, seed=seed)
        return Together([body, RowMomentum([head], lr=rate, share=share)])

    return build


def _without_embeddings(model: nn.Module) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Embeddings and head, and Mini's groups of the others."""
    own = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]  # type: ignore[operator]
    groups = apollo_param_groups(model, 1, scale_type="tensor")
    for group in groups:
        kept = [
            (name, weight)
            for name, weight in zip(group["param_names"], group["params"], strict=True)
            if not any(weight is each for each in own)
        ]
        group["param_names"], group["params"] = [name for name, _ in kept], [weight for _, weight in kept]
    return own, [group for group in groups if group["params"]]


NEVER = 10**9  # steps between refreshes
BY_ROW, BY_ROW_8BIT = "by row", "by row, 8-bit"  # one second moment a row; and the first one in 8 bits
# Embeddings and head. Of several ways to do the same, the one with the best loss with seed 0 counts: low-rank updates
# of "auto" are larger than AdamW's, and the sizes of a momentum's (in rates; AdamW's are 0.3 times FACTOR) are free.
EMBEDDINGS: dict[str, dict[str, Build]] = {
    "bfloat16": {"bfloat16": _embeddings(state_dtype="bfloat16")},
    "8-bit": {"8-bit": _embeddings(state_bits=8)},
    BY_ROW: {BY_ROW: _embeddings(second_moment="row")},
    BY_ROW_8BIT: {BY_ROW_8BIT: _embeddings(second_moment="row", state_bits=8)},
    **{
        f"rank {rank}": {
            f"rank {rank} at x{factor:g}": _embeddings(factor, rank=rank, scale=AUTO) for factor in (1.0, FACTOR)
        }
        for rank in (8, 32)
    },
    "momentum head": {f"momentum head of {share:g}": _momentum_head(share) for share in (0.3, 1.0, 3.0)},
}
# By the names of the options, those of the variants.
OPTIONS = {option: [f"{FAST_MINI}, {name}" for name in builds] for option, builds in EMBEDDINGS.items()}
LIMITERS = {
    f"{base}, {name}": Variant(build, base)
    for base, made in ((APOLLO, apollo), (MINI, mini))
    for name, build in {"no limiter": made(disable_nl=True), "floored limiter": made(make=FlooredLimiter)}.items()
}
REFRESHES = {
    f"{APOLLO}, {name}": Variant(build, APOLLO)
    for name, build in {
        "refresh 50": apollo(update_proj_gap=50),
        "refresh 1000": apollo(update_proj_gap=1000),
        "never refreshed": apollo(update_proj_gap=NEVER),
        "momentum carried": apollo(make=CarriedMomentum),
    }.items()
}
# Variants on all tokens, with one rate for all weights.
_FULL = {
    f"{APOLLO}, all moments 8-bit": Variant(apollo(state_bits=8), APOLLO),
    f"{APOLLO}, int8 weights": Variant(int8(apollo()), APOLLO),
    f"{MINI}, embeddings {BY_ROW}": Variant(_embeddings(1.0, second_moment="row"), MINI),
    f"{MINI}, embeddings {BY_ROW_8BIT}": Variant(_embeddings(1.0, second_moment="row", state_bits=8), MINI),
}
FULL_VARIANTS = [*_FULL]
# All that a run can train, and what it varies; a tuned method varies itself.
VARIANTS = {name: Variant(method.build, name) for name, method in TUNED.items()}
VARIANTS |= {
    f"{FAST_MINI}, {name}": Variant(build, FAST_MINI)
    for builds in EMBEDDINGS.values()
    for name, build in builds.items()
}
VARIANTS |= LIMITERS | REFRESHES | _FULL
