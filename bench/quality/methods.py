"""The optimizers of the study, without weight decay or clipping. Each has one learning rate for all weights, except
that AdamW, APOLLO and Mini also come with four times that rate for embeddings and head.

GaLore and Muon leave embeddings, head and norms to AdamW, as their authors do, and so does APOLLO. Peers come from the
packages that people install. SinkGD and SCALE are missing: no package on the index has them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW, apollo_param_groups, quantize_model

Build = Callable[[nn.Module, float, int], Any]  # of a model, a learning rate and a seed: an optimizer

RATE_FACTOR = "rate_factor"  # a group's key: its learning rate over that of the run
FIRST_RATE = 5e-3  # where sweeps start that AdamW's rate suits


@dataclass(frozen=True)
class Method:
    """An optimizer. ``first_rate`` is where its sweep starts."""

    build: Build
    first_rate: float = FIRST_RATE


class Together:
    """Several optimizers as one, for methods that leave a part of the weights to AdamW."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Mapping[Any, Any]:
        return {weight: state for optimizer in self.optimizers for weight, state in optimizer.state.items()}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def quarter(model: nn.Module) -> int:
    """The paper's rank: a quarter of the width."""
    return model.config.hidden_size // 4  # type: ignore[union-attr, operator, return-value]


def parts(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of the blocks, which are low-rank, and the dense rest."""
    low_rank, *dense = apollo_param_groups(model, 1)
    return low_rank["params"], [weight for group in dense for weight in group["params"]]


def adamw(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    kinds = ("embed", "head", "")  # as APOLLO's: embeddings and head in groups of their own
    groups: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for name, weight in model.named_parameters():
        groups[next(kind for kind in kinds if kind in name)].append(weight)
    return torch.optim.AdamW([{"params": own} for own in groups.values()], lr=rate, weight_decay=0.0, fused=True)


def _muon(model: nn.Module, rate: float, seed: int) -> Any:
    matrices, rest = parts(model)
    # Its updates are as large as AdamW's then, so that one learning rate suits both.
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Together([muon, torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, fused=True)])


def _adafactor(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=rate, weight_decay=0.0)


def _galore(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    matrices, rest = parts(model)
    keys = {"rank": quarter(model), "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    galore = importlib.import_module("galore_torch").GaLoreAdamW
    return galore([{"params": rest}, {"params": matrices, **keys}], lr=rate, no_deprecation_warning=True)


def _official(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    """apollo-torch with its own defaults."""
    matrices, rest = parts(model)
    keys = {"rank": quarter(model), "proj": "random", "scale_type": "channel", "scale": 1.0}
    keys |= {"update_proj_gap": 200, "proj_type": "std"}
    official = importlib.import_module("apollo_torch").APOLLOAdamW
    return official([{"params": rest}, {"params": matrices, **keys}], lr=rate)


def apollo(rank: int | None = None, make: type[APOLLOAdamW] = APOLLOAdamW, **options: Any) -> Build:
    """APOLLO at a rank, by default a quarter of the width."""
    return lambda model, rate, seed: make.apollo(model, rank or quarter(model), lr=rate, seed=seed, **options)


def mini(make: type[APOLLOAdamW] = APOLLOAdamW, **options: Any) -> Build:
    """APOLLO-Mini."""
    return lambda model, rate, seed: make.mini(model, lr=rate, seed=seed, **options)


def int8(build: Build) -> Build:
    """Q-APOLLO: the same on int8 weights of the blocks."""
    return lambda model, rate, seed: build(quantize_model(model), rate, seed)


def faster(build: Build, factor: float) -> Build:
    """The same optimizer with a rate of its own for the groups of embeddings and head."""

    def built(model: nn.Module, rate: float, seed: int) -> Any:
        chosen = {weight for name, weight in model.named_parameters() if "embed" in name or "head" in name}
        optimizer = build(model, rate, seed)
        for group in optimizer.param_groups:
            if chosen.issuperset(group["params"]):
                group[RATE_FACTOR] = factor
        return optimizer

    return built


# apollo-torch's scale of 1 leaves its matrices a fifth of "auto"'s rate, and so its dense weights five times as much,
# and GaLore's of 0.25 does alike. With one rate for all, that may decide who is first. Hence the faster ones.
FACTOR = 4.0
FAST = f"embeddings x{FACTOR:g}"
ADAMW, APOLLO, MINI = "AdamW", "APOLLO, rank width/4", "Mini"
FAST_ADAMW, FAST_APOLLO, FAST_MINI = (f"{name}, {FAST}" for name in (ADAMW, APOLLO, MINI))
MUON, ADAFACTOR = "Muon", "Adafactor"
OFFICIAL, GALORE = "apollo-torch, rank width/4", "GaLore, rank width/4"
RANK_8, RANK_1 = "APOLLO, rank 8", "APOLLO, rank 1"
# Each has a sweep of its own, with the same number of runs.
TUNED: dict[str, Method] = {
    ADAMW: Method(adamw),
    FAST_ADAMW: Method(faster(adamw, FACTOR)),
    APOLLO: Method(apollo()),
    FAST_APOLLO: Method(faster(apollo(), FACTOR)),
    MINI: Method(mini()),
    FAST_MINI: Method(faster(mini(), FACTOR)),
    MUON: Method(_muon),
    OFFICIAL: Method(_official, 2e-2),
    GALORE: Method(_galore, 1e-2),
    ADAFACTOR: Method(_adafactor, 4e-2),
    RANK_8: Method(apollo(8)),
    RANK_1: Method(apollo(1)),
    "APOLLO, rank width/4, 8-bit moments": Method(apollo(state_bits=8)),
    "Q-APOLLO, rank width/4": Method(int8(apollo())),
    "Q-Mini": Method(int8(mini())),
}
