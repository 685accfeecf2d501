"""The optimizers that are compared, each from its own package, with what keeps it from running here, if anything."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apollo_triton import APOLLOAdamW

from .parameter_sets import Shapes, Weights
from .results_file import version

LEARNING_RATE = 1e-5  # small: hundreds of steps with the same gradients must leave numbers of an ordinary size
MINI: dict[str, Any] = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
# What the official code insists on in a group; the values are our defaults.
OFFICIAL_KEYS: dict[str, Any] = {"proj": "random", "proj_type": "std", "update_proj_gap": 200}
# Multiplications and additions, about, of the decompositions of one step that GaLore may cost us here: a minute, for
# there are three such steps.
MOST_SVD_FLOP = {"cpu": 1.5e12, "cuda": 7e12}

Maker = Callable[[Weights, int, dict[str, Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer. ``make`` takes weights, rank and further group keys; ``reads`` says how often a step must read the
    gradient; ``refreshes`` that some steps make a new projection; ``captured`` that a CUDA graph of it is replayed."""

    name: str
    package: str
    make: Maker
    reads: int = 1
    refreshes: bool = False
    captured: bool = False
    needs: str = ""

    def obstacle(self, device: str, shapes: Shapes) -> str | None:
        """Why it cannot run here; None if nothing is known to keep it from it."""
        if version(self.package) is None and self.package != "apollo-triton":
            return f"{self.package} is not installed"
        if self.needs == "cuda" and not device.startswith("cuda"):
            return "it needs a CUDA device"
        if self.needs == "compiler" and not device.startswith("cuda") and shutil.which("g++") is None:
            return "torch.compile needs a C++ compiler on a CPU"
        flop = 20 * sum(max(shape) * min(shape) ** 2 for shape in shapes.matrices)
        if self.needs == "svd" and flop > MOST_SVD_FLOP[device.partition(":")[0]]:
            return f"the {len(shapes.matrices)} decompositions of its first step, {flop:.0e} operations, take too long"
        return None


def _groups(weights: Weights, keys: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [{"params": weights.matrices, **keys}, {"params": weights.rest}]
    return [group for group in groups if group["params"]]


def _ours(mini: bool, **options: Any) -> Maker:
    def make(weights: Weights, rank: int, more: dict[str, Any]) -> torch.optim.Optimizer:
        groups = _groups(weights, (MINI if mini else {"rank": rank}) | more)
        return APOLLOAdamW(groups, lr=LEARNING_RATE, **options)

    return make


def apollo_torch(mini: bool, weights: Weights, rank: int, lr: float, **more: Any) -> torch.optim.Optimizer:
    """The official optimizer: Mini, or APOLLO at ``rank``."""
    keys = MINI if mini else {"rank": rank, "scale_type": "channel", "scale": 1.0}
    official = importlib.import_module("apollo_torch").APOLLOAdamW
    return official(_groups(weights, keys | OFFICIAL_KEYS | more), lr=lr)


def _apollo_torch(mini: bool) -> Maker:
    return lambda weights, rank, more: apollo_torch(mini, weights, rank, LEARNING_RATE, **more)


def _galore(weights: Weights, rank: int, more: dict[str, Any]) -> torch.optim.Optimizer:
    keys = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"} | more
    galore = importlib.import_module("galore_torch").GaLoreAdamW
    return galore(_groups(weights, keys), lr=LEARNING_RATE, no_deprecation_warning=True)


def _plain(module: str, name: str, **options: Any) -> Maker:
    """An optimizer without groups."""

    def make(weights: Weights, rank: int, more: dict[str, Any]) -> torch.optim.Optimizer:
        return getattr(importlib.import_module(module), name)(weights.all, lr=LEARNING_RATE, **options)

    return make


def _replayed(name: str, package: str, make: Maker, reads: int = 1) -> Contender:
    return Contender(name, package, make, reads, captured=True, needs="cuda")


OURS = ("APOLLO-Mini", "APOLLO")
CONTENDERS = {
    each.name: each
    for each in (
        Contender("APOLLO-Mini", "apollo-triton", _ours(mini=True), reads=2, refreshes=True),
        Contender("APOLLO", "apollo-triton", _ours(mini=False), reads=2, refreshes=True),
        Contender("PyTorch SGD, fused", "torch", _plain("torch.optim", "SGD", fused=True)),
        Contender("PyTorch AdamW, fused", "torch", _plain("torch.optim", "AdamW", fused=True)),
        Contender("PyTorch AdamW, foreach", "torch", _plain("torch.optim", "AdamW", foreach=True)),
        Contender("apollo-torch, Mini", "apollo-torch", _apollo_torch(mini=True), reads=2, refreshes=True),
        Contender("apollo-torch", "apollo-torch", _apollo_torch(mini=False), reads=2, refreshes=True),
        Contender("bitsandbytes AdamW8bit", "bitsandbytes", _plain("bitsandbytes.optim", "AdamW8bit")),
        Contender("torchao AdamW8bit", "torchao", _plain("torchao.optim", "AdamW8bit"), needs="compiler"),
        Contender("optimi AdamW, triton", "torch-optimi", _plain("optimi", "AdamW", triton=True), needs="cuda"),
        Contender("GaLore", "galore-torch", _galore, refreshes=True, needs="svd"),
        _replayed("APOLLO-Mini, graph replay", "apollo-triton", _ours(mini=True, capturable=True), reads=2),
        _replayed("APOLLO, graph replay", "apollo-triton", _ours(mini=False, capturable=True), reads=2),
        _replayed(
            "PyTorch AdamW, fused, graph replay", "torch", _plain("torch.optim", "AdamW", fused=True, capturable=True)
        ),
    )
}


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of what the optimizer keeps: all of it, and the projections among it, which a step only reads.

    Tensors inside tensor subclasses and inside other objects of the state count, each once.
    """
    found: dict[int, tuple[int, bool]] = {}
    for value, is_projection in _tensors(dict(optimizer.state), False):
        found[value.data_ptr()] = (value.nbytes, is_projection)
    return sum(size for size, _ in found.values()), sum(size for size, fixed in found.values() if fixed)


def _tensors(value: Any, is_projection: bool) -> Iterator[tuple[Tensor, bool]]:
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _tensors(getattr(value, name), is_projection)
    elif isinstance(value, Tensor):
        yield value, is_projection
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _tensors(each, is_projection or name == "projection")
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each, is_projection)
    elif type(value).__module__.partition(".")[0] in ("apollo_torch", "galore_torch"):
        yield from _tensors(vars(value), True)  # their projectors


def bytes_to_move(contender: Contender, weights: Weights, optimizer: torch.optim.Optimizer) -> int:
    """What a step cannot do without: weights and state read and written, gradients and projections read."""
    state, projections = state_bytes(optimizer)
    gradients = sum(each.grad.nbytes for each in weights.all if each.grad is not None)
    return 2 * weights.bytes + contender.reads * gradients + 2 * state - projections
