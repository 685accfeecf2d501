"""Count the exact bytes of weights, gradients and optimizer state, with AdamW, AdamW-8bit and APOLLO.

Nothing is allocated: models are on the meta device, and the shapes come from the optimizer itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ...core.kinds import EMBEDDING, HEAD, MATRIX, OTHER
from ...core.module_names import without_indices
from ...optimizer import APOLLOAdamW
from ...summary import Summary
from ..llama import default_rank, meta_model, named_sizes
from ..text import fill, table
from .count import Memory, adamw, adamw_8bit, apollo_mini, of_summary
from .paper import GB, GIB, Cell, pretraining_cells, state_cells

MOST_NAMES = 6
SMALLEST = 0.005  # a share below is a router or the like, which is not worth a sentence
MANY_CARDS_ONLY = "shard", "layerwise", "int8", "group_size", "state_bits", "tokens", "checkpointing"
COMPARISON_ONLY = "rank", "dtype", "state_dtype", "target_modules"  # options of the comparison of methods


@dataclass(frozen=True)
class Coverage:
    """What of a model is dense, in weights, and the bytes of its state. ``share`` is of the matrices that are neither
    embeddings nor the head, and ``names`` has those of them that stay dense, the largest first and with ``*`` for the
    layers' indices. It is empty where the share is negligible."""

    dense: int
    state: int
    share: float
    names: tuple[str, ...]
    kinds: str

    @classmethod
    def of(cls, summary: Summary) -> Coverage:
        """The coverage of the optimizer that has this summary."""
        sizes: Counter[str] = Counter()  # of the matrices that stay dense, the same matrix of all layers together
        for row in summary.dense:
            if row.kind in (MATRIX, OTHER):
                sizes[without_indices(row.name)] += row.elements
        matrices = sizes.total() + sum(row.elements for row in summary.low_rank)
        share = sizes.total() / max(1, matrices)
        names = [name for name, _ in sizes.most_common()] if share >= SMALLEST else []
        found = {row.kind for row in summary.dense}
        kinds = {"embeddings": EMBEDDING in found, "head": HEAD in found, "other matrices": bool(names)}
        held = ", ".join(name for name, is_held in kinds.items() if is_held)
        dense, state = (sum(getattr(row, part) for row in summary.dense) for part in ("elements", "state_bytes"))
        return cls(dense, state, share, tuple(names), held or "norms and biases")

    @property
    def examples(self) -> str:
        """The first names, and how many more there are."""
        more = len(self.names) - MOST_NAMES
        return ", ".join(self.names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Report:
    """One model's memory with the four methods. ``kind`` is the model's class, ``state_dtype`` APOLLO's moments'
    dtype, ``embeddings`` how it keeps the state of embeddings and head."""

    model: str
    kind: str
    parameters: int
    dtype: str
    state_dtype: str
    rank: int
    coverage: Coverage
    methods: dict[str, Memory]
    embeddings: str | None = None

    @property
    def how(self) -> str:
        """A sentence of ``embeddings``, if it was given."""
        return "" if self.embeddings is None else f" Embeddings and head with embeddings={self.embeddings!r}."


def run(options: argparse.Namespace) -> int:
    """Print what the options ask for, and return 0. Raises ValueError or OSError for a wrong model, rank or option."""
    if not options.single_card:
        _refuse(options, "batch", "sequence", reason="only --single-card runs a step")
    if options.rank is not None and options.rank < 1:
        raise ValueError(f"--rank {options.rank}: it must be an integer of 1 or more")
    if options.gpus is None:
        _refuse(
            options, *MANY_CARDS_ONLY, reason="without --gpus nothing is sharded and no step runs", way_out="add --gpus"
        )
    if options.paper:
        _refuse(
            options,
            "model",
            *COMPARISON_ONLY,
            "embeddings",
            "single_card",
            "gpus",
            reason="--paper has the paper's own settings",
        )
        print(_paper_json() if options.json else _paper_text())
        return 0
    if options.single_card:
        _refuse(options, *COMPARISON_ONLY, "gpus", reason="--single-card has the recipe's own settings")
        return _run_single_card(options)
    if options.gpus is not None:
        return _run_many_cards(options)
    with _notes():
        reports = [_report(model, options) for model in options.model or named_sizes()]
    if options.json:
        print(json.dumps([_as_dict(report) for report in reports], indent=2))
    elif options.model:
        print("\n\n".join(_details(report) for report in reports))
    else:
        print(_summary(reports))
    return 0


def _run_single_card(options: argparse.Namespace) -> int:
    from . import single_card

    shape = {name: getattr(options, name) for name in ("batch", "sequence") if getattr(options, name) is not None}
    if options.embeddings is not None:
        shape |= single_card.OPTIONS | {"embeddings": options.embeddings}
    with _notes():
        counted = [single_card.count(model, **shape) for model in options.model or ["7B"]]
    if options.json:
        print(json.dumps([single_card.as_dict(card) for card in counted], indent=2))
    else:
        print("\n\n".join(single_card.text(card) for card in counted))
    return 0


def _run_many_cards(options: argparse.Namespace) -> int:
    from . import many_cards
    from .sharded import Setup

    _refuse(options, "state_dtype", "target_modules", reason="--gpus has the default moments and matrices")
    if options.gpus < 2:
        raise ValueError(f"--gpus {options.gpus}: it must be 2 or more; leave it out for a single card")
    if options.group_size is not None and not options.int8:
        raise ValueError("only int8 weights have groups: leave out --group-size, or add --int8")
    tokens, group_size = (2048 if options.tokens is None else options.tokens), options.group_size or 128
    if tokens < 1:
        raise ValueError(f"--tokens {tokens}: it must be an integer of 1 or more")
    setup = Setup(
        options.gpus,
        options.shard or "fsdp2",
        options.layerwise,
        options.state_bits or 32,
        options.checkpointing,
        options.rank,
        embeddings=options.embeddings,
    )
    dtype = getattr(torch, options.dtype or "bfloat16")
    with _notes():
        counted = [
            many_cards.count(model, setup, tokens, options.int8, group_size, dtype) for model in options.model or ["7B"]
        ]
    if options.json:
        print(json.dumps([many_cards.as_dict(cards) for cards in counted], indent=2))
    else:
        print("\n\n".join(many_cards.text(cards) for cards in counted))
    return 0


@contextmanager
def _notes() -> Iterator[None]:
    """Print warnings to standard error, each text once and without its line of code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)  # not what libraries deprecate
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"note: {message}", file=sys.stderr)


def _refuse(options: argparse.Namespace, *names: str, reason: str, way_out: str = "") -> None:
    for name in names:
        if getattr(options, name) not in (None, False):
            either = f"{way_out}, or " if way_out else ""
            raise ValueError(f"{reason}: {either}leave out --{name.replace('_', '-')}")


def _report(name: str, options: argparse.Namespace) -> Report:
    dtype, state_dtype = options.dtype or "bfloat16", options.state_dtype or "float32"
    apollo_options: dict[str, Any] = {
        "state_dtype": getattr(torch, state_dtype),
        "embeddings": options.embeddings,
    }
    if options.target_modules:
        targets = options.target_modules
        apollo_options["target_modules"] = targets[0] if targets == ["all-linear"] else targets
    model = meta_model(name, getattr(torch, dtype))
    rank = default_rank(name, _width(model)) if options.rank is None else options.rank
    try:
        summary = APOLLOAdamW.apollo(model, rank, **apollo_options).summary()
        methods = {
            "AdamW": adamw(model),
            "AdamW-8bit": adamw_8bit(model),
            "APOLLO": of_summary(model, summary),
            "APOLLO-Mini": apollo_mini(model, **apollo_options),
        }
    except ValueError as error:
        raise ValueError(f"{name}: {error} (the options are --target-modules, and --rank, here {rank})") from error
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind, coverage = type(model).__name__, Coverage.of(summary)
    return Report(name, kind, parameters, dtype, state_dtype, rank, coverage, methods, options.embeddings)


def _width(model: nn.Module) -> int:
    """The narrower side of the model's widest matrix: of a transformer its hidden size."""
    return max((min(p.shape[-2:]) for p in model.parameters() if p.dim() > 1), default=1)


def _as_dict(report: Report) -> dict[str, Any]:
    methods = {name: asdict(memory) | {"total": memory.total} for name, memory in report.methods.items()}
    return asdict(report) | {"methods": methods}


def _details(report: Report) -> str:
    """The table of exact bytes, with one column per method."""
    names = [f"APOLLO r={report.rank}" if name == "APOLLO" else name for name in report.methods]
    memories = list(report.methods.values())
    rows = [["bytes", *names]]
    for part in ("weights", "gradients", "moments", "other", "total"):
        rows.append([part, *(f"{getattr(memory, part):,}" for memory in memories)])
    rows.append(["total, GB", *(f"{memory.total / GB:.3f}" for memory in memories)])
    coverage = report.coverage
    share = coverage.state / memories[-1].state if memories[-1].state else 0.0
    dtype = f", in {report.state_dtype}" if report.embeddings is None else ""
    sentence = (
        f"GB = 1e9 bytes. State alone: {memories[0].state / GB:.3f} GB with AdamW, whose moments are {report.dtype} "
        f"like the weights; {memories[-1].state / GB:.3f} GB with APOLLO-Mini{dtype}, "
        f"{'nearly all' if share > 0.9 else f'{share:.0%}'} of it for what is not projected ({coverage.kinds})."
    )
    sentence += report.how
    if report.dtype == "bfloat16" and report.state_dtype == "float32" and memories[-1].state > memories[0].state:
        sentence += " That is more: --state-dtype bfloat16 halves APOLLO's."
    if coverage.names:
        sentence += (
            f" Of the matrices that are neither embeddings nor the head, {coverage.share:.0%} of the weights stay "
            f"dense with APOLLO: {coverage.examples}. --target-modules chooses others."
        )
    title = f"{report.model}: {report.kind}, {report.parameters:,} parameters in {report.dtype}"
    return "\n".join([fill(title), "", table(rows), "", fill(sentence)])


def _summary(reports: Sequence[Report]) -> str:
    """The table of totals in GB, with one line per model."""
    rows = [["GB", "weights", "rank", *reports[0].methods]]
    for report in reports:
        totals = [f"{memory.total / GB:.2f}" for memory in report.methods.values()]
        rows.append([report.model, f"{report.methods['AdamW'].weights / GB:.2f}", str(report.rank), *totals])
    sentence = (
        f"Weights, gradients and optimizer state in GB (1e9 bytes): weights and AdamW's moments in {reports[0].dtype}, "
        f"APOLLO's moments in {reports[0].state_dtype}.{reports[0].how} Activations come on top. Exact bytes: --model "
        "7B; the paper's "
        "figures: --paper."
    )
    return "\n".join([table(rows), "", fill(sentence)])


def _paper_text() -> str:
    parts = pretraining_cells(), state_cells()
    tables = []
    for cells in parts:
        rows = [["", "size", "paper", "GB", "GiB", ""]]
        rows += [[c.method, c.size, c.printed, c.digits(GB), c.digits(GIB), _verdict(c)] for c in cells]
        tables.append(table(rows, left=(0, 5), keys=2))
    everything = [cell for cells in parts for cell in cells]
    reproduced = sum(bool(cell.reproduced) for cell in everything)
    sentence = (
        f"{reproduced} of {len(everything)} figures have the printed digits, in the unit given (GB = 1e9 bytes, GiB = "
        "2**30). Counted: all weights, and the moments of the projected matrices, but not those of embeddings, head "
        "and norms. For the other figures, the last column says how many weights they stand for, or what they leave "
        "for the states beside the exact GB without and with those dense moments. Why: docs/memory.md."
    )
    titles = "Weights and optimizer state in bfloat16 (arXiv 2412.05270, table 2)", "Optimizer state alone (table 3)"
    return "\n".join([fill(titles[0]), "", tables[0], "", fill(titles[1]), "", tables[1], "", fill(sentence)])


def _verdict(cell: Cell) -> str:
    return f"= {cell.reproduced}" if cell.reproduced else cell.note


def _paper_json() -> str:
    cells = [*pretraining_cells(), *state_cells()]
    return json.dumps([asdict(cell) | {"reproduced": cell.reproduced} for cell in cells], indent=2)
