"""The optimizers that are compared, each from its own package, and the reason why one cannot run here."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW
from apollo_triton.int8.weight import Int8Weight

from .parameter_sets import Shapes, Weights
from .results_file import version

LEARNING_RATE = 1e-5  # small, so that weights keep an ordinary size over hundreds of steps with the same gradients
MINI: dict[str, Any] = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
# Keys that the official code requires in a group. The values are our defaults.
OFFICIAL_KEYS: dict[str, Any] = {"proj": "random", "proj_type": "std", "update_proj_gap": 200}
# The most multiplications and additions, about, for GaLore's decompositions in one step. There are three such steps, so
# that they take about a minute.
MOST_SVD_FLOP = {"cpu": 1.5e12, "cuda": 7e12}
# Likewise for Muon's products, of which there are as many steps as of any other contender: seconds each would be long.
MOST_PRODUCT_FLOP = {"cpu": 1e12, "cuda": 1.5e14}
INT8_GROUP = 128

Maker = Callable[[Weights, int, dict[str, Any]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contender:
    """An optimizer that takes part.

    ``make`` takes weights, rank and further group keys. ``reads``: how often a step must read the gradient.
    ``refreshes``: some steps make a new projection. ``captured``: a CUDA graph of its step is replayed.
    """

    name: str
    package: str
    make: Maker
    reads: int = 1
    refreshes: bool = False
    captured: bool = False
    needs: str = ""

    def obstacle(self, device: str, shapes: Shapes) -> str | None:
        """Why it cannot run here. None if no reason is known."""
        if version(self.package) is None and self.package != "apollo-triton":
            return f"{self.package} is not installed"
        if self.needs == "cuda" and not device.startswith("cuda"):
            return "it needs a CUDA device"
        if self.needs == "compiler" and not device.startswith("cuda") and shutil.which("g++") is None:
            return "torch.compile needs a C++ compiler on a CPU"
        kind = device.partition(":")[0]
        flop = 20 * sum(max(shape) * min(shape) ** 2 for shape in shapes.matrices)
        if self.needs == "svd" and flop > MOST_SVD_FLOP[kind]:
            return f"the {len(shapes.matrices)} decompositions of its first step, {flop:.0e} operations, take too long"
        if self.needs == "products":
            return self._obstacle_to_products(kind, shapes)
        return None

    def _obstacle_to_products(self, kind: str, shapes: Shapes) -> str | None:
        """Muon's: five times G G^T, its square, and that times G."""
        flop = 5 * sum(4 * max(shape) * min(shape) ** 2 + 2 * min(shape) ** 3 for shape in shapes.matrices)
        if not hasattr(torch.optim, "Muon"):
            return f"torch {torch.__version__} does not have it"
        if shapes.rest:
            return "it takes matrices alone"
        if flop > MOST_PRODUCT_FLOP[kind]:
            return f"the products of a step, {flop:.0e} operations, take too long"
        return None


def _groups(weights: Weights, keys: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [{"params": weights.matrices, **keys}, {"params": weights.rest}]
    return [group for group in groups if group["params"]]


def _ours(mini: bool, **options: Any) -> Maker:
    def make(weights: Weights, rank: int, more: dict[str, Any]) -> torch.optim.Optimizer:
        groups = _groups(weights, (MINI if mini else {"rank": rank}) | more)
        return APOLLOAdamW(groups, lr=LEARNING_RATE, **options)

    return make


def _ours_int8(mini: bool) -> Maker:
    """On int8 weights with the same gradients, rounded stochastically, as ``quantize_model`` makes them."""

    def make(weights: Weights, rank: int, more: dict[str, Any]) -> torch.optim.Optimizer:
        matrices = [nn.Parameter(Int8Weight.of(weight.detach(), INT8_GROUP, True)) for weight in weights.matrices]
        for matrix, weight in zip(matrices, weights.matrices, strict=True):
            matrix.grad = weight.grad
        return _ours(mini)(Weights(matrices, weights.rest), rank, more)

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
    """An optimizer that takes all weights in one group."""

    def make(weights: Weights, rank: int, more: dict[str, Any]) -> torch.optim.Optimizer:
        return getattr(importlib.import_module(module), name)(weights.all, lr=LEARNING_RATE, **options)

    return make


def _adafactor8bit(mini: bool) -> Maker:
    """The other fused APOLLO, with Adam's rules as in its documentation, and its own defaults for the state."""

    def make(weights: Weights, rank: int, more: dict[str, Any]) -> torch.optim.Optimizer:
        method = {"apollo_scale_type": "tensor", "apollo_scale": MINI["scale"]} if mini else {}
        adam = {"beta1": 0.9, "beta2": 0.999, "beta2_decay": None, "eps": (1e-6, 1e-3), "d": 0.0, "factored": False}
        off = dict.fromkeys(("relative_step", "scale_parameter", "scale_weight_decay"), False)
        low_rank = {"apollo_rank": 1 if mini else rank, **method}
        maker = importlib.import_module("adafactor8bit").Adafactor8Bit
        return maker(_groups(weights, low_rank), lr=LEARNING_RATE, **adam, **off)

    return make


def _replayed(name: str, package: str, make: Maker, reads: int = 1) -> Contender:
    return Contender(name, package, make, reads, captured=True, needs="cuda")


OURS = ("APOLLO-Mini", "APOLLO")
CONTENDERS = {
    contender.name: contender
    for contender in (
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
        Contender("PyTorch Muon", "torch", _plain("torch.optim", "Muon"), needs="products"),
        Contender("flashoptim AdamW", "flashoptim", _plain("flashoptim", "FlashAdamW"), needs="cuda"),
        Contender("adafactor8bit, Mini", "adafactor8bit", _adafactor8bit(mini=True), reads=2, needs="cuda"),
        Contender("adafactor8bit, APOLLO", "adafactor8bit", _adafactor8bit(mini=False), reads=2, needs="cuda"),
        Contender("APOLLO-Mini, clipped", "apollo-triton", _ours(mini=True, max_grad_norm=1.0), reads=2),
        Contender("APOLLO, clipped", "apollo-triton", _ours(mini=False, max_grad_norm=1.0), reads=2),
        Contender("APOLLO-Mini, stochastic", "apollo-triton", _ours(mini=True, stochastic_rounding=True), reads=2),
        Contender("APOLLO, stochastic", "apollo-triton", _ours(mini=False, stochastic_rounding=True), reads=2),
        Contender("Q-Mini", "apollo-triton", _ours_int8(mini=True), reads=2),
        Contender("Q-APOLLO", "apollo-triton", _ours_int8(mini=False), reads=2),
        _replayed("APOLLO-Mini, graph replay", "apollo-triton", _ours(mini=True, capturable=True), reads=2),
        _replayed("APOLLO, graph replay", "apollo-triton", _ours(mini=False, capturable=True), reads=2),
        _replayed(
            "PyTorch AdamW, fused, graph replay", "torch", _plain("torch.optim", "AdamW", fused=True, capturable=True)
        ),
    )
}


def state_bytes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of the optimizer's state: of all of it, and of its projections, which a step only reads.

    Tensors inside tensor subclasses and inside other objects of the state count too, each once.
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
        for name, item in value.items():
            yield from _tensors(item, is_projection or name == "projection")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, is_projection)
    elif type(value).__module__.partition(".")[0] in ("apollo_torch", "galore_torch"):
        yield from _tensors(vars(value), True)  # their projectors


def bytes_to_move(contender: Contender, optimizer: torch.optim.Optimizer) -> int:
    """The least bytes of a step: weights and state read and written, gradients and projections read."""
    state, projections = state_bytes(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    own = sum(tensor.nbytes for tensor, _ in _tensors([weight.detach() for weight in weights], False))
    return 2 * own + contender.reads * gradients + 2 * state - projections
