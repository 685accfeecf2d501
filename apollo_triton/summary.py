"""What an optimizer will hold and launch, weight by weight, and as a text: ``optimizer.summary()``."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .backends.selection import step_backend, updater_of
from .core.device_backend import Backend
from .core.dtensors import is_dtensor, local
from .core.embeddings import MARK
from .core.kinds import CONVOLUTION_1D, EMBEDDING, HEAD, MATRIX, OTHER, VECTOR, weights_of
from .core.messages import readable_bytes
from .core.module_names import without_indices
from .core.settings import Settings
from .engine.launches import Launches, launches_of
from .engine.step_hooks import StepHooks
from .params.member import CODES, Param, find_shard, params_of
from .params.saving import Counted, advice_on_state
from .params.sharding import LocalShard
from .params.state import MOMENTS, has_begun, state_without_memory

COLUMNS = 60
FROZEN = "frozen"
UNRANKED = "in a group without a rank"
_NO_BACKEND = Backend("none", FROZEN)
_STEP_BYTES = 4  # AdamW's step count is a float32 of the parameter, as ours is
# The lines of the table, in this order.
_LOW_RANK = "low-rank"
_DENSE = {
    MATRIX: "dense matrices",
    EMBEDDING: "embeddings",
    HEAD: "heads",
    OTHER: "others",
    CONVOLUTION_1D: "others",
    VECTOR: "norms, biases",
}
_MOST_NAMES = 5
_LEAST_SHARE = 0.01  # of the state: a dense weight that is worth a line


@dataclass(frozen=True)
class SummaryRow:
    """One weight, under its name or without one under its shape.

    Of a ``DTensor`` ``elements`` and bytes are those of this rank's shard, and ``shape`` is the whole's.
    ``kind`` is one of core/kinds.py: "matrix", "embedding", "head", "norm or bias", "table or convolution" or "1-D
    convolution". ``group`` is the index of the parameter group. ``rank`` is None for a weight that is not low-rank, and
    ``reason`` then says why; it is "" for a low-rank one.

    ``state_bytes`` is the state in full, also before the first step. Its two moments take ``moment_bytes``; the rest is
    a step count, a norm, svd's projection, and what scales 8-bit moments. ``adamw_bytes`` is what ``torch.optim.AdamW``
    would hold, whose moments have the weight's dtype. ``gradient_bytes`` is what a gradient takes while there is one.
    All of them are 0 for a frozen weight.

    ``backend`` has the name of the backend and the reason for it. It is "none" where nothing is updated, and where a
    step would raise the error that is the reason.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    group: int
    rank: int | None
    reason: str
    elements: int
    state_bytes: int = 0
    moment_bytes: int = 0
    adamw_bytes: int = 0
    gradient_bytes: int = 0
    backend: Backend = _NO_BACKEND

    @property
    def label(self) -> str:
        """The line of the table that the weight counts in."""
        return _LOW_RANK if self.rank is not None else FROZEN if self.reason == FROZEN else _DENSE[self.kind]


@dataclass(frozen=True, repr=False)
class Summary:
    """What ``optimizer.summary()`` returns; ``print`` shows it as a text of 60 columns.

    ``rows`` has a row a weight, in the order of the groups. ``launches`` is what the kernels take when every trained
    weight has a gradient: None where they update nothing, and where it depends on the number of tokens
    (``gradients="none"``). ``advice`` is what would save the most, "" where nothing saves much. ``is_sharded``: whether
    it is of this rank's shards. ``is_layerwise``: whether hooks free each gradient within backward.

    >>> import torch
    >>> from apollo_triton import APOLLOAdamW
    >>> weight = torch.nn.Parameter(torch.zeros(64, 32))
    >>> summary = APOLLOAdamW([{"params": [weight], "rank": 4}]).summary()
    >>> summary.state_bytes, summary.adamw_bytes
    (2056, 16388)
    """

    rows: tuple[SummaryRow, ...]
    launches: Launches | None
    advice: str
    is_sharded: bool = False
    is_layerwise: bool = False

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self.rows)

    @property
    def state_bytes(self) -> int:
        return sum(row.state_bytes for row in self.rows)

    @property
    def adamw_bytes(self) -> int:
        return sum(row.adamw_bytes for row in self.rows)

    @property
    def low_rank(self) -> list[SummaryRow]:
        return [row for row in self.rows if row.rank is not None]

    @property
    def dense(self) -> list[SummaryRow]:
        """What is trained with AdamW's moments, which are as large as the weight."""
        return [row for row in self.rows if row.rank is None and row.reason != FROZEN]

    def __str__(self) -> str:
        return "\n".join(_paragraphs(self))

    __repr__ = __str__


def summary_of(
    groups: list[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    reasons: Mapping[Tensor, str],
    hooks: StepHooks | None,
) -> Summary:
    """The summary of an optimizer's groups. ``reasons`` says why weights are dense, as far as that is known.

    Raises ValueError, as a step would, for a group or a sharding that cannot be.
    """
    settings = {index: Settings.of(group, f"parameter group {index}") for index, group in enumerate(groups)}
    params = [*params_of(groups)]
    weights = weights_of((param.name or "weight", param.tensor) for param in params)  # a matrix, where nobody says
    implicit = {param.tensor for param in params if hooks is not None and hooks.takes(param.tensor)}
    updates: Collection[Tensor] = () if hooks is None else hooks.updates
    on_device = any(group.capturable for group in settings.values())
    rows: list[SummaryRow] = []
    trained: list[Counted] = []
    on_kernels: list[tuple[Param, LocalShard]] = []
    for param, weight in zip(params, weights, strict=True):
        tensor, group, known = param.tensor, settings[param.group], reasons.get(param.tensor, "")
        kind = known if known in _DENSE else weight.kind
        row = SummaryRow(param.label, tuple(tensor.shape), kind, param.group, None, FROZEN, local(tensor).numel())
        if tensor.requires_grad or tensor.grad is not None:
            shard, state = find_shard(param, group), states.get(tensor, {})
            is_low_rank = shard.geometry is not None
            sizes = _sizes(state if has_begun(state) else state_without_memory(tensor, group, shard))
            gradient_bytes = row.elements * tensor.element_size()
            reason = known or (VECTOR if kind == VECTOR else UNRANKED)
            if MARK in groups[param.group]:
                reason += f", {MARK}={groups[param.group][MARK]!r}"
            row = replace(
                row,
                rank=group.rank if is_low_rank else None,
                reason="" if is_low_rank else reason,
                state_bytes=sum(sizes.values()),
                moment_bytes=sum(sizes.get(name, 0) for name in (*MOMENTS, *CODES.values())),
                adamw_bytes=2 * gradient_bytes + _STEP_BYTES,
                gradient_bytes=0 if tensor in implicit else gradient_bytes,
                backend=_backend(param, group, state, shard, on_device, tensor in implicit),
            )
            trained.append(Counted(param, kind, is_low_rank, row.state_bytes, tensor in reasons))
            if row.backend.name == "triton":
                on_kernels.append((param, shard))
        rows.append(row)
    is_counted = on_kernels and not implicit
    return Summary(
        rows=tuple(rows),
        launches=launches_of(on_kernels, settings, states, alone=updates) if is_counted else None,
        advice=advice_on_state(trained, settings),
        is_sharded=any(is_dtensor(param.tensor) for param in params),
        is_layerwise=bool(updates),
    )


def _sizes(state: Mapping[str, Any]) -> dict[str, int]:
    """The bytes on this rank of each tensor of a state."""
    return {name: local(value).nbytes for name, value in state.items() if isinstance(value, Tensor)}


def _backend(
    param: Param, settings: Settings, state: Mapping[str, Any], shard: LocalShard, on_device: bool, is_implicit: bool
) -> Backend:
    """What updates the parameter: "none" with the error's text where a step would raise one."""
    try:
        backend = step_backend(param, settings, state, on_device, is_implicit)
    except ValueError as error:
        return Backend("none", str(error))
    return Backend(updater_of(backend, param.tensor, shard), backend.reason)


def _paragraphs(summary: Summary) -> Iterator[str]:
    low_rank = sum(row.elements for row in summary.low_rank)
    of_rank = "of this rank's shards" if summary.is_sharded else "of the parameters"
    yield _fill(
        f"Low-rank: {len(summary.low_rank)} of {len(summary.rows)} weights, "
        f"{low_rank / max(1, summary.elements):.0%} {of_rank}"
    )
    yield ""
    yield from _table(summary)
    wide = any(row.state_bytes > row.adamw_bytes for row in summary.dense)
    yield _fill(
        "State is counted in full, before the first step too. AdamW's moments have the weights' dtype"
        f"{'; here they are float32, which is why dense weights have more state' if wide else ''}."
    )
    if names := [*_dense_names(summary)]:
        yield "\nDense, most state first:"
        yield from names
    yield ""
    yield from _backends(summary)
    yield _fill(_launches(summary))
    if summary.is_layerwise:
        gradients = [row.gradient_bytes for row in summary.rows]
        yield _fill(
            f"Each gradient is freed within backward: together they would take {readable_bytes(sum(gradients))}, the "
            f"largest {readable_bytes(max(gradients))}"
        )
    if summary.advice:
        yield "\n" + _fill(f"To save memory: {summary.advice}")


def _table(summary: Summary) -> Iterator[str]:
    """A line for each kind of weight, and one for all."""
    labels = dict.fromkeys((_LOW_RANK, *_DENSE.values(), FROZEN))
    lines = {label: [row for row in summary.rows if row.label == label] for label in labels}
    cells = [["", "weights", "parameters", "state", "AdamW"]]
    for label, rows in {**lines, "all": summary.rows}.items():
        if rows:
            numbers = f"{len(rows):,}", f"{sum(row.elements for row in rows):,}"
            sizes = [sum(row.state_bytes for row in rows), sum(row.adamw_bytes for row in rows)]
            cells.append([label, *numbers, *map(readable_bytes, sizes)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        yield "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])


def _dense_names(summary: Summary) -> Iterator[str]:
    """The dense weights that hold most of the state, those of all layers together, with their reasons."""
    alike: dict[tuple[str, str], list[int]] = {}
    for row in summary.dense:
        if row.kind != VECTOR:
            alike.setdefault((without_indices(row.name), row.reason), []).append(row.state_bytes)
    least = _LEAST_SHARE * summary.state_bytes
    large = sorted(
        ((sum(sizes), *key, len(sizes)) for key, sizes in alike.items() if sum(sizes) >= least), reverse=True
    )
    for size, name, reason, count in large[:_MOST_NAMES]:
        times = f" ({count})" if count > 1 else ""
        yield _fill(f"- {name}{times}, {readable_bytes(size)}: {reason}", "  ")
    if len(large) > _MOST_NAMES:
        yield f"- {len(large) - _MOST_NAMES} more names"


def _backends(summary: Summary) -> Iterator[str]:
    for backend, count in Counter(row.backend for row in summary.rows if row.reason != FROZEN).items():
        yield _fill(f"Backend {backend.name}, {_weights(count)}: {backend.reason}")


def _launches(summary: Summary) -> str:
    names = {row.backend.name for row in summary.rows}
    if "triton" not in names:
        return "Launches of our kernels: none, PyTorch computes the step"
    if summary.launches is None:
        return "Launches: they depend on the tokens of a batch, since weights are updated without a gradient"
    where = " (within backward)" if summary.is_layerwise else ""
    step, projections = summary.launches
    more = f"; {projections} more when projections are new" if projections else ""
    others = ", and PyTorch's for the rest" if "reference" in names else ""
    return f"Launches of a step{where}: {step}{more}{others}"


def _weights(count: int) -> str:
    return f"{count} weight{'s' * (count != 1)}"


def _fill(text: str, indent: str = "") -> str:
    return textwrap.fill(text, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
