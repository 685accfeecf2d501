"""What losses of a few seeds say: differences of equal seeds with their 95 % intervals, and tokens to a loss.

Runs of one seed share the initial weights and the batches, so they are compared in pairs. What all methods have in
common, such as a seed whose weights begin well, cancels. The interval is Student's: 4.303 standard errors at 3 seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..report_data import mean_and_margin
from ..results_file import Row

BySeed = Mapping[int, Row]
BETTER, WORSE, UNSEEN = "better", "worse", "no difference seen"


@dataclass(frozen=True)
class Difference:
    """How far losses lie above others of the same seeds, in percent of these: the mean over ``seeds`` runs, the
    half-width of its 95 % interval, which is infinite for one run, and each run's."""

    mean: float
    margin: float
    seeds: int
    percents: tuple[float, ...] = ()

    @classmethod
    def of(cls, percents: Iterable[float]) -> Difference:
        """The difference of one or more runs.

        >>> Difference.of([1.0, 2.0, 3.0])
        Difference(mean=2.0, margin=2.484338..., seeds=3, percents=(1.0, 2.0, 3.0))
        """
        values = [*percents]
        mean, margin = mean_and_margin(values)
        return cls(mean, math.inf if margin is None else margin, len(values), tuple(values))

    @property
    def verdict(self) -> str:
        """A word for the interval. It takes a side only if 0 is outside.

        >>> Difference(-0.5, 0.4, 3).verdict, Difference(-0.5, 0.6, 3).verdict
        ('better', 'no difference seen')
        """
        if self.mean + self.margin < 0:
            return BETTER
        return WORSE if self.mean - self.margin > 0 else UNSEEN

    def at_most(self, limit: float) -> str:
        """Whether the losses are at most ``limit`` percent above: "yes" or "no" if the whole interval says so.

        >>> [Difference(0.2, margin, 3).at_most(0.5) for margin in (0.2, 0.4)], Difference(0.8, 0.2, 3).at_most(0.5)
        (['yes', 'unclear'], 'no')
        """
        if self.mean + self.margin <= limit:
            return "yes"
        return "no" if self.mean - self.margin > limit else "unclear"


def difference(runs: BySeed, base: BySeed) -> Difference | None:
    """Of the seeds that both have. None if there are none, or if one of these runs diverged: it has no loss.

    >>> def runs(*losses): return {seed: {"held_out_loss": loss} for seed, loss in enumerate(losses)}
    >>> difference(runs(2.5, 3.75), runs(2.0, 3.0)).mean, difference(runs(2.5, None), runs(2.0, 3.0))
    (25.0, None)
    """
    shared = sorted(runs.keys() & base.keys())
    pairs = [(runs[seed]["held_out_loss"], base[seed]["held_out_loss"]) for seed in shared]
    if not pairs or any(loss is None for pair in pairs for loss in pair):
        return None
    return Difference.of(100 * (loss / other - 1) for loss, other in pairs)


def together(found: Iterable[Difference | None]) -> Difference | None:
    """All runs of several differences as one; None if one of them is missing or has a single run."""
    differences = list(found)
    if not all(each and each.seeds > 1 for each in differences):
        return None
    return Difference.of(percent for each in differences if each for percent in each.percents)


def share_to_loss(row: Row, target: Row) -> float | None:
    """The share of its tokens after which a run first had the last loss of ``target``, between evaluations in a
    straight line; None if it never did, or diverged.

    It is an upper bound. The rate falls to a tenth over a run's own length, and a run that was planned to be shorter
    would have a lower loss by then.
    """
    if row["held_out_loss"] is None:
        return None
    wanted = _points(target)[-1][1]
    before, higher = 0.0, math.inf
    for step, loss in _points(row):
        if loss <= wanted:
            part = (higher - wanted) / (higher - loss) if math.isfinite(higher) else 1.0
            return (before + part * (step - before)) / row["steps"]
        before, higher = step, loss
    return None


def _points(row: Row) -> list[tuple[int, float]]:
    """Steps and held-out losses of a run, as they are rounded in its curve."""
    return sorted((int(step), loss) for step, loss in row["curve"].items())
