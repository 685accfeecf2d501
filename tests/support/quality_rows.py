"""Rows of ``bench.quality`` that no run has made: a loss by a formula, and a study that is whole."""

from __future__ import annotations

import math
from dataclasses import asdict

from bench.quality.methods import TUNED
from bench.quality.plan import STAGES, jobs
from bench.quality.run import LENGTHS, Job
from bench.quality.study import Study
from bench.quality.variants import VARIANTS

TEMPLATE = Job("", 0.0)
ORDER = list(VARIANTS)
STEPS = 1000
PEER = "Adafactor"  # a method without variants, of three seeds


def row_of(job: Job, loss: float | None, curve: dict[int, float] | None = None, **more):
    """A row as ``run.train`` makes it. By default the curve falls in a straight line."""
    halves = {} if loss is None else {STEPS // 2: loss + 1.0, STEPS: loss}
    return {
        **{"id": job.name, **asdict(job), "steps": STEPS, "tokens": 6.1e6 * LENGTHS[job.length]},
        **{"held_out_loss": loss, "curve": {str(step): value for step, value in (curve or halves).items()}},
        **{"state_bytes": 10**6 * (1 + ORDER.index(job.method)), "seconds": 36.0},
        "text": {"tokens": 10**7, "fingerprint": f"text {job.vocabulary}", "torch": "2", "sympy": None}
        | {"networkx": "3", "numpy": "2"},
        **{"versions": {"torch": "2", "galore-torch": None}, "source": "source", "commit": "commit", **more},
    }


def loss_of(job: Job) -> float:
    """Lowest at a rate a factor of up to 2 from where the sweep starts, and on all tokens at half of that; each method
    and variant 0.1 % above the one before, up or down 0.1 % with the seed."""
    number = ORDER.index(job.method)
    first = TUNED[VARIANTS[job.method].base].first_rate * (0.5 if job.length == "full" else 1.0)
    away = math.log2(job.rate / first) - (number % 5 - 2) / 2
    return 3.0 * (1 + 0.001 * number) * (1 + 0.004 * away**2) * (1 + 0.001 * (job.seed - 1) * (-1) ** number)


def whole_study(loss=loss_of):
    """The rows of all stages, as the study would make them one after the other."""
    rows = {}
    for stage in STAGES:
        while wanted := [job for job in jobs(stage, list(rows.values()), TEMPLATE) if job.name not in rows]:
            rows |= {job.name: row_of(job, loss(job)) for job in wanted}
    return list(rows.values())


def changed(rows, method, losses, length="full"):
    """The rows with these losses of a method at its best rate, by seed."""
    runs = Study(rows).runs(method, length).values()
    return [
        row_of(Job(**{name: row[name] for name in TEMPLATE.__dataclass_fields__}), losses[row["seed"]])
        if row in runs
        else row
        for row in rows
    ]
