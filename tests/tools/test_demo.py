"""The demo: its text, its runs, what it writes, and what it says of a wrong input."""

from __future__ import annotations

import io
import json
import os

import pytest
import torch
from demo_cases import BATCH, METHODS, SEQUENCE, STEPS, arguments, config, rows_of
from pictures import check_picture, record_figures

from apollo_triton import cli
from apollo_triton.tools.demo import training as demo_training
from apollo_triton.tools.demo.corpus import Corpus, load_corpus, split
from apollo_triton.tools.demo.report import Result, draw, table
from apollo_triton.tools.demo.training import History, Run, RunConfig

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def test_split_keeps_each_text_whole_on_one_side_whatever_the_order():
    texts = [bytes([65 + i]) * (20 + i) for i in range(40)]
    train, held_out = split([*texts, texts[3], b""])
    assert split(texts[::-1]) == (train, held_out)
    assert len(train) + len(held_out) == sum(map(len, texts))
    for one in texts:
        assert (one in train) != (one in held_out)
    assert 0.05 < len(held_out) / sum(map(len, texts)) <= 0.1


def test_split_holds_out_the_smaller_of_two_texts_and_the_end_of_one():
    assert split([b"a" * 90, b"b" * 80]) == (b"a" * 90, b"b" * 80)
    assert split([b"a" * 90 + b"b" * 10]) == (b"a" * 90, b"b" * 10)


@pytest.mark.slow
def test_standard_library_is_there_and_the_same_twice():
    corpus = load_corpus(None, 129)
    assert corpus.fingerprint == load_corpus(None, 129).fingerprint
    assert len(corpus.train) > 3e6
    assert len(corpus.held_out) > 3e5


def test_batches_depend_on_seed_and_step_alone(text):
    corpus = load_corpus(text, 17)
    first = corpus.batch(0, 3, 4, 17)
    torch.rand(5)
    assert torch.equal(first, corpus.batch(0, 3, 4, 17))
    assert not torch.equal(first, corpus.batch(0, 4, 4, 17))
    assert not torch.equal(first, corpus.batch(1, 3, 4, 17))
    train = bytes(corpus.train.tolist())
    assert all(bytes(window.tolist()) in train for window in first)


def test_held_out_windows_reach_from_end_to_end(text):
    corpus = load_corpus(text, 17)
    windows = corpus.held_out_windows(17)
    assert torch.equal(windows[0], corpus.held_out[:17].long())
    assert torch.equal(windows[-1], corpus.held_out[-17:].long())


@pytest.mark.slow
def test_without_gradients_the_curve_is_the_same(text):
    """50 steps of Mini, `make demo ARGS="--gradients none"`: within a few bits of float32, 6e-8 each (seen: 1.6e-7)."""
    corpus = load_corpus(text, 65)
    curves = []
    for gradients in demo_training.GRADIENTS:
        run = Run(config(corpus, "mini", gradients=gradients, scale=128.0, batch=8, sequence=64, steps=600), corpus)
        for _ in range(50):
            run.advance()
            assert gradients == "stored" or all(p.grad is None for p in run.model.parameters())
        curves.append(run.history.training_loss)
    stored, freed, none = curves
    assert freed == stored
    assert none == pytest.approx(stored, rel=1e-6, abs=0)
    assert stored[-1] < 0.8 * stored[0]


@pytest.mark.slow
def test_methods_share_initial_weights_and_batches(text, tmp_path, monkeypatch):
    seen: dict[str, list[torch.Tensor]] = {}
    advance, batch = Run.advance, Corpus.batch

    def record_batch(corpus, *inputs):
        windows = batch(corpus, *inputs)
        seen[current[-1]].append(windows)
        return windows

    def record_advance(run):
        current.append(run.config.method)
        if run.step == 0:
            seen[run.config.method] = [p.detach().clone() for p in run.model.parameters()]
        advance(run)

    current: list[str] = []
    monkeypatch.setattr(Corpus, "batch", record_batch)
    monkeypatch.setattr(Run, "advance", record_advance)
    assert cli.main(arguments(text, tmp_path)) == 0
    first = seen["adamw"]
    assert tuple(seen) == METHODS
    for method in METHODS:
        assert len(seen[method]) == len(first)
        assert all(torch.equal(a, b) for a, b in zip(first, seen[method], strict=True))


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed: int) -> torch.Tensor:
        return demo_training.make_model("tiny", SEQUENCE, seed).lm_head.weight

    first = weights(0)
    torch.rand(5)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_an_output_folder_that_cannot_be_made_is_named(text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(arguments(text, tmp_path / "file" / "out")) == 2
    assert f"--out {tmp_path / 'file' / 'out'}: the folder cannot be made" in capsys.readouterr().err


def test_outputs_agree_with_each_other(finished):
    rows = rows_of(finished)
    assert [(row["method"], int(row["step"])) for row in rows] == [(m, s) for m in METHODS for s in range(STEPS + 1)]
    assert all(int(row["tokens"]) == int(row["step"]) * BATCH * SEQUENCE for row in rows)
    assert all((row["training_loss"] == "") == (row["step"] == "0") for row in rows)
    summary = json.loads((finished / "results.json").read_text())["methods"]
    for method in METHODS:
        held_out = [float(row["held_out_loss"]) for row in rows if row["method"] == method and row["held_out_loss"]]
        assert held_out[-1] == summary[method]["held_out_loss"] < held_out[0] - 0.3
    picture = (finished / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
    assert (width, height) == (900, 500)
    assert len(picture) < 150_000


def test_state_bytes_are_those_of_the_real_tensors(finished):
    summary = json.loads((finished / "results.json").read_text())
    for method in METHODS:
        state = torch.load(finished / f"{method}.checkpoint")["optimizer"]["state"]
        tensors = [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
        expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert summary["methods"][method]["state_bytes"] == expected
    # Two float32 moments a parameter, and a step count each for 2 layers of 9 tensors, two embeddings and a norm.
    assert summary["methods"]["adamw"]["state_bytes"] == 8 * summary["parameters"] + 4 * (2 * 9 + 3)


def test_learning_rate_warms_up_and_falls_to_a_tenth(text):
    rates = [config(load_corpus(text, 17), steps=100).learning_rate_at(step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == rates[9] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_settings_reach_the_optimizer(text):
    corpus = load_corpus(text, 17)
    apollo = Run(config(corpus), corpus).optimizer.param_groups[0]
    assert (apollo["rank"], apollo["scale_type"], apollo["scale"], apollo["update_proj_gap"]) == (
        8,
        "channel",
        "auto",
        200,
    )
    mini = Run(config(corpus, "mini"), corpus).optimizer.param_groups[0]
    assert (mini["rank"], mini["scale_type"], mini["scale"], mini["disable_nl"]) == (1, "tensor", "auto", False)
    assert Run(config(corpus, "mini", scale=4.0), corpus).optimizer.param_groups[0]["scale"] == 4.0
    assert Run(config(corpus, "adamw"), corpus).optimizer.defaults["weight_decay"] == 0


def test_held_out_loss_is_that_of_the_next_byte(text):
    corpus = load_corpus(text, 17)
    run = Run(config(corpus), corpus)
    run.evaluate()
    windows = corpus.held_out_windows(17)
    expected = run.model(input_ids=windows, labels=windows).loss
    assert run.history.held_out_loss[0] == pytest.approx(expected.item(), rel=1e-5)


def test_a_folder_of_text_is_read_recursively(tmp_path, capsys):
    inner = tmp_path / "text" / "inner"
    inner.mkdir(parents=True)
    for index in range(20):
        (inner / f"{index}.md").write_text(f"{index} is a number. " * 20)
    (inner / "picture.png").write_bytes(b"\x89" * 10**6)
    out = tmp_path / "out"
    assert cli.main(arguments(tmp_path / "text", out, "--methods", "mini", "--lr", "2e-3", "--scale", "128")) == 0
    corpus = load_corpus(tmp_path / "text", 17)
    assert 137 not in corpus.train
    assert len(rows_of(out)) == STEPS + 1
    settings = json.loads((out / "results.json").read_text())["methods"]["mini"]["settings"]
    assert (settings["learning_rate"], settings["scale"]) == (2e-3, 128.0)
    assert "APOLLO-Mini" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere"], "nowhere: there is no such file"),
        (["--sequence", "5000"], "argparse.py: too little text"),
        (["--data", os.devnull], f"--data: {os.devnull} is a pipe or a device; a file is needed"),
        (["--sequence", "0"], "--sequence 0"),
        (["--model", "2M"], "allowed: tiny, 0.3M, 1M, 60M"),
        (["--methods", "adamw,sgd"], "'sgd' is not a method (allowed: adamw, apollo, mini)"),
        (["--lr", "-1"], "--lr -1.0: a learning rate is a finite number, 0 or more"),
        (["--lr", "nan"], "0 or more"),
        (["--scale", "0"], "--scale 0: it must be a number above 0, or auto"),
        (["--scale", "Auto"], "--scale Auto: it must be a number above 0, or auto"),
        (["--gradients", "some"], "--gradients some: allowed are stored, freed, none"),
        (["--seed", "-1"], "--seed -1"),
        (["--steps", "0"], "--steps 0"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "tpu"], "cpu, cuda and auto"),
        (["--resume"], "holds no run"),
    ],
)
def test_a_wrong_input_is_one_line_and_status_2(text, tmp_path, capsys, more, message):
    assert cli.main(arguments(text, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("width", [80, 60])
def test_table_fits_into_its_columns_and_loses_no_figure(width):
    from rich.console import Console

    history = History([2.0], {1: 2.0}, [12.3456], [1e-3])
    results = [
        Result(RunConfig(method, 1.25e-05, None, "1M", 1, 64, 1024, 0, "cpu", ""), history, 10**9, 10**9 - 1)
        for method in METHODS
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(results))
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    assert width < 80 or ("12345.6 ms" in printed and "65,536,000" in printed)


@pytest.mark.parametrize(("evaluations", "shows_seeds"), [(2, False), (20, True)])
def test_the_picture_keeps_to_its_methods_colours_and_within_its_edges(tmp_path, monkeypatch, evaluations, shows_seeds):
    """See ``check_picture``; a direction of better, a machine, a rank or a seed that it does not say."""
    figures = record_figures(monkeypatch)
    results, seeds = [], {}
    for index, method in enumerate(METHODS):
        curve = {step: 8.0 / step - index / 20 for step in range(600 // evaluations, 601, 600 // evaluations)}
        made = RunConfig(method, 1e-2, None, "1M", 600, 8, 128, 7, "cpu", "")
        results.append(Result(made, History(held_out_loss=curve), 10**9, 10 ** (9 - index)))
        seeds[method] = {7: curve[600], 8: curve[600] + 0.03}
    machine = "Some Vendor's Very Large Processor 9999X with 128 Cores @ 3.70 GHz, 128 cores"
    draw(results, machine, tmp_path / "losses.png", seeds if shows_seeds else None)
    figure = figures["losses"]
    check_picture(figure, {"AdamW", "APOLLO", "APOLLO-Mini"})
    (title, about), (losses, states) = (" ".join(text.get_text().split()) for text in figure.texts), figure.axes
    assert "LLaMA 1M" in title
    assert f"{machine}, float32" in about
    assert "one run, seed 7" in about
    assert "lower is better" in losses.get_title(loc="left")
    assert "less is better" in states.get_title(loc="left")
    labels = [text.get_text().partition(":")[0] for text in losses.get_legend().get_texts()]
    assert labels == ["AdamW", "APOLLO, rank 48", "APOLLO-Mini, rank 1", "seeds 7, 8 at the end"][: 3 + shows_seeds]
