"""The runs of the study of quality, their rows, and the times of their steps."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
from quality_rows import PEER, row_of

from apollo_triton.tools.demo.corpus import Corpus
from bench.clock import Times
from bench.quality import __main__ as program
from bench.quality import run, step_time
from bench.quality.methods import ADAMW, FAST_ADAMW, FAST_MINI, MINI
from bench.quality.rows import Rows, read
from bench.quality.run import Job
from bench.quality.variants import OPTIONS


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("APOLLO_RESULTS", str(tmp_path))
    return Rows()


def test_an_interrupted_write_leaves_the_rows_as_they_were(results, interrupted_writes):
    job, other = Job(PEER, 0.5), Job(PEER, 0.25)
    results.add(job, row_of(job, 2.0))
    before = results.path.read_text()

    with interrupted_writes(), pytest.raises(KeyboardInterrupt):
        results.add(other, row_of(other, 1.0))
    assert results.path.read_text() == before
    assert job in Rows()
    assert other not in Rows()
    assert list(read(results.path)) == [job.name]


def test_a_row_that_is_not_there_is_answered_with_the_nearest(results):
    """The first ones of the file, or none because of a capital letter."""
    with pytest.raises(SystemExit, match="--row 'x': no results have been written yet"):
        program.run_again("x", results, "cpu")
    wanted = Job(PEER, 0.5, seed=2)
    for job in (Job(ADAMW, 0.5, seed=2), Job(PEER, 0.25, "fifth"), Job(PEER, 0.25), Job(PEER, 0.5), wanted):
        results.add(job, row_of(job, 2.0))
    asked = wanted.name.lower().replace("full", "fulll")
    with pytest.raises(SystemExit, match=f"there is no such row; the nearest are\n  {wanted.name}\n") as raised:
        program.run_again(asked, results, "cpu")
    assert ADAMW not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--batch 0", "--batch: 0 is not above 0"),
        ("--batch 1.5", "--batch: invalid count value: '1.5'"),
        ("--tokens-a-weight -1", "--tokens-a-weight: -1 is not above 0"),
        ("--seconds nan", "--seconds: nan is not above 0"),
        ("--workers 0", "--workers: 0 is not above 0"),
        ("--data /nowhere", "--data /nowhere: there is no such file or folder"),
        ("--row=", "--row '': no results"),
    ],
)
def test_wrong_arguments_start_no_run(results, monkeypatch, capsys, arguments, said):
    """Hours of training that nobody asked for: an empty name of a row, or a size of nothing."""
    monkeypatch.setattr("sys.argv", ["quality", *arguments.split()])
    monkeypatch.setattr(program, "run_missing", None)
    with pytest.raises(SystemExit) as raised:
        program.main()
    assert said in capsys.readouterr().err + str(raised.value)


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
