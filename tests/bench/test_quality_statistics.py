"""What the study of quality says of a few losses."""

from __future__ import annotations

import doctest
import math

import pytest

pytest.importorskip("matplotlib")

from bench.quality import draw as draw_module
from bench.quality import plan, statistics
from bench.quality.statistics import Difference, difference, share_to_loss, together


@pytest.mark.parametrize("module", [draw_module, plan, statistics], ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings_hold(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


def runs(*losses):
    return {seed: {"held_out_loss": loss} for seed, loss in enumerate(losses)}


def test_a_difference_pairs_equal_seeds_and_has_student_s_interval():
    """Runs paired in their order; standard errors of unpaired runs, which the seeds' own spread would drown; a normal's
    1.96 or n instead of n - 1. Differences of 1, 2 and 3 % have a standard deviation of 1, and t is 4.303."""
    method = {2: {"held_out_loss": 8 * 1.03}, 0: {"held_out_loss": 2 * 1.01}, 1: {"held_out_loss": 4 * 1.02}}
    found = difference(method, runs(2.0, 4.0, 8.0, 16.0))
    assert found.mean == pytest.approx(2.0)
    assert found.margin == pytest.approx(4.303 / math.sqrt(3))
    assert found.seeds == 3
    assert difference(runs(2.02), runs(2.0)).margin == math.inf


def test_a_run_that_diverged_is_not_left_out_of_a_mean():
    """A method that looks good because its bad seed has no loss."""
    assert difference(runs(1.0, None), runs(2.0, 2.0)) is None
    assert difference({}, runs(2.0)) is None


def test_words_follow_the_interval():
    """A side that is taken with 0 inside; worse for better."""
    verdicts = {mean: Difference(mean, 0.5, 3).verdict for mean in (-0.6, -0.4, 0.0, 0.4, 0.6)}
    assert list(verdicts.values()) == ["better", *["no difference seen"] * 3, "worse"]
    assert Difference(-9.0, math.inf, 1).verdict == "no difference seen"
    within = [Difference(mean, 0.2, 3).at_most(0.5) for mean in (-3.0, 0.3, 0.4, 0.6, 0.8)]
    assert within == ["yes", "yes", "unclear", "unclear", "no"]


def with_curve(curve, loss):
    return {"steps": 400, "held_out_loss": loss, "curve": {str(step): value for step, value in curve.items()}}


def test_tokens_to_a_loss_lie_between_evaluations():
    """The evaluation after it, a last crossing instead of the first, steps in the order of their texts, a run that
    never got there."""
    target = with_curve({200: 9.0, 400: 2.0}, 2.0)
    assert share_to_loss(with_curve({1000: 0.5, 200: 2.5, 300: 1.5, 400: 2.4}, 0.5), target) == 250 / 400
    assert share_to_loss(with_curve({200: 1.9, 400: 1.0}, 1.0), target) == 200 / 400
    assert share_to_loss(with_curve({200: 3.0, 400: 2.001}, 2.001), target) is None
    assert share_to_loss(with_curve({200: 1.0}, None), target) is None
    rounded = with_curve({200: 9.0, 400: 2.00001}, 2.000006)  # a curve has five digits, and its own end counts
    assert share_to_loss(rounded, rounded) == 1.0


def test_differences_together_are_those_of_all_runs():
    """A mean of means, whose interval has three numbers in place of six; one that is missing left out.

    Six numbers of mean 2 whose squared deviations add up to 10 have a standard deviation of sqrt(2), and t is 2.571.
    """
    found = together([Difference.of([0.0, 1.0, 2.0]), Difference.of([2.0, 3.0, 4.0])])
    assert (found.mean, found.seeds) == (2.0, 6)
    assert found.margin == pytest.approx(2.571 * math.sqrt(2) / math.sqrt(6))
    assert together([found, None]) is None
    assert together([found, Difference.of([1.0])]) is None
