"""``embeddings=``: how the state of embeddings and head is kept, by a name, a rank, or keys of a group.

Both are half of a small model, and nearly all of what APOLLO-Mini keeps of any. The argument puts them into groups of
their own, whose keys are these. ``CHOICES`` is the one place that knows the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .messages import shown
from .settings import AUTO, CHECKS, check_value
from .spelling import unknown_option

Embeddings = int | str | Mapping[str, Any] | None  # in this order Lightning's command line makes a number of "16"

# What each name adds to the groups of embeddings and head. Whatever a name leaves open is as for the other weights.
CHOICES: dict[str, dict[str, Any]] = {
    "8bit": {"state_bits": 8},
    "rows": {"second_moment": "row"},
    "rows-8bit": {"second_moment": "row", "state_bits": 8},
}
# The key under which their groups have the argument, so that a checkpoint says how its state was kept.
MARK = "embeddings"
# How moments of dense weights are kept. ``load_state_dict`` converts one into the other.
FORM_KEYS = ("second_moment", "state_dtype", "state_bits", "min_8bit_size")


def checked_embeddings(embeddings: Any) -> str | int | dict[str, Any] | None:
    """The argument, of a mapping a dictionary of its own. Raises ValueError or TypeError for what is not allowed."""
    if isinstance(embeddings, Mapping):
        for name in embeddings:
            if name not in CHECKS:
                raise TypeError(f"{MARK}={shown(dict(embeddings))}: {unknown_option(str(name), CHECKS)}")
        for name, value in embeddings.items():
            check_value(name, value, f"{MARK}={shown(dict(embeddings))}")
    is_rank = isinstance(embeddings, int) and not isinstance(embeddings, bool) and embeddings >= 1
    is_name = isinstance(embeddings, str) and embeddings in CHOICES
    if not (embeddings is None or is_rank or is_name or (isinstance(embeddings, Mapping) and embeddings)):
        is_text = isinstance(embeddings, str) and embeddings.isdigit()
        raise ValueError(
            f"Invalid {MARK}: {shown(embeddings)} (allowed: None, {', '.join(map(repr, CHOICES))}, an integer of 1 or "
            "more, which is a rank, or a mapping of keys of a group)"
            f"{'; it is a string: convert it' if is_text else ''}"
        )
    return dict(embeddings) if isinstance(embeddings, Mapping) else embeddings


def embedding_keys(embeddings: Embeddings) -> dict[str, Any]:
    """The keys of the groups of embeddings and head for a checked argument.

    A rank keeps a factor for each row, whatever the shape: of a table a row is a token.

    >>> embedding_keys("rows")
    {'second_moment': 'row', 'embeddings': 'rows'}
    >>> embedding_keys({"state_dtype": "bfloat16"})
    {'state_dtype': 'bfloat16', 'embeddings': 'state_dtype=bfloat16'}
    """
    if embeddings is None:
        return {}
    if isinstance(embeddings, str):
        return CHOICES[embeddings] | {MARK: embeddings}
    if isinstance(embeddings, int):
        return {"rank": embeddings, "scale": AUTO, "scale_type": "channel", "proj_type": "right", MARK: embeddings}
    # As one text: torch.distributed.checkpoint would take a dictionary in a group apart.
    return {**embeddings, MARK: ", ".join(f"{name}={value}" for name, value in sorted(embeddings.items()))}
