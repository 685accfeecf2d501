"""Which runs the study needs next, stage by stage, from the rows that are there.

1. "sweep": each tuned method on a fifth of the tokens, ``SWEEP_RUNS`` rates, seed 0.
2. "embeddings": Mini with other state of embeddings and head, at three vocabularies, three seeds.
3. "limiter": without it, and with a floor, three seeds.
4. "full": each method on all tokens, from half of its best rate on, ``FULL_RUNS`` rates with seed 0; then other seeds
   at the best. The best rate of a short run need not be that of a long one.
5. "refresh": APOLLO with other refreshes, on half of the tokens, so that there are several, three seeds.

What the page's first sentences compare, ``CLOSE``, has more seeds: equal methods differ by up to 5 % from seed to seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace

from apollo_triton.tools.demo.training import SIZES

from ..results_file import Row
from .methods import (
    ADAFACTOR,
    ADAMW,
    APOLLO,
    FAST_ADAMW,
    FAST_APOLLO,
    FAST_MINI,
    GALORE,
    MINI,
    MUON,
    OFFICIAL,
    RANK_1,
    RANK_8,
    TUNED,
)
from .run import SMALL, Job
from .variants import BY_ROW, BY_ROW_8BIT, FULL_VARIANTS, LIMITERS, OPTIONS, REFRESHES, VARIANTS

SEEDS = (0, 1, 2)
MORE_SEEDS = (*SEEDS, 3, 4, 5)  # of what is close
VOCABULARY = 2048
# Vocabularies, and how long runs are there: at 8192 the head alone takes as long as all else at 2048, twice.
VOCABULARIES = {256: "fifth", VOCABULARY: "fifth", 8192: "tenth"}
SWEEP_RUNS = 5  # of each method: three around the best rate, a factor of 2 apart, and two between
FULL_RUNS = 3  # on all tokens: the best rate and one on each side, a factor of 2 apart
MOST_SWEEP_RUNS = 9  # of a method whose best rate was guessed badly
STAGES = ("sweep", "embeddings", "limiter", "full", "refresh")
# An option of embeddings and head that is so far behind with seed 0, as a share of the loss, runs no other seed: three
# would not change what is said of it.
OUT_OF_REACH = 0.05
FAST_METHODS = (FAST_ADAMW, FAST_APOLLO, FAST_MINI)
# What trains on all tokens, what matters most first. The last ones take the rate of what they vary.
TO_THE_END = [ADAMW, APOLLO, MINI, MUON, *FAST_METHODS, OFFICIAL, GALORE, ADAFACTOR, RANK_8, RANK_1, *FULL_VARIANTS]
_OPTIONS = (FAST_MINI, *(f"{FAST_MINI}, {option}" for option in ("8-bit", BY_ROW, BY_ROW_8BIT)))
# What has more seeds, by the length of its runs.
CLOSE: Mapping[str, tuple[str, ...]] = {
    "full": (ADAMW, APOLLO, MINI, *FAST_METHODS),
    "fifth": _OPTIONS,
    "tenth": _OPTIONS,
}
SWEEPS = {"sweep": ("fifth", [*TUNED]), "full": ("full", [method for method in TO_THE_END if method in TUNED])}
_LATER_STAGES: Mapping[str, tuple[list[str], str]] = {
    "full": (TO_THE_END, "full"),
    "limiter": ([APOLLO, MINI, *LIMITERS], "fifth"),
    "refresh": ([APOLLO, *REFRESHES], "half"),
}

Found = Mapping[float, float]  # losses by log2 of the rate over the first one


def next_index(found: Found, runs: int = SWEEP_RUNS, start: float = 0.0) -> float | None:
    """Where a sweep goes next, in log2 of the first rate; None once it has a worse rate on each side and enough runs.

    >>> next_index({}), next_index({0: 2.1}), next_index({0: 2.1, 1: 2.0}), next_index({0: 2.1, 1: 2.2})
    (0.0, 1, 2, -1)
    >>> next_index({0: 2.1, 1: 2.2, -1: 2.4}), next_index({0: 2.1, 1: 2.2, -1: 2.4, 0.5: 2.15})
    (0.5, -0.5)
    """
    if not found:
        return start
    best = min(found, key=lambda index: found[index])
    if len(found) >= MOST_SWEEP_RUNS:
        return None
    if best == max(found):
        return best + 1
    if best == min(found):
        return best - 1
    if len(found) >= runs:
        return None
    below, above = max(i for i in found if i < best), min(i for i in found if i > best)
    nearer = (above, below) if found[above] <= found[below] else (below, above)
    between = [(best + neighbour) / 2 for neighbour in nearer if abs(best - neighbour) == 1]
    return between[0] if between else (best + nearer[0]) / 2


def best_index(found: Found, runs: int = SWEEP_RUNS) -> float | None:
    """The index of the best rate of a finished sweep; None of an unfinished one."""
    return min(found, key=lambda index: found[index]) if found and next_index(found, runs) is None else None


def rate_at(method: str, index: float, model: str) -> float:
    """The rate of a sweep's index. The wider a model, the lower it is: in bench/rates.py the best rate fell with the
    width from 128 on."""
    return rate_of(TUNED[method].first_rate * SIZES[SMALL].hidden / SIZES[model].hidden, index)


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


def _with_seed_0(rows: Iterable[Row], template: Job, length: str = "fifth") -> list[Row]:
    """The runs of all methods and rates with seed 0 at the usual vocabulary."""
    wanted = asdict(replace(template, length=length, seed=0, vocabulary=VOCABULARY))
    del wanted["rate"], wanted["method"]
    return [row for row in rows if wanted.items() <= row.items()]


def sweep_of(rows: Iterable[Row], method: str, template: Job, length: str = "fifth") -> dict[float, float]:
    """The losses of a method's sweep, by index."""
    first = rate_at(method, 0, template.model)
    runs = [row for row in _with_seed_0(rows, template, length) if row["method"] == method]
    return {index_of(first, row["rate"]): loss_of(row) for row in runs}


def _sweep_runs(length: str) -> int:
    """How many runs a tuned method's sweep has."""
    return FULL_RUNS if length == "full" else SWEEP_RUNS


def next_rate(rows: Iterable[Row], method: str, template: Job, length: str) -> float | None:
    """Where a tuned method's sweep on a fifth or on all of the tokens goes next; None once it is finished, or while it
    cannot begin."""
    rows, start = list(rows), 0.0
    if length == "full":
        best = best_index(sweep_of(rows, method, template))
        if best is None:
            return None
        start = best - 1
    found = sweep_of(rows, method, template, length)
    index = next_index(found, _sweep_runs(length), start)
    return None if index is None else rate_at(method, index, template.model)


def best_rate(rows: Iterable[Row], method: str, template: Job, length: str = "fifth") -> float | None:
    """The best rate of a method, or of what a variant varies, on all tokens or else on a fifth; None while its sweep is
    unfinished."""
    rows, base = list(rows), VARIANTS[method].base
    found = sweep_of(rows, base, template, "full" if length == "full" else "fifth")
    index = best_index(found, _sweep_runs(length))
    return None if index is None else rate_at(base, index, template.model)


def jobs(stage: str, rows: Iterable[Row], template: Job) -> Iterator[Job]:
    """The runs of a stage that can be told from ``rows``, in their order. ``template`` has model and batch."""
    rows = list(rows)
    if stage in SWEEPS:
        length, methods = SWEEPS[stage]
        for method in methods:
            if (rate := next_rate(rows, method, template, length)) is not None:
                yield replace(template, method=method, rate=rate, length=length, vocabulary=VOCABULARY)
    for method, length, vocabulary, seed in _runs(stage, rows, template):
        if (rate := best_rate(rows, method, template, length)) is not None:
            yield replace(template, method=method, rate=rate, length=length, seed=seed, vocabulary=vocabulary)


def _runs(stage: str, rows: list[Row], template: Job) -> Iterator[tuple[str, str, int, int]]:
    """Method, length, vocabulary and seed."""
    if stage == "embeddings":
        candidates = [method for options in OPTIONS.values() for method in options]
        yield from ((method, "fifth", VOCABULARY, 0) for method in candidates)
        options = [best for option in OPTIONS if (best := best_of(option, rows, template))]
        methods, lengths = [FAST_MINI, *options], VOCABULARIES
    elif stage in _LATER_STAGES:
        methods, length = _LATER_STAGES[stage]
        lengths = {VOCABULARY: length}
    else:
        return
    for seed, (vocabulary, length) in itertools.product(MORE_SEEDS, lengths.items()):
        kept = [method for method in methods if seed in seeds_of(method, rows, template, length)]
        yield from ((method, length, vocabulary, seed) for method in kept)


def best_of(option: str, rows: Iterable[Row], template: Job) -> str | None:
    """The variant that stands for an option of embeddings and head: the best with seed 0; None until all have run."""
    variants = OPTIONS[option]
    losses = {row["method"]: loss_of(row) for row in _with_seed_0(rows, template) if row["method"] in variants}
    return min(losses, key=lambda name: losses[name]) if len(losses) == len(variants) else None


def seeds_of(method: str, rows: Iterable[Row], template: Job, length: str) -> tuple[int, ...]:
    """The seeds that a method runs with at its best rate."""
    if any(method in variants for variants in OPTIONS.values()) and not in_reach(method, rows, template):
        return SEEDS[:1]
    return MORE_SEEDS if method in CLOSE.get(length, ()) else SEEDS


def in_reach(option: str, rows: Iterable[Row], template: Job) -> bool:
    """Whether other seeds could change what is said of an option of embeddings and head: not if its loss with seed 0 is
    out of reach of that of what it varies."""
    short = _with_seed_0(rows, template)
    own, others = (
        min((loss_of(row) for row in short if row["method"] == name), default=0.0)
        for name in (option, VARIANTS[option].base)
    )
    return own <= (1 + OUT_OF_REACH) * others
