"""``embeddings=``: how the state of embeddings and head is kept, by a name or by keys of a dense group.

Both are half of a small model, and nearly all of what APOLLO-Mini keeps of any. The argument puts them into groups of
their own, whose keys are these. ``CHOICES`` is the one place that knows the names, and ``is_concerned`` the one that
knows which weights go there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .kinds import EMBEDDING, HEAD, has_token_rows
from .messages import shown
from .module_names import is_adapter_name
from .settings import CHECKS, LOW_RANK_DEFAULTS, check_value, complete_group
from .spelling import nearest, unknown_option

Embeddings = str | Mapping[str, Any] | None

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
# What a mapping may have: how moments are kept, and what AdamW does with a group's weights.
KEYS = ("lr", "betas", "eps", "weight_decay", "correct_bias", "stochastic_rounding", *FORM_KEYS)
_LOW_RANK_KEYS = {"rank", *LOW_RANK_DEFAULTS}


def checked_embeddings(embeddings: Any) -> str | dict[str, Any] | None:
    """The argument, of a mapping a dictionary of its own. Raises ValueError or TypeError for what is not allowed."""
    if isinstance(embeddings, Mapping):
        given = f"{MARK}={shown(dict(embeddings))}"
        for name in embeddings:
            if name in _LOW_RANK_KEYS:
                raise ValueError(
                    f"{given}: {name!r} is a key of low-rank groups, and a rank for embeddings and head makes the loss "
                    "5 to 20 % worse (docs/quality.md); leave it out, or name these weights in target_modules, or "
                    "write the groups yourself"
                )
            if name not in CHECKS:
                raise TypeError(f"{given}: {unknown_option(str(name), KEYS)}")
            if name not in KEYS:
                raise ValueError(
                    f"{given}: {name!r} is not for embeddings and head alone (allowed: {', '.join(sorted(KEYS))}); "
                    "give it to the optimizer"
                )
        for name, value in embeddings.items():
            check_value(name, value, given)
    is_name = isinstance(embeddings, str) and embeddings in CHOICES
    if not (embeddings is None or is_name or (isinstance(embeddings, Mapping) and embeddings)):
        near = nearest(embeddings, CHOICES) if isinstance(embeddings, str) else ""
        raise ValueError(
            f"Invalid {MARK}: {shown(embeddings)} (allowed: None, {', '.join(map(repr, CHOICES))}, or a mapping of "
            f"keys of a dense group){f'; did you mean {near!r}?' if near else ''}"
        )
    return dict(embeddings) if isinstance(embeddings, Mapping) else embeddings


def embedding_keys(embeddings: Embeddings) -> dict[str, Any]:
    """The keys of the groups of embeddings and head for a checked argument.

    >>> embedding_keys("rows")
    {'second_moment': 'row', 'embeddings': 'rows'}
    >>> embedding_keys({"state_dtype": "bfloat16"})
    {'state_dtype': 'bfloat16', 'embeddings': 'state_dtype=bfloat16'}
    """
    if embeddings is None:
        return {}
    if isinstance(embeddings, str):
        return CHOICES[embeddings] | {MARK: embeddings}
    keys = dict(embeddings)
    complete_group(keys)  # a dtype and its name are the same argument, which one mark says
    # As one text: torch.distributed.checkpoint would take a dictionary in a group apart.
    return {**keys, MARK: ", ".join(f"{name}={value}" for name, value in sorted(keys.items()))}


def is_concerned(embeddings: Embeddings, kind: str, name: str, tensor: Tensor) -> bool:
    """Whether the argument is about a dense weight: an embedding or a head and, for a second moment a row, one whose
    rows are known to be tokens."""
    return (
        embeddings is not None and is_table(kind, name) and (has_token_rows(name, tensor) or not is_by_row(embeddings))
    )


def is_table(kind: str, name: str) -> bool:
    """Whether a weight is an embedding or a head, and no adapter of one, which is narrow already."""
    return kind in (EMBEDDING, HEAD) and not is_adapter_name(name)


def is_by_row(embeddings: Embeddings) -> bool:
    """Whether a checked argument asks for one second moment a row."""
    return embedding_keys(embeddings).get("second_moment") == "row"
