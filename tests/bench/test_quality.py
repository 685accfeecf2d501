"""The study of quality: which runs it asks for, what its rows are worth, and what the page makes of them."""

from __future__ import annotations

import doctest
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
from pictures import check_picture, record_figures
from quality_rows import TEMPLATE, loss_of, row_of, whole_study

from apollo_triton.tools.demo.corpus import Corpus
from bench.clock import Times
from bench.quality import __main__ as program
from bench.quality import draw as draw_module
from bench.quality import page, plan, run, statistics, step_time
from bench.quality.draw import compared, draw, label
from bench.quality.methods import ADAMW, APOLLO, FAST_ADAMW, FAST_MINI, MINI, TUNED
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
from bench.quality.rows import Rows, read
from bench.quality.run import Job
from bench.quality.statistics import Difference, difference, share_to_loss, together
from bench.quality.study import Study
from bench.quality.tables import TABLES
from bench.quality.variants import LIMITERS, OPTIONS, REFRESHES, VARIANTS

ROOT = Path(__file__).parents[2]
PEER = "Adafactor"  # a method without variants, of three seeds


@pytest.fixture(scope="module")
def rows():
    return whole_study()


def cells(table: str, name: str) -> list[str]:
    """The cells of a table's row, without its name."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize("module", [draw_module, plan, statistics], ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings_hold(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


# The sweep's rule


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
    more = dict.fromkeys(CLOSE, (*SEEDS, *MORE_SEEDS))
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


def test_what_is_out_of_reach_has_one_seed_and_nothing_is_missing():
    """Seeds that are spent on what is far behind; a line that says they are missing; an option that is measured by
    AdamW instead of by what it varies."""
    option = OPTIONS["8-bit"][0]
    study = Study(whole_study(lambda job: loss_of(job) * {PEER: 1.06, option: 1.02}.get(job.method, 1.0)))
    assert (len(study.runs(PEER)), len(study.runs(option, "fifth"))) == (1, 6)
    study = Study(whole_study(lambda job: loss_of(job) * (1.045 if job.method.startswith(FAST_MINI) else 1.0)))
    assert len(study.runs(option, "fifth")) == 6
    study = Study(whole_study(lambda job: loss_of(job) * (1.06 if job.method == option else 1.0)))
    assert len(study.runs(option, "fifth")) == 1
    assert not any("Missing runs" in table(study) for table in TABLES.values())


# Statistics


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


# The page


def changed(rows, method, losses, length="full"):
    """The rows with these losses of a method at its best rate, by seed."""
    runs = Study(rows).runs(method, length).values()
    return [
        row_of(Job(**{name: row[name] for name in TEMPLATE.__dataclass_fields__}), losses[row["seed"]])
        if row in runs
        else row
        for row in rows
    ]


def test_the_main_table_says_what_the_rows_say(rows):
    """A base of other seeds, bytes or rates of another method, a step time that stands with the wrong one."""
    rows = changed(changed(rows, ADAMW, [2.0, 4.0, 8.0, 16.0, 16.0, 16.0]), PEER, [2.0 * 1.01, 4.0 * 1.02, 8.0 * 1.03])
    rate = Study(rows).rate(PEER)
    times = {ADAMW: {"times AdamW": 1.0}, PEER: {"times AdamW": 2.5}, APOLLO: {"skipped": "it failed"}}
    table = TABLES["main"](Study(rows, times))
    size = next(row["state_bytes"] for row in rows if row["method"] == PEER)
    # Of the seeds that both have. The mean of 2.02, 4.08 and 8.24 is 4.78; 4.303 times their standard deviation over
    # sqrt(3) is 7.872.
    expected = [f"{rate:g}", "4.780 ± 7.872", "+2.00 ± 2.48, no difference seen", "not reached by 3 of 3 seeds"]
    shown = cells(table, PEER)
    assert shown == [*expected, f"{size:,}", "2.50"]
    assert cells(table, ADAMW)[2:4] == ["", ""]
    assert table.endswith(f"Missing step times: {APOLLO}: it failed.")


def test_a_faster_method_has_its_share_of_tokens(rows):
    """Half-way AdamW has 3.0 and at the end 2.0. A method that ends at 1.5 has 2.5 half-way, and 2.0 at three
    quarters."""
    rows = changed(changed(rows, ADAMW, [2.0] * 6), PEER, [1.5] * 3)
    assert cells(TABLES["main"](Study(rows)), PEER)[2:4] == ["-25.00 ± 0.00, better", "75 %"]


def test_what_is_missing_is_an_empty_cell_and_named(rows):
    """A mean of the seeds that are there, as if they were all; a run at another rate than the best in its place; a best
    rate of an unfinished sweep."""
    rows = changed(rows, ADAMW, [2.0] * 6)
    rows = changed(rows, PEER, [2.2, 2.2, 2.2])
    lacks = [row for row in rows if (row["method"], row["length"]) != (PEER, "full") or row["seed"] == 0]
    table = TABLES["main"](Study([*lacks, row_of(Job(PEER, 0.123, "full", seed=2), 0.1)]))
    assert cells(table, PEER)[1:3] == ["2.200 (1 seed)", "+10.00 (1 seed)"]
    assert f"Missing runs: 2, of {PEER} (2)." in table
    last = next(row for row in lacks if (row["method"], row["length"]) == (PEER, "full"))
    table = TABLES["main"](Study([row for row in lacks if row is not last]))
    assert set(cells(table, PEER)) == {""}
    assert f"Missing: the end of the sweep of {PEER}." in table


def test_a_run_that_diverged_says_so_in_every_table(rows):
    rows = changed(rows, PEER, [2.0, None, 2.0])
    sweep = [row for row in rows if (row["method"], row["length"]) == (PEER, "fifth")]
    rows[rows.index(max(sweep, key=lambda row: row["rate"]))]["held_out_loss"] = None
    study = Study(rows)
    assert cells(TABLES["main"](study), PEER)[1:3] == ["diverged with seed 1", ""]
    assert cells(TABLES["sweeps"](study), PEER)[1].endswith(": diverged")
    assert PEER not in compared(study)


def test_variants_are_compared_with_what_they_vary_on_as_many_tokens(rows):
    """AdamW or the other method as the base; the base's runs of another length."""
    for name, length, base, variant in (
        ("limiter", "fifth", MINI, f"{MINI}, no limiter"),
        ("refresh", "half", APOLLO, f"{APOLLO}, never refreshed"),
    ):
        known = changed(changed(rows, base, [2.0] * 3, length), variant, [2.1] * 3, length)
        assert cells(TABLES[name](Study(known)), variant) == ["2.100 ± 0.000", "+5.00 ± 0.00, worse"]


def test_options_of_embeddings_are_compared_at_their_vocabulary(rows):
    """AdamW or plain Mini as the base; a base of another vocabulary or length."""
    (option,) = OPTIONS["by row"]
    size = next(row["state_bytes"] for row in rows if row["method"] == option)
    study = Study(rows)
    for vocabulary, length, factor in ((8192, "tenth", 1.004), (256, "fifth", 1.006)):
        base = study.runs(FAST_MINI, length, vocabulary)
        for row in rows:
            if (row["method"], row["vocabulary"]) == (option, vocabulary):
                row["held_out_loss"] = base[row["seed"]]["held_out_loss"] * factor
    shown = cells(TABLES["embeddings"](Study(rows)), "by row")
    assert (shown[0], shown[2]) == ("+0.60 ± 0.00 (6 seeds), no", "+0.40 ± 0.00 (6 seeds), yes")
    assert shown[4:] == [f"{size:,}"] * 3
    fewer = [row for row in rows if (row["method"], row["vocabulary"]) != (option, 256)]
    assert cells(TABLES["embeddings"](Study(fewer)), "by row")[3] == ""


def test_differences_together_are_those_of_all_runs():
    """A mean of means, whose interval has three numbers in place of six; one that is missing left out.

    Six numbers of mean 2 whose squared deviations add up to 10 have a standard deviation of sqrt(2), and t is 2.571.
    """
    found = together([Difference.of([0.0, 1.0, 2.0]), Difference.of([2.0, 3.0, 4.0])])
    assert (found.mean, found.seeds) == (2.0, 6)
    assert found.margin == pytest.approx(2.571 * math.sqrt(2) / math.sqrt(6))
    assert together([found, None]) is None
    assert together([found, Difference.of([1.0])]) is None


def test_losses_of_other_text_are_refused(rows):
    other = row_of(Job(PEER, 0.5), 1.0) | {"text": {"fingerprint": "another"}}
    with pytest.raises(SystemExit, match="vocabulary 2048 have different texts, text 2048 and another"):
        Study([*rows, other])


def test_rows_of_another_model_are_another_study(rows):
    assert len(Study([*rows, row_of(Job(PEER, 0.5, model="60M"), 1.0)]).rows) == len(rows)


@pytest.mark.slow
def test_the_picture_has_what_was_compared(rows, tmp_path, monkeypatch):
    """Marks on each other's places in colours of others, labels cut off."""
    study = Study(rows, machine="a machine")
    figures = record_figures(monkeypatch)
    draw(study, tmp_path / "quality.png")
    (figure,) = figures.values()
    assert {ADAMW, *compared(study)} == {*TO_THE_END}
    names = set(map(label, TO_THE_END))
    assert len(names) == len(TO_THE_END)
    check_picture(figure, names)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == names


def test_the_page_has_the_committed_results():
    """Figures of older rows, or of rows that are gone."""
    study = Study.read(page.folder())
    for name, table in TABLES.items():
        assert page.part(name).read() == table(study).strip(), "run python -m bench.quality.page"
    assert page.part("picture").read() == page.pictured(study)


@pytest.mark.slow
def test_a_page_is_written_between_its_marks(rows, tmp_path):
    copy = tmp_path / "quality.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    page.write(Study([]), copy)
    assert not (tmp_path / "quality.png").exists()
    study = Study(rows)
    page.write(study, copy)
    assert (tmp_path / "quality.png").exists()
    assert page.part("main", copy).read() == TABLES["main"](study)
    outside = [line for line in page.PAGE.read_text().splitlines() if line.startswith("#")]
    assert [line for line in copy.read_text().splitlines() if line.startswith("#")] == outside


# Rows


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("APOLLO_RESULTS", str(tmp_path))
    return Rows()


def test_an_interrupted_write_leaves_the_rows_as_they_were(results, monkeypatch):
    job, other = Job(PEER, 0.5), Job(PEER, 0.25)
    results.add(job, row_of(job, 2.0))
    before = results.path.read_text()

    def interrupted(self, text, **options):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            results.add(other, row_of(other, 1.0))
    assert results.path.read_text() == before
    assert job in Rows()
    assert other not in Rows()
    assert list(read(results.path)) == [job.name]


def test_a_row_that_is_not_there_is_answered_with_others(results):
    job = Job(PEER, 0.5)
    results.add(job, row_of(job, 2.0))
    with pytest.raises(
        SystemExit, match=f"--row 'Adafactor, rate 9': there is no such row; there are, for example: {job.name}"
    ):
        program.run_again("Adafactor, rate 9", results, "cpu")


def test_a_row_is_run_again_as_it_was_and_compared(results, monkeypatch, capsys):
    """Another batch, seed or model than the row's; a difference that is not told; rows of other machines not found."""
    job = Job(PEER, 0.5, "half", 2, 256, "60M", 512, 64, 2.0)
    folder = results.path.parent.with_name("another machine")
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps({"rows": [row_of(job, 2.0)]}))
    answers = {2.0: 0, math.nextafter(2.0, 3.0): 0, 2.2: 1, None: 1}
    for loss, code in answers.items():
        monkeypatch.setattr(program, "row_of", lambda again, device, loss=loss: row_of(again, loss))
        assert program.run_again(job.name, results, "cpu") == code
    printed = capsys.readouterr().out
    assert "same to the last digit" in printed
    assert "The losses differ by +10.00 %: 2.2, 2.0." in printed
    assert "One of them diverged." in printed


@pytest.fixture
def tiny(monkeypatch):
    """A job of three steps of a tiny model, on text of nonsense."""
    text = Corpus("text", torch.arange(3000) % 61, torch.arange(600) % 61, 64)
    monkeypatch.setattr(run, "_corpus", lambda vocabulary, data: text)
    monkeypatch.setattr(run, "_compiled", run._loss)
    monkeypatch.setattr(run, "body_weights", lambda model: 240)
    job = Job(ADAMW, 1e-2, vocabulary=64, model="tiny", batch=2, sequence=8, tokens_a_weight=0.2)
    assert job.steps == 3
    return job


@pytest.mark.slow
def test_a_row_has_what_determines_it_and_what_it_took(tiny):
    row, trained = run.train(tiny)
    weights = sum(weight.numel() for weight in trained.model.parameters())
    tensors = len(list(trained.model.parameters()))
    assert row["state_bytes"] == 4 * (2 * weights + tensors)  # two moments a weight, and a step of each tensor
    assert row["held_out_loss"] == trained.history.held_out_loss[3]
    assert list(row["curve"]) == ["1", "2", "3"]
    assert json.loads(json.dumps(row)) == row
    assert run.train(tiny)[0]["curve"] == row["curve"]


@pytest.mark.parametrize("method", [FAST_ADAMW, FAST_MINI, OPTIONS["by row"][0]])
def test_embeddings_and_head_have_four_times_the_rate_at_every_step(tiny, method):
    """A factor that the schedule overwrites, that reaches the blocks or norms too, or that no group takes."""
    _, trained = run.train(replace(tiny, method=method))
    rates = {weight: group["lr"] for group in trained.optimizer.param_groups for weight in group["params"]}
    last = trained.config.learning_rate_at(3)
    for name, weight in trained.model.named_parameters():
        assert rates[weight] == (4 * last if "embed" in name or "head" in name else last), name


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_diverges_has_no_loss_and_a_row_that_is_json(tiny, steps):
    """NaN in a results file, which other readers refuse, and as a loss, which no comparison finds worse: also where
    the last step diverges, whose loss no training loss shows."""
    row, _ = run.train(replace(tiny, rate=1e30, tokens_a_weight=0.2 * steps / 3))
    assert row["held_out_loss"] is None
    json.dumps(row, allow_nan=False)


# Step times


def test_step_times_are_ratios_of_one_round_and_count_projections(monkeypatch):
    """The ratio of two medians, which a round that was slow for all spoils; a step with a new projection at its full
    time or not at all; a peer that is not there."""
    asked = []

    def stepper(method, model, device, gap=None):
        if method == "Adafactor":
            raise ImportError("there is none")
        asked.append((method, gap))
        return f"step {gap}", 200 if method == MINI else None

    def interleaved(steps, rounds, device):
        seconds = {ADAMW: [1.0, 10.0, 3.0], MINI: [2.0, 20.0, 9.0]}
        if set(steps.values()) == {"step 1"}:
            seconds = {MINI: [36.0, 36.0, 36.0]}
        return Times({name: seconds[name] for name in steps}, {})

    monkeypatch.setattr(step_time, "stepper", stepper)
    monkeypatch.setattr(step_time, "interleaved", interleaved)
    found = step_time.measure([ADAMW, MINI, "Adafactor"], "tiny", "cpu", 3)
    assert asked == [(ADAMW, None), (MINI, None), (MINI, 1)]
    assert found[ADAMW]["times AdamW"] == 1.0
    assert found["Adafactor"] == {"skipped": "it failed: ImportError: there is none"}
    assert found[MINI]["times AdamW"] == pytest.approx(2.0 * (1 + (36 / 9 - 1) / 200), rel=1e-3)  # four digits are kept
    assert found[MINI]["refresh_ms"] == 36000


def test_a_step_that_is_timed_is_one_of_a_trained_model():
    """Gradients that are gone, so that a step does nothing; a state that the timed step makes."""
    step, gap = step_time.stepper(MINI, "tiny", "cpu")
    optimizer = step.__self__
    assert gap == 200
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    states = sum(len(optimizer.state[weight]) > 0 for weight in weights)
    assert states == len(weights)
    step()
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    other, _ = step_time.stepper(MINI, "tiny", "cpu", gap=1)
    assert {group.get("update_proj_gap", 1) for group in other.__self__.param_groups} == {1}
