"""Which runs the study needs next, stage by stage, from the rows that are there.

1. "sweep": each tuned method on a fifth of the tokens, ``SWEEP_RUNS`` rates, seed 0.
2. "full": each tuned method at its best rate on all tokens, three seeds.
3. "embeddings": Mini with other state of embeddings and head, at three vocabularies, three seeds.
4. "limiter" and 5. "refresh": what they change, three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ..results_file import Row
from .methods import APOLLO, EMBEDDINGS, LIMITERS, MINI, MOMENTUM_HEADS, REFRESHES, TUNED, varied
from .run import Job

SEEDS = (0, 1, 2)
VOCABULARY = 2048
VOCABULARIES = (256, 2048, 8192)
SWEEP_RUNS = 5  # of each method: three around the best rate, a factor of 2 apart, and two between
MOST_SWEEP_RUNS = 9  # of a method whose best rate was guessed badly
STAGES = ("sweep", "full", "embeddings", "limiter", "refresh")
# Variants that also run to the end, because a fifth of the tokens says little about what they are for.
FULL_VARIANTS = (f"{MINI}, embeddings by row", f"{MINI}, embeddings by row, 8-bit", f"{MINI}, embeddings 8-bit")

Found = Mapping[float, float]  # losses by log2 of the rate over the first one


def next_index(found: Found) -> float | None:
    """Where a sweep goes next, in log2 of the first rate; None once it has a worse rate on each side and enough runs.

    >>> next_index({}), next_index({0: 2.1}), next_index({0: 2.1, 1: 2.0}), next_index({0: 2.1, 1: 2.2})
    (0.0, 1, 2, -1)
    >>> next_index({0: 2.1, 1: 2.2, -1: 2.4}), next_index({0: 2.1, 1: 2.2, -1: 2.4, 0.5: 2.15})
    (0.5, -0.5)
    """
    if not found:
        return 0.0
    best = min(found, key=lambda index: found[index])
    if len(found) >= MOST_SWEEP_RUNS:
        return None
    if best == max(found):
        return best + 1
    if best == min(found):
        return best - 1
    if len(found) >= SWEEP_RUNS:
        return None
    below, above = max(i for i in found if i < best), min(i for i in found if i > best)
    nearer = (above, below) if found[above] <= found[below] else (below, above)
    between = [(best + neighbour) / 2 for neighbour in nearer if abs(best - neighbour) == 1]
    return between[0] if between else (best + nearer[0]) / 2


def best_index(found: Found) -> float | None:
    """The index of the best rate of a finished sweep; None of an unfinished one."""
    return min(found, key=lambda index: found[index]) if found and next_index(found) is None else None


def rate_at(method: str, index: float) -> float:
    """The rate of a sweep's index."""
    return rate_of(TUNED[method].first_rate, index)


def rate_of(first_rate: float, index: float) -> float:
    """The rate of an index, of three digits, so that names stay short."""
    return float(f"{first_rate * 2.0**index:.3g}")


def index_of(first_rate: float, rate: float) -> float:
    """The index of a rate that ``rate_of`` gave, in quarters.

    >>> index_of(5e-3, rate_of(5e-3, -1.25))
    -1.25
    """
    return round(4 * math.log2(rate / first_rate)) / 4


def loss_of(row: Row) -> float:
    """A run's loss. Divergence counts as worse than anything."""
    loss = row["held_out_loss"]
    return math.inf if loss is None else loss


def sweep_of(rows: Iterable[Row], method: str, model: str) -> dict[float, float]:
    """The losses of a method's sweep."""
    found = {}
    for row in rows:
        of_sweep = (method, "fifth", 0, model, VOCABULARY)
        if tuple(row[key] for key in ("method", "length", "seed", "model", "vocabulary")) == of_sweep:
            found[index_of(TUNED[method].first_rate, row["rate"])] = loss_of(row)
    return found


def best_rate(rows: Iterable[Row], method: str, model: str) -> float | None:
    """The best rate of a method, or of what a variant varies; None while its sweep is unfinished."""
    base = varied(method)
    index = best_index(sweep_of(rows, base, model))
    return None if index is None else rate_at(base, index)


def jobs(stage: str, rows: Iterable[Row], template: Job) -> Iterator[Job]:
    """The runs of a stage that can be told from ``rows``, in their order. ``template`` has model and batch."""
    rows = list(rows)
    for method, length, vocabularies, seeds in _runs(stage, rows, template):
        if stage == "sweep":
            index = next_index(sweep_of(rows, method, template.model))
            rate = None if index is None else rate_at(method, index)
        else:
            rate = best_rate(rows, method, template.model)
        if rate is not None:
            for seed in seeds:
                for vocabulary in vocabularies:
                    yield replace(template, method=method, rate=rate, length=length, seed=seed, vocabulary=vocabulary)


def _runs(stage: str, rows: list[Row], template: Job) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """Method, length, vocabularies and seeds."""
    usual = (VOCABULARY,)
    if stage == "sweep":
        yield from ((method, "fifth", usual, (0,)) for method in TUNED)
    elif stage == "full":
        yield from ((method, "full", usual, (seed,)) for seed in SEEDS for method in (*TUNED, *FULL_VARIANTS))
    elif stage == "embeddings":
        yield from ((method, "fifth", usual, (0,)) for method in MOMENTUM_HEADS)
        heads = [best] if (best := best_momentum_head(rows, template)) else []
        yield from (
            (method, "fifth", VOCABULARIES, (seed,)) for seed in SEEDS for method in (MINI, *EMBEDDINGS, *heads)
        )
    elif stage == "limiter":
        yield from ((method, "fifth", usual, SEEDS) for method in (APOLLO, MINI, *LIMITERS))
    else:
        yield from ((method, "half", usual, (seed,)) for seed in SEEDS for method in (APOLLO, MINI, *REFRESHES))


def best_momentum_head(rows: Iterable[Row], template: Job) -> str | None:
    """The head with momentum whose size of updates is best with seed 0; None until all have run."""
    losses = {
        row["method"]: loss_of(row)
        for row in rows
        if row["method"] in MOMENTUM_HEADS
        and row["seed"] == 0
        and row["vocabulary"] == VOCABULARY
        and row["model"] == template.model
        and row["length"] == "fifth"
    }
    return min(losses, key=lambda name: losses[name]) if losses.keys() == MOMENTUM_HEADS.keys() else None
