"""``python -m bench.gpu_check``: a lent GPU is gone after minutes, so nothing of it may fail for a typo there."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")

from apollo_triton.core import gpu
from bench import report_gpu_check, stage
from bench.contenders import CONTENDERS
from bench.gpu_check import __main__ as command
from bench.gpu_check import (
    changes,
    compilation,
    processes,
    pytest_plugin,
    races,
    rehearsal,
    shapes,
    stages,
    suite,
    validation,
)
from bench.report_data import Machine, load
from bench.results_file import Results, describe

ROOT = Path(__file__).parents[2]
PATTERNS = (stages.OPTIMIZERS, stages.REPLAYS)


def rows_of(folder):
    return {
        path.stem: {row["id"]: row for row in json.loads(path.read_text())["rows"]} for path in folder.rglob("*.json")
    }


@pytest.mark.slow
def test_a_rehearsal(tmp_path, monkeypatch, capsys):
    """A stage that does not run, or writes no file; too many files or large ones; a failed test without its values; an
    error of a compiler, a peer or a change that ends its stage or is not told; a second call that measures again what
    the first did, or that ends at a stage that fails; a report without what the files say."""
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "KeyError: 'fails on purpose'" in said
    files = list(tmp_path.rglob("*.json"))
    first = rows_of(tmp_path)
    assert sorted(first) == sorted(stages.FILES)
    assert len(files) <= 8
    assert max(path.stat().st_size for path in files) < 200_000
    assert all(row["right"] for row in first["gpu_check-float64"].values())
    tests = first["gpu_check-tests"]
    (failure,) = (row for name, row in tests.items() if name.startswith("failed: "))
    assert "1.5 == 2.5" in failure["text"]
    (counts,) = (row["counts"] for name, row in tests.items() if name.startswith("file: "))
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert [row["missed"] for row in first["gpu_check-validate"].values()] == [[], []]
    assert set(first["gpu_check-changes"]) == {change.name for change in changes.CHANGES}
    for change in changes.CHANGES:
        row = first["gpu_check-changes"][change.name]
        assert "skipped" not in row, row
        assert len(row["after_ms"]) == 3
        assert ("before_ms" in row) == bool(change.before)
    steps = first["whole_step-7B-matrices"]
    assert len(steps["TOY matrices 1 layers bfloat16: Q-APOLLO"]["ms"]) == 3
    assert steps["TOY matrices 1 layers bfloat16: flashoptim AdamW"]["skipped"] == "flashoptim is not installed"
    replays = first["whole_step-models"]
    assert replays["TOY bfloat16: APOLLO, graph replay"]["skipped"] == "it needs a CUDA device"
    assert len(first["training-7B"]) == 4
    assert all(row["peak_bytes"] > 0 for row in first["training-7B"].values())
    assert all(row["held_out_loss"] > 0 for row in first["pretrain-minutes"].values())

    assert report_gpu_check.gpu_check(Machine("empty", {})) == ""
    text = report_gpu_check.gpu_check(load(tmp_path)[1][0])
    assert "| float32, rank 16, 48 x 40 | 1 | 0 of 768 | 0 |" in text
    assert "2 of 2 right" in text
    assert "`pytest -m gpu`: 1 passed, 1 failed, 1 skipped." in text
    assert "test_fails_on_purpose` | `assert 1.5 == 2.5` |" in text
    assert "2 of 2 cases within their limits" in text
    assert all(f"| {change.row} | {change.contender}, rank {change.rank}" in text for change in changes.CHANGES)

    # The second call: one stage lacks a row, as if it had been cut off, and cannot get it; one before it fails.
    gone, (path,) = (
        "clipping without a third read: APOLLO-Mini, clipped, rank 1, bfloat16",
        tmp_path.rglob("gpu_check-changes.json"),
    )
    file = json.loads(path.read_text())
    file["rows"] = [row for row in file["rows"] if row["id"] != gone]
    path.write_text(json.dumps(file))
    monkeypatch.setattr(command, "CHECKS", [check for check in stages.CHECKS if check.name[:2] in ("c:", "e:")])
    monkeypatch.setattr(validation, "default_cases", lambda on_gpu: 1 / 0)
    monkeypatch.setattr(changes, "measured", lambda *rest: 1 / 0)
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert re.search(r"c: validate +failed\ne: changes +done", capsys.readouterr().out)
    second = rows_of(tmp_path)
    assert second["gpu_check-changes"].pop(gone)["skipped"] == "it failed: ZeroDivisionError: division by zero"
    del first["gpu_check-changes"][gone]
    assert second == first
    text = report_gpu_check.gpu_check(load(tmp_path)[1][0])
    assert "third read | APOLLO-Mini, clipped, rank 1, bfloat16 | not measured: it failed: ZeroDivisionError" in text


def test_the_budget_is_kept_and_what_is_left_goes_to_what_was_cut_off():
    """Limits that add up to more than the minutes; a stage that runs after the end, or is forgotten; a stage that
    failed and is started again; time that stages leave and nobody takes."""
    now, limits = 0.0, []

    def run(check):
        nonlocal now
        limits.append((check.name, check.seconds))
        wanted = {"a": 30, "b": 500, "c": 10, "d": 5}[check.name]
        now += min(wanted, check.seconds)
        return stage.FAILED if check.name == "d" else stage.CUT_OFF if wanted > check.seconds else stage.DONE

    checks = [
        stages.Check(name, name, (), seconds) for name, seconds in (("a", 100), ("b", 100), ("c", 100), ("d", 50))
    ]
    outcomes = command.in_order(checks, 60 * stages.MINUTES - command.RESERVE, run, clock=lambda: now)
    assert limits == [("a", 100), ("b", 100), ("c", 100), ("d", 50), ("b", 470 - 145)]
    assert outcomes == {"a": stage.DONE, "b": stage.CUT_OFF, "c": stage.DONE, "d": stage.FAILED}
    assert command.finished(outcomes, []) == 1
    now, limits = 0.0, []  # half the time, of which the second stage takes the rest
    checks[1] = stages.Check("b", "b", (), 1000)
    outcomes = command.in_order(checks, 235, run, clock=lambda: now)
    assert limits == [("a", 50), ("b", 205)]
    assert outcomes == {"a": stage.DONE, "b": stage.CUT_OFF, "c": stage.CUT_OFF, "d": stage.CUT_OFF}
    assert command.finished(outcomes, []) == 0
    assert sum(check.seconds for check in stages.CHECKS) <= 60 * stages.MINUTES - command.RESERVE


def test_what_hangs_is_given_up_before_its_stage_ends():
    """A job or a test that hangs until its stage is killed: no row says so, and the next call hangs there again."""
    limits = {check.name[0]: check.seconds for check in stages.CHECKS}
    assert processes.LONGEST_JOB < min(limits["a"], limits["c"])
    assert suite.LONGEST_TEST < limits["b"] / 2


def test_it_goes_on_from_the_files_of_the_checkout(tmp_path, monkeypatch):
    """A check of a machine that is gone: its files of bench/results are not found, those of another are taken, or what
    is newer is overwritten."""
    monkeypatch.setattr("bench.results_file.describe", lambda device: describe("cpu") | {"name": "Some GPU"})
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    for folder, name in (("some-gpu", stages.FILES[0]), ("some-gpu", stages.FILES[1]), ("some-gpu", "kernels")):
        (earlier / folder).mkdir(parents=True, exist_ok=True)
        (earlier / folder / f"{name}.json").write_text("earlier")
    (earlier / "other-gpu").mkdir()
    (earlier / "other-gpu" / f"{stages.FILES[2]}.json").write_text("other")
    (out / "some-gpu").mkdir(parents=True)
    (out / "some-gpu" / f"{stages.FILES[1]}.json").write_text("newer")
    command.carry_over(earlier, out)
    found = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*.json")}
    assert found == {f"some-gpu/{stages.FILES[0]}.json": "earlier", f"some-gpu/{stages.FILES[1]}.json": "newer"}


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "0.4"])
def test_minutes_that_no_stage_fits_into_are_refused(minutes):
    """A limit of no number, and a least in the message that is refused itself."""
    with pytest.raises(SystemExit, match=r"the least is 0\.5"):
        command.main(["--rehearse", "--minutes", minutes])


def test_a_folder_that_takes_no_file_ends_the_check_at_once(tmp_path):
    """Eight minutes of stages that fail one after another when they write their first row."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit, match="no file can be written to"):
            command.main(["--rehearse", "--out", str(folder)])


def test_what_is_not_right_is_said_at_the_end(tmp_path, capsys):
    """A kernel that is wrong, a measure that missed and a test that failed, under stages that are all "done" and with
    exit status 0. A peer that is not installed is no fault."""
    rows = {
        "gpu_check-float64": {"race: a": {"right": False}, "race: b": {"right": True}, "shape: c": {"skipped": "no"}},
        "gpu_check-tests": {"missing": {"missing": ["xdist"]}, "failed: d": {}, "file: e": {"counts": {}}},
        "gpu_check-validate": {"f": {"missed": ["R"]}, "g": {"missed": []}},
        "whole_step-models": {"h": {"skipped": "a peer is not installed"}},
    }
    for name, of_file in rows.items():
        file = Results(name, folder=tmp_path)
        for identity, row in of_file.items():
            file.add(identity, **row)
    wrong = command.not_right(tmp_path, "cpu")
    assert wrong == ["race: a", "shape: c", "failed: d", "f"]
    assert command.finished({"a": stage.DONE}, wrong) == 1
    assert "4 not right:\n  race: a\n" in capsys.readouterr().out
    assert command.finished({"a": stage.DONE}, []) == 0


def test_without_pytest_the_other_stages_run(tmp_path, monkeypatch):
    """The rehearsal, or the stage of the tests, that ends with an ImportError where pytest is not installed."""
    for name in ("suite", "pytest_plugin"):
        monkeypatch.delitem(sys.modules, f"bench.gpu_check.{name}")
    monkeypatch.setattr("bench.gpu_check.suite", suite)  # afterwards
    monkeypatch.setitem(sys.modules, "pytest", None)
    anew = importlib.import_module("bench.gpu_check.suite")
    monkeypatch.setattr(anew.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("APOLLO_RESULTS", str(tmp_path))
    anew.main(["--device", "cpu"])
    assert Results(anew.NAME).rows["missing"]["missing"] == list(suite.MISSING_HERE)


def test_a_pytest_that_does_not_start_is_a_row(results, monkeypatch, tmp_path):
    """An option that this pytest does not know: the stage would be done, with no test run."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho unrecognized arguments\nexit 4\n")
    program.chmod(0o755)
    monkeypatch.setattr(suite.sys, "executable", str(program))
    file = results()
    suite.run([], tmp_path, file)
    row = file.rows["failed: pytest"]
    assert row["skipped"] == "pytest ended with exit code 4"
    assert row["text"] == "unrecognized arguments\n"


def _job(number):
    if number == 1:
        raise ValueError("first line\nsecond")
    if number == 2:
        os._exit(3)
    if number == 3:
        time.sleep(60)
    return 10 * number


def test_a_job_that_raises_dies_or_hangs_stops_no_other(monkeypatch):
    monkeypatch.setattr(processes, "START_METHOD", "fork")
    done = {each.job: each for each in processes.in_parallel(_job, range(5), workers=2, seconds=0.5)}
    assert sorted(done) == list(range(5))
    assert (done[0].result, done[4].result) == (0, 40)
    assert done[1].problem == "ValueError: first line second"
    assert done[2].problem == "its process ended with exit code 3"
    assert done[3].problem == "it took longer than 0.5 seconds"


def test_every_kernel_is_launched_by_an_odd_shape(monkeypatch):
    """A kernel that was added, or that a shape no longer takes: nobody would run it on a GPU."""
    launched = set()
    monkeypatch.setattr(gpu, "launch", lambda kernel, *rest, **constants: launched.add(kernel.__name__))
    monkeypatch.setattr("apollo_triton.core.device_backend._obstacle", lambda device: None)
    for shape in shapes.SHAPES:
        if shape.shapes != shapes.LARGEST:  # of kernels that smaller ones launch
            shapes.trained(shape, "cpu", "kernels")
    defined = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"(?m)^def (\w+_kernel)\(", path.read_text())
    }
    assert launched == defined


def test_a_race_is_seen(monkeypatch):
    """Elements that are wrong, or that have other bits the second time, and an update's norm that is off."""
    race = races.Race(4, races.torch.float32, (24, 16), 2)
    real, calls = races._step, []

    def step(optimizer, weight):
        R, norm = real(optimizer, weight)
        calls.append(R)
        if len(calls) == 3:  # the first run of the second repetition
            R[5, 2:] *= 1 + 1e-4
        return R, norm * (1.001 if len(calls) > 4 else 1)

    monkeypatch.setattr(races, "_step", step)
    row = races.measured(race, "cpu")
    assert not row["right"]
    assert row["wrong_and_other_bits"] == {"1": [2, 2]}
    assert (row["wrong"], row["other_bits"], row["repetitions_with_errors"]) == (2, 2, 1)
    assert row["norm_error"] < 1e-6
    row = races.measured(race, "cpu")
    assert not row["wrong"]
    assert row["norm_error"] == pytest.approx(1e-3, rel=1e-2)
    assert not row["right"]


def test_tests_that_passed_are_left_out_and_one_that_failed_is_run_again(results, monkeypatch, tmp_path):
    """A second call that runs all tests again, or none; a failure that stays when it passes; texts without end."""
    kept = results()
    note = {"seconds": 1.0, "text": "E  assert 1 == 2"}
    suite.keep(
        [{"name": "t.py::a", "outcome": "passed", **note}, {"name": "t.py::b", "outcome": "failed", **note}], kept
    )
    assert kept.rows["file: t.py"]["counts"] == {"passed": 1, "failed": 1}
    passed = tmp_path / "passed"
    passed.write_text("\n".join(row["passed"] for row in results().rows.values() if "passed" in row))
    monkeypatch.setenv("GPU_CHECK_PASSED", str(passed))
    items = [type("Item", (), {"nodeid": f"t.py::{name}"}) for name in ("a", "b", "a2")]
    gone = []
    config = type("Config", (), {"hook": type("Hook", (), {"pytest_deselected": lambda items: gone.extend(items)})})
    pytest_plugin.pytest_collection_modifyitems(config, items)
    assert pytest_plugin.pytest_collection_modifyitems.pytest_impl["trylast"]  # or conftest.py misses what passed
    assert [item.nodeid for item in items] == ["t.py::b", "t.py::a2"]
    again = results()
    suite.keep([{"name": "t.py::b", "outcome": "passed", **note}], again)
    assert again.rows["file: t.py"]["counts"] == {"passed": 2, "failed": 0}
    assert list(again.rows) == ["file: t.py"]
    suite.keep([{"name": f"t.py::{index}", "outcome": "failed", **note} for index in range(200)], again)
    assert sum("text" in row for row in again.rows.values()) == suite.MOST_TEXTS
    assert sum(name.startswith("failed: ") for name in results().rows) == 200


def waiting_for_a_clock(page):
    """The first cells of the table under the heading "Waiting for a clock"."""
    section = page.partition("\n## Waiting for a clock\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1].strip() for line in lines[2:]]


def test_every_row_that_waits_for_a_clock_has_an_entry():
    """A change that is said to wait for a GPU, and that nothing would time there; an entry whose row is gone."""
    table = "| change | proven |\n|---|---|\n| one | 2 |\n| `two` \\|x\\| | 3 |\n"
    planted = f"# A\n\n## Waiting for a clock\n\n{table}\n## B\n| c |\n"
    assert waiting_for_a_clock(planted) == ["one", r"`two` \|x\|"]
    rows = waiting_for_a_clock((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    names = [change.name for change in changes.CHANGES]
    assert len(set(names)) == len(names)
    if rows:
        assert set(rows) == {change.row for change in changes.CHANGES}


def test_an_old_way_differs_from_the_new_one_only_while_it_steps():
    """A patch that has no effect where kernels are launched, or that stays."""
    from apollo_triton.kernels import apply, sketch

    with changes._patched(("apply on 8 warps", "no more than 2 tiles ahead")):
        assert apply.blocks(512, True) == {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 512, "num_warps": 8}
        assert sketch.stages(256, tile=1) == 2
    assert apply.blocks(512, True)["num_warps"] == 4
    assert sketch.stages(256, tile=1) > 2
    assert set().union(*(change.before for change in changes.CHANGES)) <= set(changes.OLD)


def test_what_is_timed_is_compiled_before():
    """A stage that compiles one kernel after another while the GPU waits."""
    jobs = list(compilation.everything())
    steps = {(job.contender, job.dtype, job.rank) for job in jobs if isinstance(job, compilation.Step)}
    assert {("APOLLO", "bfloat16", 256), ("APOLLO", "float32", 256), ("Q-Mini", "bfloat16", 256)} <= steps
    assert {("APOLLO, graph replay", "bfloat16", rank) for rank in (128, 512)} <= steps
    assert not any("PyTorch" in name for name, _, _ in steps)
    assert [job for job in jobs if isinstance(job, changes.Change)] == list(changes.CHANGES)
    raced = {(job.rank, job.dtype) for job in jobs if isinstance(job, races.Race)}
    assert raced == {(race.rank, race.dtype) for race in races.races(large=True)}


def test_a_gpu_s_arguments_are_understood(monkeypatch):
    """An option that a benchmark does not have, or has no longer: the rehearsal gives it others."""

    class Parsed(Exception):
        pass

    real = argparse.ArgumentParser.parse_args

    def parse(parser, arguments):
        real(parser, arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for check in stages.CHECKS:
        with pytest.raises(Parsed):
            rehearsal.MODULES[check.module].main(list(check.arguments))


def test_who_takes_part_in_whole_steps():
    """A contender of the table that a pattern leaves out, or one that takes the minutes of the others."""
    chosen = {pattern: {name for name in CONTENDERS if re.fullmatch(pattern, name)} for pattern in PATTERNS}
    ours = {f"{name}{how}" for name in ("APOLLO", "APOLLO-Mini") for how in ("", ", clipped", ", stochastic")}
    peers = {"PyTorch SGD, fused", "PyTorch AdamW, fused", "PyTorch Muon", "flashoptim AdamW", "apollo-torch"}
    peers |= {"apollo-torch, Mini", "adafactor8bit, Mini", "adafactor8bit, APOLLO"}
    assert chosen[stages.OPTIMIZERS] == ours | {"Q-Mini", "Q-APOLLO"} | peers
    replayed = {"APOLLO", "APOLLO-Mini", "PyTorch AdamW, fused"}
    expected = replayed | {f"{name}, graph replay" for name in replayed} | {"PyTorch SGD, fused"}
    assert chosen[stages.REPLAYS] == expected
