"""Results files and the clock of the benchmarks: nothing measured is lost, mixed up or timed unfairly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import (
    clock,
    results_file,
)

ROOT = Path(__file__).parents[2]


def test_rows_are_on_disk_at_once_and_a_second_run_has_them(results):
    first = results(settings={"rounds": 3})
    first.add("one", ms=1.5)
    first.add("two", ms=2.5)
    first.add("two", ms=3.5)
    saved = json.loads(first.path.read_text())
    assert saved["rows"] == [{"id": "one", "ms": 1.5}, {"id": "two", "ms": 3.5}]
    assert saved["machine"]["name"] in results_file.describe("cpu").values()
    assert {"commit", "source", "versions"} <= saved.keys()
    again = results(settings={"rounds": 3})
    assert "one" in again
    assert list(again.rows) == ["one", "two"]


def test_skipped_rows_are_tried_again(results):
    first = results()
    first.add("one", ms=1.0)
    first.add("two", skipped="no such device")
    assert list(results().rows) == ["one"]


@pytest.mark.parametrize("changed", ["settings", "versions", "source", "machine", "fresh"])
def test_rows_of_other_circumstances_do_not_count(results, changed, monkeypatch):
    results(settings={"rounds": 3}).add("one", ms=1.0)
    settings = {"rounds": 4 if changed == "settings" else 3}
    if changed == "versions":
        monkeypatch.setattr(results_file, "versions", lambda: {"torch": "0.0"})
    if changed == "source":
        monkeypatch.setattr(results_file, "source", lambda: "another")
    if changed == "machine":  # of the same name, so in the same file
        described = results_file.describe("cpu") | {"memory_GiB": 1}
        monkeypatch.setattr(results_file, "describe", lambda device: described)
    assert "one" not in results(settings=settings, fresh=changed == "fresh")


def test_an_interrupted_write_leaves_the_file_as_it_was(results, interrupted_writes):
    first = results()
    first.add("one", ms=1.0)
    before = first.path.read_text()

    with interrupted_writes(), pytest.raises(KeyboardInterrupt):
        first.add("two", ms=2.0)
    assert first.path.read_text() == before
    first.path.write_text(before[:40])  # and one that is not whole is measured again
    assert not results().rows


def test_the_source_s_fingerprint_follows_the_kernels(tmp_path, monkeypatch):
    for folder in ("apollo_triton", "kernels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text("1")
    monkeypatch.setattr(results_file, "ROOT", tmp_path)
    before = results_file.source()
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert results_file.source() != before


def test_every_contender_takes_every_place_of_a_round():
    order = []
    times = clock.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 3, "cpu")
    assert sorted(order[:3]) == ["a", "b", "c"]  # the host's time
    assert order[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert [len(each) for each in times.device.values()] == [3, 3, 3]
    assert times.host.keys() == set("abc")


def test_a_gpu_starts_when_the_host_has_enqueued_the_step(monkeypatch):
    log = []
    monkeypatch.setattr(clock, "head_start", lambda device, seconds: log.append(round(seconds, 4)))
    monkeypatch.setattr(clock, "flush", lambda device: log.append("flush"))
    clock.seconds(lambda: log.append("run"), "cpu", ahead=0.01)
    clock.seconds(lambda: log.append("run"), "cpu", ahead=10.0)
    assert log == [0.0205, "flush", "run", clock.LONGEST_HEAD_START, "flush", "run"]


def test_a_gpu_s_stopwatch_waits_at_its_second_reading_only(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, later):
            assert later is not self
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = clock.Stopwatch("cuda")
    assert stopwatch() == 0.0
    assert log == ["record"]
    assert stopwatch() == 0.25
    assert log == ["record", "record", "wait"]
    assert stopwatch() == 0.0  # it starts anew
    stopwatch.reset()  # what was measured failed
    assert [stopwatch(), stopwatch()] == [0.0, 0.25]
