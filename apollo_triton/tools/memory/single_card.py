"""Predicts, part by part, the memory of the recipe that trains on one small card.

The recipe is ``examples/pretrain_c4.py --config 7b_one_card``: int8 weights without gradients, APOLLO-Mini, layer-wise
updates of the others and checkpointed decoder layers. ``apollo-triton memory --single-card`` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...backends.reference import dense_8bit
from ...core.embeddings import Embeddings
from ...core.targets import DEFAULT_TARGETS, Targets
from ...int8.layers import quantize_model
from ...int8.weight import Int8Weight
from ..llama import meta_model
from ..text import fill, table
from .activations import training_peak
from .count import apollo_mini
from .paper import GB

OPTIONS: dict[str, Any] = {"state_bits": 8}  # of APOLLOAdamW.mini, in the recipe
CARDS = 11, 12  # GB of the small cards that the recipe is for


@dataclass(frozen=True)
class SingleCard:
    """Bytes at the peak of a step, for tokens of shape ``[batch, sequence]``. Each byte is in one of ``parts``.
    ``embeddings`` is that of ``APOLLOAdamW.mini``, if it is not the recipe's."""

    model: str
    batch: int
    sequence: int
    dtype: str
    parts: dict[str, int]
    embeddings: Embeddings = None

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def count(
    model: str, batch: int = 1, sequence: int = 256, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> SingleCard:
    """Predict the peak of the recipe on a CUDA device.

    Args:
        model: as in ``meta_model``.
        batch, sequence: the shape of a step's tokens.
        dtype: the dtype of activations, gradients, and weights that are not int8.
        options: options of ``APOLLOAdamW.mini``, instead of ``OPTIONS``.

    Raises ValueError or OSError for a wrong model or shape, as ``meta_model``, ``training_peak`` and ``quantize_model``
    do.

    >>> count("7B", batch=1, sequence=256).total  # doctest: +SKIP
    8266366988
    """
    traced = meta_model(model, dtype)
    targets = Targets(traced, DEFAULT_TARGETS)
    names = [name for name, module in traced.named_modules() if targets.match(name, module)]
    layers = [name for name in names if isinstance(traced.get_submodule(name), torch.nn.Linear)]
    peak = training_peak(traced, batch, sequence, without_gradient=layers)
    trained = quantize_model(traced)
    int8 = [weight for weight in trained.parameters() if isinstance(weight, Int8Weight)]
    others = [weight for weight in trained.parameters() if not isinstance(weight, Int8Weight)]
    state = apollo_mini(trained, **(options or OPTIONS)).state
    for weight in int8:
        weight.requires_grad_(False)
    dense_state = apollo_mini(trained, **(options or OPTIONS)).state
    parts = {
        "int8 weights": sum(weight.q.nbytes for weight in int8),
        "their scales and zero points": sum(weight.scale.nbytes + weight.zero.nbytes for weight in int8),
        "other weights": sum(weight.nbytes for weight in others),
        "optimizer state of int8 weights": state - dense_state,
        "optimizer state of the others": dense_state,
        "gradients of weights at the peak": peak.gradients,
        "activations kept by the forward": peak.saved,
        "activations of the backward": peak.working,
        "in passing, by an update": dense_8bit.PASSING,
    }
    return SingleCard(model, batch, sequence, str(dtype).removeprefix("torch."), parts, options.get("embeddings"))


def rows(counted: SingleCard) -> list[list[str]]:
    """Name, bytes and GB (1e9 bytes) of each part and of the total, as text."""
    sizes = counted.parts | {"total": counted.total}
    return [[name, f"{size:,}", f"{size / GB:.3f}"] for name, size in sizes.items()]


def text(counted: SingleCard) -> str:
    """The table of ``apollo-triton memory --single-card``, and which cards the recipe fits."""
    title = (
        f"{counted.model}: a step of {counted.batch} x {counted.sequence} tokens in {counted.dtype}, int8 weights "
        "without gradients, APOLLO-Mini, layer-wise updates, checkpointed layers"
        f"{'' if counted.embeddings is None else f', embeddings={counted.embeddings!r}'}"
    )
    verdicts = [_verdict(counted.total, card) for card in CARDS]
    sentence = (
        f"GB = 1e9 bytes. {' '.join(verdicts)} What is left is for the CUDA context, cuBLAS' workspaces and gaps "
        "between allocations, which are not counted."
    )
    shown = table([["", "bytes", "GB"], *rows(counted)])
    return "\n".join([fill(title), "", shown, "", fill(sentence)])


def as_dict(counted: SingleCard) -> dict[str, Any]:
    """What ``--json`` prints, all sizes in bytes."""
    shape = {"model": counted.model, "batch": counted.batch, "sequence": counted.sequence, "dtype": counted.dtype}
    if counted.embeddings is not None:
        shape["embeddings"] = counted.embeddings
    return shape | {"parts": counted.parts, "total": counted.total}


def _verdict(total: int, card: int) -> str:
    left = card * GB - total
    return f"Leaves {left / GB:.2f} of {card} GB." if left >= 0 else f"Does not fit {card} GB."
