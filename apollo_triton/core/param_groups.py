"""``apollo_param_groups``: a model's parameters as groups: low-rank, dense, head, embeddings, norms and biases."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .coverage import Coverage, coverage
from .coverage_notes import no_match, notes
from .embeddings import MARK, Embeddings, checked_embeddings, embedding_keys, is_by_row, is_concerned, is_table
from .kinds import EMBEDDING, HEAD, VECTOR, Weight
from .messages import listed, shown, warn
from .settings import AUTO, CHECKS, LOW_RANK_DEFAULTS, check_value
from .spelling import SPLIT_KEYS, unknown_option
from .targets import DEFAULT_TARGETS, Targets

# The names of groups, in their order. Without ``embeddings=`` the head is in the dense one. Its own group stands where
# that one would, so that the parameters of most models keep their order, by which ``torch.optim`` keeps state.
# "other embeddings" are those that the argument is not about.
LOW_RANK, DENSE, HEADS, EMBEDDINGS = "low-rank", "dense", "head", "embeddings"
OTHER_EMBEDDINGS, VECTORS = "other embeddings", "norms and biases"


def chosen_scale(proj: str) -> float | str:
    """The ``scale`` of the groups that the package makes, with which AdamW's learning rate carries over. Groups that a
    user writes have the paper's default of 1. So has svd, for which there is no "auto"."""
    return 1.0 if proj == "svd" else AUTO


@dataclass(frozen=True)
class DenseKeys:
    """What groups of dense weights have of their own: learning rates, no decay of norms and biases, and how the state
    of embeddings and head is kept.

    Raises ValueError for a value or key that is not allowed, and TypeError for an unknown key in ``embeddings``.
    """

    dense_lr: float | Tensor | None = None
    embedding_lr: float | Tensor | None = None
    decay_vectors: bool = False
    embeddings: Embeddings = None

    def __post_init__(self) -> None:
        for name in ("dense_lr", "embedding_lr"):
            if getattr(self, name) is not None:
                check_value("lr", getattr(self, name), name)
        if not isinstance(self.decay_vectors, bool):
            raise ValueError(f"Invalid decay_vectors: {self.decay_vectors!r} (allowed: True or False)")
        object.__setattr__(self, "embeddings", checked_embeddings(self.embeddings))
        if isinstance(self.embeddings, dict) and "lr" in self.embeddings and self.embedding_lr is not None:
            raise ValueError(
                f"embedding_lr={shown(self.embedding_lr)} and embeddings={shown(self.embeddings)} both give a learning "
                "rate; leave one out"
            )

    def of(self, group: str) -> dict[str, Any]:
        """The keys of the group of this name."""
        lr = self.dense_lr
        if group in (EMBEDDINGS, OTHER_EMBEDDINGS) and self.embedding_lr is not None:
            lr = self.embedding_lr
        keys: dict[str, Any] = {} if lr is None else {"lr": lr}
        if group in (HEADS, EMBEDDINGS):
            keys |= embedding_keys(self.embeddings)
        return keys | ({"weight_decay": 0.0} if group == VECTORS and not self.decay_vectors else {})

    def takes(self, weight: Weight) -> bool:
        """Whether ``embeddings=`` is about a dense weight."""
        return is_concerned(self.embeddings, weight.kind, weight.name, weight.tensor)

    def notes(self, found: Coverage, of_names: bool) -> Iterator[str]:
        """What to say of arguments about embeddings and head that do less than they say. ``of_names``: names are all
        that is known."""
        dense = [found.weights[key] for key, reason in found.reasons.items() if reason]
        elsewhere = [name for key, name in found.low_rank.items() if found.weights[key].kind in (EMBEDDING, HEAD)]
        by_name = " by its name" if of_names else ""
        if self.embedding_lr is not None and not any(weight.kind == EMBEDDING for weight in dense):
            yield f"embedding_lr={self.embedding_lr!r} has no effect: no dense weight is an embedding{by_name}"
        if self.embeddings is None:
            return
        unlike = [weight for weight in dense if self._has_unknown_rows(weight)]
        if not elsewhere and not unlike and not any(map(self.takes, dense)):
            of_rows = " of more than one row" if is_by_row(self.embeddings) else ""
            yield (
                f"embeddings={shown(self.embeddings)} has no effect: no weight is an embedding or a head"
                f"{of_rows}{by_name}"
            )
        if names := [weight.name for weight in unlike if weight.tensor.requires_grad]:
            keys = {name: value for name, value in embedding_keys(self.embeddings).items() if name != MARK}
            yield (
                f"embeddings={shown(self.embeddings)} has no effect on {listed(names, 3)}: only rows of a matrix "
                "called 'weight' are sure to be tokens, as those of nn.Embedding and nn.Linear; if rows of these are "
                f"tokens too, put them into a group of their own with {shown(keys)}"
            )
        if elsewhere:
            yield (
                f"embeddings={shown(self.embeddings)} has no effect on {listed(elsewhere, 3)}, which target_modules "
                "makes low-rank with the matrices; take them out of target_modules to keep them dense"
            )

    def _has_unknown_rows(self, weight: Weight) -> bool:
        """Whether ``embeddings=`` asks for a second moment a row, and passes over rows of a dense embedding or head."""
        is_passed_over = is_table(weight.kind, weight.name) and not self.takes(weight)
        return is_by_row(self.embeddings) and is_passed_over and weight.tensor.dim() > 1 and weight.tensor.shape[0] > 1


def apollo_param_groups(
    model: nn.Module,
    rank: int = 256,
    target_modules: str | Iterable[str] = DEFAULT_TARGETS,
    *,
    dense_lr: float | Tensor | None = None,
    embedding_lr: float | Tensor | None = None,
    decay_vectors: bool = False,
    embeddings: Embeddings = None,
    **group_keys: Any,
) -> list[dict[str, Any]]:
    """A parameter group with a ``rank`` of the targeted weights of ``model``, and up to five more of the others.

    Args:
        model: any module.
        rank: the rank of the low-rank group.
        target_modules: which weights are low-rank. "auto": every matrix of the blocks, whatever it is called, as
            ``core/kinds.py`` tells it from embeddings, heads, norms, tables and convolutions. Or, as in the Hugging
            Face Trainer, a list of substrings or regular expressions of module names (a regular expression must match
            the whole name); one regular expression; or "all-linear" for every ``nn.Linear`` and transformers
            ``Conv1D`` except the head. A list may have "auto" or "all-linear" in it.
        dense_lr: the learning rate of all dense groups, if it is not the optimizer's.
        embedding_lr: the learning rate of the embeddings, if it is not ``dense_lr``.
        decay_vectors: whether norms and biases decay too. Else their group has a ``weight_decay`` of 0.
        embeddings: how the state of embeddings and head is kept. None: as that of all that is dense. "8bit": both
            moments in 8 bits. "rows": one second moment for each row, a token's. "rows-8bit": that, and the first
            moment in 8 bits. These two are for matrices called ``weight``, and a warning names what else there is. A
            mapping has keys of a dense group, e.g. ``{"state_dtype": "bfloat16"}``. A rank is refused: it makes the
            loss 5 to 20 % worse.
        group_keys: further keys of the low-rank group, e.g. ``scale_type="tensor"``. ``scale`` is "auto" unless given,
            or 1 for ``proj="svd"``.

    Returns groups under the names, in ``group["name"]``, "low-rank", "dense" (the head, what is too narrow, what is not
    targeted), "embeddings", and "norms and biases". With ``embeddings`` the head is in a group "head", before that of
    the embeddings, and ``group["embeddings"]`` of both has the argument. Embeddings that it is not about are in "other
    embeddings" then, and such a head is in "dense". A group without parameters is left out.

    The low-rank weights of a module that is named are its own parameters of two or more dimensions, including expert
    tensors ``[experts, rows, columns]``. Biases (also tables of them), norms, embeddings, 1-D convolutions and
    everything else stay dense. So does a targeted weight that is narrower than ``rank`` or than 8, or whose state would
    be no smaller than AdamW's: a mixture's router, a small key projection, a layer of one output.
    ``rank_above_width=True`` makes it low-rank all the same.

    Warns of a named weight that is too narrow, of an entry of a list that makes nothing low-rank, and if "auto" or
    "all-linear" leaves over a tenth of the matrices dense. Raises TypeError if ``model`` is not a module, or for an
    unknown group key. Raises ValueError for a bad regular expression or value, if no weight matches, and if every
    targeted weight is too narrow.

    >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64), "norm": nn.LayerNorm(64)})
    >>> for group in apollo_param_groups(model, rank=8, dense_lr=1e-3):
    ...     print(group["name"], group["param_names"], group.get("lr"))
    low-rank ['mlp.weight'] None
    norms and biases ['mlp.bias', 'norm.weight', 'norm.bias'] 0.001
    >>> model = nn.ModuleDict({"embed": nn.Embedding(100, 64), "mlp": nn.Linear(64, 64, bias=False)})
    >>> [group["name"] for group in apollo_param_groups(model, rank=8, embeddings="rows")]
    ['low-rank', 'embeddings']
    """
    dense = DenseKeys(dense_lr, embedding_lr, decay_vectors, embeddings)
    return groups_of_model(model, rank, target_modules, dense, group_keys)[0]


def groups_of_model(
    model: nn.Module, rank: int, target_modules: str | Iterable[str], dense: DenseKeys, group_keys: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[Tensor, str]]:
    """The groups of ``apollo_param_groups``, and why each of the dense weights is dense."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            "APOLLOAdamW.apollo, .mini and apollo_param_groups need the model itself, an nn.Module, not "
            f"{type(model).__name__}: give model in place of model.parameters(). Where there are only parameters, use "
            "APOLLOAdamW(model.named_parameters(), rank=...)"
        )
    for name in group_keys:
        if name not in CHECKS:
            raise TypeError(f"apollo_param_groups: {unknown_option(name, [*CHECKS, *SPLIT_KEYS])}")
    if rank is None:
        raise ValueError("Invalid rank: None (allowed: an integer of 1 or more)")
    for name, value in ({"rank": rank} | group_keys).items():
        check_value(name, value)
    group_keys = {"scale": chosen_scale(group_keys.get("proj", LOW_RANK_DEFAULTS["proj"]))} | group_keys
    targets = Targets(model, target_modules)
    found = coverage(model, targets, rank, group_keys)
    if not found.low_rank:
        raise ValueError(no_match(targets, rank, group_keys, found))
    for note in (*notes(targets, found), *dense.notes(found, of_names=False)):
        warn(note)
    groups = split_by_kind(list(model.named_parameters()), found, {"rank": rank} | group_keys, dense)
    return groups, dense_reasons(found)


def split_by_kind(
    named: Sequence[tuple[str, Tensor]], found: Coverage, low_rank_keys: dict[str, Any], dense: DenseKeys
) -> list[dict[str, Any]]:
    """Named parameters as groups: low-rank, dense, head, embeddings, other embeddings, norms and biases, in this
    order."""
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "param_names": [], "name": name} | (low_rank_keys if name == LOW_RANK else dense.of(name))
        for name in (LOW_RANK, DENSE, HEADS, EMBEDDINGS, OTHER_EMBEDDINGS, VECTORS)
    }
    for name, parameter in named:
        group = groups[_group_of(parameter, found, dense)]
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [group for group in groups.values() if group["params"]]


def _group_of(parameter: Tensor, found: Coverage, dense: DenseKeys) -> str:
    weight = found.weights[id(parameter)]
    if not found.reasons[id(parameter)]:
        return LOW_RANK
    if weight.kind == EMBEDDING:
        return EMBEDDINGS if dense.embeddings is None or dense.takes(weight) else OTHER_EMBEDDINGS
    if weight.kind == HEAD and dense.takes(weight):
        return HEADS
    return VECTORS if weight.kind == VECTOR else DENSE


def dense_reasons(found: Coverage) -> dict[Tensor, str]:
    """Why each dense weight is dense."""
    return {found.weights[key].tensor: reason for key, reason in found.reasons.items() if reason}
