"""Which runs the study of quality asks for: sweeps, then seeds at the best rates."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("matplotlib")
from quality_rows import PEER, changed, loss_of, whole_study

from bench.quality.methods import FAST_MINI, TUNED
from bench.quality.plan import (
    CLOSE,
    FULL_RUNS,
    MORE_SEEDS,
    MOST_SWEEP_RUNS,
    SEEDS,
    SWEEP_RUNS,
    TO_THE_END,
    best_index,
    next_index,
)
from bench.quality.study import Study
from bench.quality.tables import TABLES
from bench.quality.variants import LIMITERS, OPTIONS, REFRESHES, VARIANTS


def swept(loss_at):
    found = {}
    while (index := next_index(found)) is not None:
        assert index not in found
        assert len(found) < MOST_SWEEP_RUNS
        found[index] = loss_at(index)
    return found


def test_a_sweep_ends_with_a_worse_rate_on_both_sides_or_with_its_most_runs():
    """A best at the edge of what was run, whatever the losses; runs again of a rate that has a loss; no end."""
    hypothesis = pytest.importorskip("hypothesis")
    some_loss = hypothesis.strategies.one_of(hypothesis.strategies.floats(1, 5), hypothesis.strategies.just(math.inf))

    @hypothesis.given(hypothesis.strategies.lists(some_loss, min_size=MOST_SWEEP_RUNS, max_size=MOST_SWEEP_RUNS))
    @hypothesis.settings(deadline=None)
    def check(losses):
        answers = iter(losses)
        found = swept(lambda index: next(answers))
        assert len(found) >= SWEEP_RUNS
        best = best_index(found)
        assert found[best] == min(losses[: len(found)])
        assert len(found) == MOST_SWEEP_RUNS or min(found) < best < max(found)

    check()


@pytest.mark.parametrize("lowest", [-2.4, -1.0, -0.3, 0.0, 0.2, 1.0, 2.0, 3.4])
def test_each_method_has_as_many_runs_and_finds_the_best_rate_between(lowest):
    """More effort for one method than for another: losses with one valley, up to eight times the first rate away."""
    found = swept(lambda index: (index - lowest) ** 2)
    assert len(found) == SWEEP_RUNS
    assert abs(best_index(found) - lowest) <= 0.5


def test_a_method_whose_rate_was_guessed_badly_goes_on():
    found = swept(lambda index: (index - 5) ** 2)
    assert best_index(found) == 5
    assert best_index({0: 2.0, 1: 1.9}) is None


def test_the_whole_study_has_every_run_at_the_best_rate_and_none_twice(rows):
    """A variant at a rate of its own or of another method; a seed or a method that is left out; all tokens at the best
    rate of the short runs."""
    assert len({row["id"] for row in rows}) == len(rows)
    study = Study(rows)
    more = dict.fromkeys(CLOSE, MORE_SEEDS)
    for method in TO_THE_END:
        assert tuple(study.runs(method)) == (more["full"] if method in CLOSE["full"] else SEEDS)
        sweep = study.sweep(VARIANTS[method].base, "full")
        assert sweep[study.rate(method)] == min(sweep.values())
        assert 2 * study.rate(method) == pytest.approx(study.rate(method, "fifth"), rel=0.01)
    options = [study.best_of(option) for option in OPTIONS]
    for variants, length in ((options, "fifth"), (LIMITERS, "fifth"), (REFRESHES, "half")):
        for variant in variants:
            assert tuple(study.runs(variant, length)) == (more[length] if variant in CLOSE.get(length, ()) else SEEDS)
    assert all(tuple(study.runs(each, "tenth", 8192)) == more["tenth"] for each in CLOSE["tenth"])
    assert {*CLOSE["full"]} <= {*TO_THE_END}
    assert {*CLOSE["fifth"]} <= {FAST_MINI, *options}
    assert all(len(study.sweep(method)) == SWEEP_RUNS for method in TUNED)
    assert all(len(study.sweep(method, "full")) == FULL_RUNS for method in TO_THE_END if method in TUNED)
    assert {study.sweep_end(method, "full") for method in TO_THE_END if method in TUNED} == {"yes"}


def test_an_option_is_its_best_variant_with_seed_0(rows):
    """The first of several ways; a choice before all have run."""
    first, second = OPTIONS["rank 8"]
    study = Study(changed(changed(rows, first, [2.1] * 3, "fifth"), second, [2.0] * 3, "fifth"))
    assert study.best_of("rank 8") == second
    assert Study([row for row in rows if row["method"] != first]).best_of("rank 8") is None


def test_an_option_out_of_reach_has_one_seed_and_nothing_is_missing():
    """Seeds that are spent on options that are far behind; a line that says they are missing; an option that is
    measured by AdamW instead of by what it varies; a method that is said to be far behind because of one seed."""
    option = OPTIONS["8-bit"][0]
    study = Study(whole_study(lambda job: loss_of(job) * {PEER: 1.06, option: 1.02}.get(job.method, 1.0)))
    assert (len(study.runs(PEER)), len(study.runs(option, "fifth"))) == (3, 6)
    study = Study(whole_study(lambda job: loss_of(job) * (1.045 if job.method.startswith(FAST_MINI) else 1.0)))
    assert len(study.runs(option, "fifth")) == 6
    study = Study(whole_study(lambda job: loss_of(job) * (1.06 if job.method == option else 1.0)))
    assert len(study.runs(option, "fifth")) == 1
    assert not any("Missing runs" in table(study) for table in TABLES.values())
