"""The sweep of learning rates: which runs it asks for, when it ends, and what its table says."""

from __future__ import annotations

import math

import pytest

from bench import fine_tuning
from bench.rates import FIRST_RATE, Method, best, losses_of, means, methods, missing, rate_at, vertex
from bench.rates_report import behind, norms, read, table
from bench.results_file import RESULTS, ROOT

ADAMW = Method(64)


def curve(method, lowest, depth=2.0):
    """Losses that are lowest at the index ``lowest``, for every seed alike."""
    return {(method, index, seed): depth + 0.1 * (index - lowest) ** 2 for index in range(-9, 10) for seed in (0, 1, 2)}


def run_all(truth, widths):
    """Runs what the sweep asks for until it asks for nothing; all losses that it has then."""
    known = {}
    for _ in range(40):
        wanted = missing(known, widths)
        if not wanted:
            return known
        assert len(set(wanted)) == len(wanted)
        known |= {run: truth[run] for run in wanted}
    raise AssertionError("the sweep does not end")


def test_a_sweep_ends_with_a_worse_rate_on_both_sides_of_each_best():
    """A best at the edge of what was run, which may lie anywhere beyond; runs of other methods before AdamW's best."""
    truth = curve(ADAMW, -2)
    for method in methods(64)[1:]:
        truth |= curve(method, -2 + (method.rank or 0) % 5)
    assert {method for method, *_ in missing({}, [64])} == {ADAMW}
    known = run_all(truth, [64])
    for method in methods(64):
        found = means(known, method)
        assert best(found) == min(range(-9, 10), key=lambda index: truth[method, index, 0])
        assert -2 in found  # AdamW's best rate, at which the table compares
    assert len(known) < 3 * 10 * 8  # a search, not the whole grid


def test_a_run_that_diverged_is_the_worst_and_not_the_best():
    row = {"width": 64, "rank": None, "variant": "", "rate": rate_at(3), "seed": 0, "held_out_loss": math.nan}
    assert losses_of([row]) == {(ADAMW, 3, 0): math.inf}
    losses = curve(ADAMW, 0) | {(ADAMW, 1, seed): math.inf for seed in (0, 1, 2)}
    assert best(means(losses, ADAMW)) == 0


def test_a_rate_that_one_seed_lacks_has_no_mean():
    """The mean over fewer seeds, which compares lucky seeds with all."""
    losses = curve(ADAMW, 0)
    del losses[ADAMW, 0, 2]
    assert 0 not in means(losses, ADAMW)


def test_the_best_lies_between_the_rates_that_were_run():
    """A parabola in the rate instead of its logarithm, or one that is turned around."""
    found = {index: (index - 0.3) ** 2 for index in (-1, 0, 1)}
    assert vertex(found) == pytest.approx(FIRST_RATE * 2**0.3)
    with pytest.raises(ValueError, match="no rate has a worse one on both sides"):
        vertex({0: 1.0, 1: 2.0})


def test_the_table_compares_at_adamws_best_rate():
    """A method's own best in the place of its loss at AdamW's best rate."""
    mini = Method(64, 1)
    losses = curve(ADAMW, 0) | curve(mini, 1, depth=1.9)
    assert behind(losses, mini) == pytest.approx(2.0 / 2.0 - 1)
    lines = table(losses).splitlines()
    assert lines[2] == "| AdamW | 5.0e-3; 2.000 |"
    assert "| Mini | 1.0e-2; +0.0 % |" in lines


def test_norms_compare_runs_of_one_rate_and_seed():
    def row(rank, rate, rms):
        return {"width": 64, "rank": rank, "variant": "", "rate": rate, "seed": 0, "update_rms": rms}

    rows = [row(None, 1.0, 0.5), row(None, 2.0, 0.1), row(1, 1.0, 1.0), row(1, 2.0, 0.8), row(8, 4.0, 9.0)]
    assert norms(rows) == {"Mini": pytest.approx(4.0)}


OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def test_the_page_on_options_has_the_committed_results():
    """Figures of an older run beside a link to the newer one."""
    (path,) = RESULTS.glob("*/rates.json")
    _, rows = read(path)
    assert table(losses_of(rows)) in OPTIONS
    (path,) = RESULTS.glob("*/fine_tuning.json")
    assert fine_tuning.as_table({row["id"]: row for row in read(path)[1]}) in OPTIONS
