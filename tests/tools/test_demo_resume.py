"""The demo goes on where it was interrupted, to the same bits, and refuses what it cannot go on with."""

from __future__ import annotations

import os

import pytest
import torch
from demo_cases import METHODS, STEPS, arguments, config

from apollo_triton import cli
from apollo_triton.tools import checkpoints
from apollo_triton.tools.demo import command as demo
from apollo_triton.tools.demo import training as demo_training
from apollo_triton.tools.demo.corpus import load_corpus
from apollo_triton.tools.demo.training import Run

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "steps_done", "seconds_between_checkpoints"),
    [
        ("apollo", 7, 0),
        ("mini", 11, 1000),
        *(
            pytest.param(*each, marks=pytest.mark.full)
            for each in (("adamw", 1, 0), ("adamw", 1, 1000), ("apollo", 7, 1000), ("mini", 11, 0))
        ),
    ],
)
def test_resume_equals_an_uninterrupted_run(
    text, finished, tmp_path, monkeypatch, capsys, method, steps_done, seconds_between_checkpoints
):
    monkeypatch.setattr(demo, "SECONDS_BETWEEN_CHECKPOINTS", seconds_between_checkpoints)
    monkeypatch.setattr(demo_training, "EVALUATIONS", 4)
    assert cli.main(arguments(text, tmp_path / "whole")) == 0
    advance = Run.advance

    def interrupted(run):
        advance(run)
        if run.config.method == method and run.step == steps_done:
            raise KeyboardInterrupt

    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "advance", interrupted)
        assert cli.main(arguments(text, out)) == 130
    assert "--resume" in capsys.readouterr().out
    assert not (out / "losses.csv").exists()
    steps_after = 0

    def counted(run):
        nonlocal steps_after
        steps_after += 1
        advance(run)

    monkeypatch.setattr(Run, "advance", counted)
    assert cli.main(arguments(text, out, "--resume")) == 0
    methods_left = len(METHODS) - METHODS.index(method)
    assert steps_after < methods_left * STEPS or steps_done < 3
    assert (out / "losses.csv").read_bytes() == (tmp_path / "whole" / "losses.csv").read_bytes()
    for name in METHODS:
        one, other = (torch.load(folder / f"{name}.checkpoint") for folder in (out, tmp_path / "whole"))
        assert one["step"] == STEPS
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in other["model"])
        for state, expected in zip(
            one["optimizer"]["state"].values(), other["optimizer"]["state"].values(), strict=True
        ):
            assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(expected[key])) for key in expected)


def test_an_interrupted_demo_without_a_checkpoint_does_not_offer_to_resume(text, tmp_path, monkeypatch, capsys):
    """Ctrl-C before the first evaluation has ended: --resume would be refused."""

    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "evaluate", interrupted)
    assert cli.main(arguments(text, tmp_path)) == 130
    found = capsys.readouterr().out
    assert "No checkpoint was saved yet" in found
    assert "--resume" not in found


def test_a_failed_save_leaves_the_old_checkpoint(text, tmp_path, monkeypatch):
    corpus = load_corpus(text, 17)
    run = Run(config(corpus), corpus)
    run.save(tmp_path / "a.checkpoint")

    def half_written(saved, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    run.advance()
    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        run.save(tmp_path / "a.checkpoint")
    run.load(tmp_path / "a.checkpoint")
    assert run.step == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "13"], "steps 12, not 13"),
        (["--lr", "0.5"], "learning rate"),
        (["--scale", "3"], "scale"),
        (["--seed", "1"], "seed 0, not 1"),
    ],
)
def test_resume_with_other_settings_names_them_and_changes_nothing(text, finished, capsys, more, message):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert cli.main(arguments(text, finished, "--resume", *more)) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_resume_looks_at_all_checkpoints_before_it_trains(text, finished, tmp_path, capsys):
    (tmp_path / "mini.checkpoint").write_bytes((finished / "mini.checkpoint").read_bytes())
    assert cli.main(arguments(text, tmp_path, "--resume", "--seed", "1")) == 2
    assert "mini.checkpoint was made with seed 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mini.checkpoint"]


@pytest.mark.parametrize("kept", [0, 1000, -1000])
def test_resume_of_a_damaged_checkpoint_says_so(text, finished, tmp_path, capsys, kept):
    whole = (finished / "adamw.checkpoint").read_bytes()
    (tmp_path / "adamw.checkpoint").write_bytes(whole[:kept] if kept else b"half")
    assert cli.main(arguments(text, tmp_path, "--resume")) == 2
    error = capsys.readouterr().err
    assert "adamw.checkpoint does not end in its checksum: it is not whole" in error
    assert "delete it, or leave --resume away" in error
    assert error.count("\n") == 1


def sealed(path, value):
    torch.save(value, path)
    checkpoints.seal(path)


BROKEN = {
    "a number": (lambda saved: 3, "holds 3, not a dictionary"),
    "nothing": (lambda saved: {}, "its config is None, which is no dict"),
    "steps": (lambda saved: saved | {"step": "12"}, "its step is '12', which is no int"),
    "more steps": (lambda saved: saved | {"step": 99}, "its losses are not those of 99 steps"),
    "losses": (lambda saved: saved | {"history": {}}, "its losses are not those of 12 steps"),
    "config": (lambda saved: saved | {"config": {"steps": "\x1b[2J"}}, "made with"),
    "weights": (lambda saved: saved | {"model": {"\x1b[2J": torch.ones(2)}}, "does not fit this run"),
    "a state": (lambda saved: saved | {"optimizer": {"state": 1, "param_groups": 2}}, "does not fit this run"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_resume_of_a_whole_file_with_something_else_says_so(text, finished, tmp_path, capsys, kind):
    """Tracebacks of KeyError, TypeError and RuntimeError, or what a file says on the terminal."""
    change, message = BROKEN[kind]
    path = tmp_path / "adamw.checkpoint"
    sealed(path, change(torch.load(finished / "adamw.checkpoint")))
    assert cli.main(arguments(text, tmp_path, "--resume", "--methods=adamw")) == 2
    error = capsys.readouterr().err
    assert f"{path} " in error
    assert message in error
    assert error.count("\n") == 1
    assert error.strip().isprintable()


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "of an older version"])
def test_resume_of_what_is_no_checkpoint(text, finished, tmp_path, capsys, kind):
    """A FIFO, which would be waited for; a file of before the checksums, which could hide any damage."""
    path = tmp_path / "adamw.checkpoint"
    {
        "a FIFO": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "of an older version": lambda: torch.save(torch.load(finished / "adamw.checkpoint"), path),
    }[kind]()
    assert cli.main(arguments(text, tmp_path, "--resume")) == 2
    error = capsys.readouterr().err
    assert f"{path} " in error
    assert error.count("\n") == 1


def test_where_nothing_can_be_written(text, tmp_path, capsys, monkeypatch):
    """An error after minutes of training, or a checkpoint that is deleted before it."""
    kept = tmp_path / "mini.checkpoint"
    kept.write_bytes(b"kept")
    (tmp_path / "losses.png").mkdir()
    assert cli.main(arguments(text, tmp_path)) == 2
    assert f"--out {tmp_path}: losses.png is a folder there; move it away" in capsys.readouterr().err

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(demo.tempfile, "TemporaryFile", refuse)
    assert cli.main(arguments(text, tmp_path)) == 2
    assert f"--out {tmp_path}: nothing can be written there (Permission denied)" in capsys.readouterr().err
    assert kept.read_bytes() == b"kept"
