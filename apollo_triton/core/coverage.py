"""Which weights of a model become low-rank, which stay dense, and why: ``apollo_param_groups`` decides by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .dtensors import local
from .geometry import Geometry
from .kinds import CONVOLUTION_1D, EMBEDDING, HEAD, OTHER, VECTOR, Weight, weights_of
from .targets import Targets

# The narrowest width that is projected. Mini's P of a matrix [64, width] has one row, and with a scale of 128 its first
# update is sqrt(128) / |P's part along G| of AdamW's. Of 4,000 seeds each, the share whose first update was over 50
# times AdamW's (random gradients of full rank, and of rank width - 1, as a softmax head's are):
#     width        1        2        3       4      6 and more
#     full rank    18.3 %   2.9 %    0.5 %   0.1 %  none
#     width - 1             13.2 %   2.9 %   0.8 %  none
# At 6 it was over 10 times AdamW's in 10.8 %, at 8 in 3.2 %, at 16 in none. A gradient of rank one has a heavy tail at
# every width, 6.9 % at 8 and 2.2 % at 64; of two classes it always is one, and that head has a width of 2. With a
# factor for each channel it is the rank that decides: at rank 1 4.1 % at 8 and 1.5 % at 64, at rank 2 none from 8 on.
NARROWEST = 8

NOT_TARGETED = "not in target_modules"


@dataclass
class Coverage:
    """What becomes of the weights of a model, by the id of a parameter, each parameter once.

    ``reasons`` has why it stays dense, "" if it is low-rank. ``narrow`` has the widths of targeted weights that stay
    dense since low rank suits them badly. ``missed`` has the ids of weights that could be low-rank and are not
    targeted, without embeddings and heads. ``of_modules`` are the weights as all modules have them, a shared one twice.
    """

    of_modules: list[Weight]
    weights: dict[int, Weight] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    narrow: dict[int, int] = field(default_factory=dict)
    missed: list[int] = field(default_factory=list)

    @property
    def low_rank(self) -> dict[int, str]:
        """The names of the weights that are low-rank."""
        return {key: self.weights[key].name for key, reason in self.reasons.items() if not reason}

    def share(self, keys: Iterable[int]) -> float:
        """The share of these weights in the elements of matrices that are trained, embeddings and heads not counted."""
        return self._elements(keys) / max(1, self._elements([*self.low_rank, *self.narrow, *self.missed]))

    def _elements(self, keys: Iterable[int]) -> int:
        tensors = (self.weights[key].tensor for key in keys)
        return sum(tensor.numel() for tensor in tensors if tensor.requires_grad)


def narrowness(geometry: Geometry, rank: int, proj: str = "random") -> str:
    """Why low rank suits a matrix of this geometry badly, as the end of "it is ..."; "" if it suits it."""
    width, channels = geometry.width, geometry.channels
    if width < rank:
        return f"narrower than rank {rank}"
    stored = rank * width if proj == "svd" else 0  # P
    if 2 * channels * rank + stored >= 2 * channels * width:
        return f"so narrow that rank {rank} saves no state"
    if width < NARROWEST:
        return f"narrower than {NARROWEST}, where a random projection may lose nearly all of a gradient"
    return ""


def coverage(
    source: nn.Module | Iterable[tuple[str, Tensor]], targets: Targets, rank: int, group_keys: dict[str, Any]
) -> Coverage:
    """What becomes of the weights of a model, or of named parameters, at ``rank``."""
    return coverage_of(weights_of(source), targets, rank, group_keys)


def coverage_of(weights: list[Weight], targets: Targets, rank: int, group_keys: dict[str, Any]) -> Coverage:
    """``coverage`` of ``weights_of`` a model or named parameters."""
    for weight in weights:
        if is_lazy(weight.tensor):
            raise ValueError(f"{weight.name} is a lazy module's, without a shape; run a batch through the model first")
    result = Coverage(weights, {id(weight.tensor): weight for weight in reversed(weights)})
    # A weight that two modules share is low-rank if one of them is targeted.
    targeted = {id(weight.tensor): weight for weight in reversed(weights) if targets.takes(weight)}
    for key, first in reversed(result.weights.items()):
        weight = result.weights[key] = targeted.get(key, first)
        result.reasons[key] = reason = _reason(weight, key in targeted, targets, rank, group_keys)
        if reason in (NOT_TARGETED, OTHER):
            result.missed.append(key)
        elif reason and reason != weight.kind and key in targeted:
            result.narrow[key] = _geometry(weight, group_keys).width
    return result


def is_never_low_rank(weight: Weight, targets: Targets) -> bool:
    """Whether no target can make the weight low-rank: a vector, a table of an ``nn.Embedding``, a 1-D convolution."""
    is_table = id(weight.tensor) in targets.roles.tables or (weight.kind == EMBEDDING and weight.module is None)
    return is_table or weight.kind in (VECTOR, CONVOLUTION_1D)


def _reason(weight: Weight, is_targeted: bool, targets: Targets, rank: int, group_keys: dict[str, Any]) -> str:
    """Why a weight stays dense; "" if it is low-rank."""
    # The targets of a user may name a head, or a matrix that is an embedding only by its name. A table is none.
    if is_never_low_rank(weight, targets) or (weight.kind in (EMBEDDING, HEAD) and not is_targeted):
        return weight.kind
    reason = narrowness(_geometry(weight, group_keys), rank, group_keys.get("proj", "random"))
    # AdamW does not train int8 weights, so these are low-rank wherever the rank fits.
    is_int8 = getattr(local(weight.tensor), "needs_low_rank", False) and not reason.startswith("narrower than rank")
    if reason and (is_int8 or group_keys.get("rank_above_width")):
        reason = ""
    if is_targeted or reason:
        return reason
    return weight.kind if weight.kind == OTHER and not targets.is_choice else NOT_TARGETED


def _geometry(weight: Weight, group_keys: dict[str, Any]) -> Geometry:
    return Geometry.of(weight.tensor.shape, group_keys.get("proj_type", "std"))
