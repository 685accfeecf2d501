"""``apollo-triton memory --gpus N``: what each card holds, part by part, and what a step sends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...int8.layers import quantize_model
from ...int8.weight import Int8Weight
from ..llama import meta_model
from ..text import as_bytes, fill, table
from .paper import GB
from .sharded import Setup, predicted

GIB = 2**30
# What PyTorch can have of a card. Taken, not measured: cards of one name differ by some tenths of a GiB.
REPORTED = {24: int(23.5 * GIB), 80: 79 * GIB}
# For what is not counted: the CUDA context, NCCL's buffers, cuBLAS' workspaces, gaps between allocations.
RESERVE = int(1.5 * GIB)
CARDS = {size: reported - RESERVE for size, reported in REPORTED.items()}  # bytes for training, by the card's name
_NAMES = {"fsdp2": "FSDP2", "hsdp": "HSDP with two replicas", "tp": "tensor parallelism"}


@dataclass(frozen=True)
class ManyCards:
    """Bytes on the card that holds most, at the peak of a step with one sequence of ``tokens`` a card.

    Each byte is in one of ``parts``. ``exchanges`` and ``received`` are the collectives of a step and the bytes that
    they bring to a card: of the "model", for weights, gradients and activations, and of the "update".
    """

    model: str
    tokens: int
    dtype: str
    int8: bool
    setup: Setup
    parts: dict[str, int]
    exchanges: dict[str, int]
    received: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def count(
    model: str,
    setup: Setup,
    tokens: int = 2048,
    int8: bool = False,
    group_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> ManyCards:
    """Predict the peak of a step on a CUDA device.

    Args:
        model: as in ``meta_model``.
        setup: how it is sharded and trained.
        tokens: of the sequence that each card has. Under tensor parallelism all cards have the same.
        int8, group_size: whether ``quantize_model`` makes its matrices int8, in groups of so many weights.
        dtype: that of weights that are not int8, of gradients and of activations.

    Raises ValueError or OSError, as ``meta_model``, ``quantize_model`` and ``predicted`` do.

    >>> count("70B", Setup(8, layerwise=True, checkpointing=True), int8=True).total  # doctest: +SKIP
    """
    made = meta_model(model, dtype)
    if int8:
        quantize_model(made, group_size=group_size)
    result = predicted(made, setup, 1, tokens)
    return ManyCards(
        model,
        tokens,
        str(dtype).removeprefix("torch."),
        any(isinstance(weight, Int8Weight) for weight in made.parameters()),
        setup,
        *result,
    )


def method(counted: ManyCards) -> str:
    """What trains, with its savings.

    >>> method(ManyCards("7B", 1, "bfloat16", True, Setup(2, layerwise=True), {}, {}, {}))
    'APOLLO-Mini, layer-wise updates, int8 weights'
    """
    setup = counted.setup
    name = "AdamW" if setup.adamw else "APOLLO-Mini" if setup.rank is None else f"APOLLO of rank {setup.rank}"
    savings = {
        "layer-wise updates": setup.layerwise,
        "int8 weights": counted.int8,
        "8-bit moments": setup.state_bits == 8,
        "checkpointed layers": setup.checkpointing,
        f"embeddings={setup.embeddings!r}": setup.embeddings is not None,
    }
    return ", ".join([name, *(saving for saving, is_on in savings.items() if is_on)])


def text(counted: ManyCards) -> str:
    """The table of parts, which cards it fits, and what a step receives."""
    setup = counted.setup
    title = (
        f"{counted.model} on {setup.gpus} GPUs with {_NAMES[setup.shard]}: {method(counted)}. A step of 1 x "
        f"{counted.tokens} tokens {'on all cards together' if setup.shard == 'tp' else 'a card'}, in {counted.dtype}"
    )
    sizes = counted.parts | {"total": counted.total}
    rows = [["", "bytes", "GB"], *([part, f"{size:,}", f"{size / GB:.3f}"] for part, size in sizes.items())]
    verdicts = " ".join(_verdict(counted.total, card) for card in CARDS)
    sentence = (
        f"GB = 1e9 bytes, on the card that holds most. {verdicts} {RESERVE / GIB:.1f} GiB of a card are kept for what "
        "is not counted: the CUDA context, NCCL's buffers, cuBLAS' workspaces and gaps between allocations."
    )
    received, exchanges = counted.received, counted.exchanges
    sent = (
        f"In a step a card receives {as_bytes(received['model'])} in {exchanges['model']} exchanges by "
        f"{'tensor parallelism' if setup.shard == 'tp' else 'FSDP2'}, and {as_bytes(received.get('update', 0))} in "
        f"{exchanges.get('update', 0)} by updates."
    )
    return "\n".join([fill(title), "", table(rows), "", fill(sentence), "", fill(sent)])


def as_dict(counted: ManyCards) -> dict[str, Any]:
    """What ``--json`` prints, all sizes in bytes."""
    return asdict(counted) | {
        "total": counted.total,
        "fits": {str(card): counted.total <= CARDS[card] for card in CARDS},
    }


def _verdict(total: int, card: int) -> str:
    left = CARDS[card] - total
    return f"It fits cards of {card} GB, with {left / GB:.1f} GB left." if left >= 0 else f"It does not fit {card} GB."
