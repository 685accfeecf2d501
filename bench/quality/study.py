"""The study's runs as its page compares them: by method, length and vocabulary, at the best rate of the sweep.

Nothing is compared that differs in more than the method: a run at another rate does not count, and runs on other text
are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..results_file import Row
from .plan import (
    FULL_RUNS,
    MORE_SEEDS,
    MOST_SWEEP_RUNS,
    SWEEP_RUNS,
    VOCABULARY,
    best_of,
    best_rate,
    rate_at,
    seeds_of,
    sweep_of,
)
from .run import SMALL, Job
from .statistics import Difference, difference


class Study:
    """The rows of one model on one machine. ``times`` are those of ``step_time.py`` by method, ``tunings`` those of
    ``fine_tuning.py``."""

    def __init__(
        self,
        rows: Iterable[Row],
        times: Mapping[str, Row] | None = None,
        model: str = SMALL,
        machine: str = "",
        tunings: Iterable[Row] = (),
    ) -> None:
        self.rows = [row for row in rows if row["model"] == model]
        self.times, self.machine, self.tunings = times or {}, machine, list(tunings)
        first = self.rows[0] if self.rows else {}
        shared = {name: first[name] for name in ("batch", "sequence", "tokens_a_weight", "data") if name in first}
        self.template = Job("", 0.0, model=model, **shared)
        texts: dict[int, str] = {}
        for row in self.rows:
            fingerprint = row["text"]["fingerprint"]
            if texts.setdefault(row["vocabulary"], fingerprint) != fingerprint:
                raise SystemExit(
                    f"rows of vocabulary {row['vocabulary']} have different texts, {texts[row['vocabulary']]} and "
                    f"{fingerprint} ({row['id']}): their losses do not compare; keep those of one text"
                )

    @classmethod
    def read(cls, folder: Path, model: str = SMALL) -> Study:
        """The study in a machine's folder of results. Files that are not there yet have no rows."""
        file, times, tunings = (_read(folder / f"quality{name}.json") for name in ("", "_step_time", "_fine_tuning"))
        by_method = {row["id"]: row for row in times["rows"]}
        return cls(file["rows"], by_method, model, file["machine"]["name"], tunings["rows"])

    def sweep(self, method: str, length: str = "fifth") -> dict[float, float]:
        """The losses of a method's sweep by rate, ascending; infinite where a run diverged."""
        found = sweep_of(self.rows, method, self.template, length)
        return {rate_at(method, index, self.template.model): found[index] for index in sorted(found)}

    def sweep_end(self, method: str, length: str = "fifth") -> str:
        """How a sweep ended: "yes" if its best rate has a worse one on both sides, else why not."""
        found = self.sweep(method, length)
        best = self.rate(method, length)
        if best is None:
            return f"unfinished, {len(found)} of {SWEEP_RUNS if length == 'fifth' else FULL_RUNS} runs or more"
        if min(found) < best < max(found):
            return "yes"
        return f"no, after {MOST_SWEEP_RUNS} runs"

    def rate(self, method: str, length: str = "full") -> float | None:
        """The best rate of a method, or of what a variant varies, on all tokens or else on a fifth; None while its
        sweep is unfinished."""
        return best_rate(self.rows, method, self.template, length)

    def best_of(self, option: str) -> str | None:
        """The variant that stands for an option of embeddings and head; None until all have run with seed 0."""
        return best_of(option, self.rows, self.template)

    def runs(self, method: str, length: str = "full", vocabulary: int = VOCABULARY) -> dict[int, Row]:
        """The runs at the best rate by seed."""
        wanted = (method, length, vocabulary, self.rate(method, length))
        keys = ("method", "length", "vocabulary", "rate")
        found = {row["seed"]: row for row in self.rows if tuple(row[key] for key in keys) == wanted}
        return {seed: found[seed] for seed in MORE_SEEDS if seed in found}

    def missing(self, method: str, length: str, vocabulary: int) -> int:
        """How many runs of a method are not there yet."""
        seeds = seeds_of(method, self.rows, self.template, length)
        return len(set(seeds) - set(self.runs(method, length, vocabulary)))

    def difference(
        self, method: str, base: str, length: str = "full", vocabulary: int = VOCABULARY
    ) -> Difference | None:
        return difference(self.runs(method, length, vocabulary), self.runs(base, length, vocabulary))


def _read(path: Path) -> Row:
    if not path.exists():
        return {"machine": {"name": ""}, "rows": []}
    return json.loads(path.read_text(encoding="utf-8"))
