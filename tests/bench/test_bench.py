"""What the benchmarks promise: nothing measured is lost or mixed up, and no peer stops the others."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from apollo_triton import APOLLOAdamW
from apollo_triton.core import gpu
from apollo_triton.tools.llama import meta_model, named_sizes
from bench import __main__ as stages
from bench import (
    clock,
    contenders,
    host_overhead,
    kernels,
    parameter_sets,
    pretrain_data,
    report_data,
    report_tables,
    results_file,
    step_measures,
    training,
    verbs,
    whole_step,
)
from bench.contenders import CONTENDERS, MINI, Contender, bytes_to_move, state_bytes
from bench.parameter_sets import Shapes, llama_shapes, make_weights
from bench.results_file import Results

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", named_sizes())
def test_the_parameter_sets_are_those_of_the_models(size):
    shapes = llama_shapes(size)
    model = meta_model(size)
    assert sorted(shapes.matrices + shapes.rest) == sorted(tuple(each.shape) for each in model.parameters())
    low_rank = APOLLOAdamW.mini(model).param_groups[0]["params"]
    assert sorted(shapes.matrices) == sorted(tuple(each.shape) for each in low_rank)


SMALL = Shapes([(64, 32), (32, 64)], [(32,)])


def test_state_bytes_of_ours_and_of_the_official_optimizer():
    weights = make_weights(SMALL, torch.bfloat16, "cpu")
    ours = CONTENDERS["APOLLO"].make(weights, 4, {})
    ours.step()
    moments, steps, norms = 4 * 2 * (2 * 64 * 4 + 32), 4 * 3, 4 * 2
    assert state_bytes(ours) == (moments + steps + norms, 0)
    weight, gradient = 2 * (2 * 64 * 32 + 32), 2 * (2 * 64 * 32 + 32)
    expected = 2 * weight + 2 * gradient + 2 * (moments + steps + norms)
    assert bytes_to_move(CONTENDERS["APOLLO"], ours) == expected
    quantized = CONTENDERS["Q-APOLLO"].make(weights, 4, {})
    quantized.step()
    codes, groups = 2 * 64 * 32, 2 * 64 * 32 // 128  # a scale and a zero point each, 5 bytes
    weight_int8 = codes + 5 * groups + 2 * 32
    assert bytes_to_move(CONTENDERS["Q-APOLLO"], quantized) == expected - 2 * weight + 2 * weight_int8
    official = CONTENDERS["apollo-torch"].make(weights, 4, {})
    official.step()
    projections = 2 * 2 * 4 * 32  # kept in its projectors, in the gradient's dtype, and only read
    total, fixed = state_bytes(official)
    assert fixed == projections
    assert total >= projections + 2 * 2 * (2 * 64 * 4 + 32)


def test_a_tensor_subclass_counts_what_is_inside():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1)
    shared, codes, scales = torch.zeros(8), torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    packed = TwoTensor(codes, scales)
    optimizer.state[weight] = {"a": [shared, (shared, torch.zeros(2))], "b": packed, "projection": torch.zeros(3)}
    assert state_bytes(optimizer) == (8 * 4 + 2 * 4 + 16 + 16 + 3 * 4, 3 * 4)


class Peer(torch.optim.SGD):
    """Keeps 4 MB beside its state and takes 2 MB, of them 1 MB at a time twice, in a step."""

    def __init__(self, parameters, fails_at=None):
        super().__init__(parameters, lr=1e-3)
        self.kept, self.steps, self.fails_at = torch.zeros(1 << 20), 0, fails_at

    def step(self):
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("first line\nsecond line")
        first = torch.zeros(1 << 18)
        second = torch.zeros(1 << 18)
        del first, second
        torch.zeros(1 << 18)


def contender(name, **options):
    return Contender(name, "torch", lambda weights, rank, more: Peer(weights.all, **options))


def test_extra_memory_is_the_peak_of_a_step_and_what_is_kept():
    extra = step_measures.Extra("cpu")
    with extra.profiled():
        peer = Peer([nn.Parameter(torch.zeros(4))])
        peer.step()
        with extra.measured():
            peer.step()
    assert (4 << 20) + (2 << 20) <= extra.peak <= (4 << 20) + (2 << 20) + 4096


def out_of_memory(weights, rank, more):
    raise torch.OutOfMemoryError("Tried to allocate 80 GiB")


@pytest.fixture
def case(monkeypatch, results):
    """A small case of three peers, one of which fails."""
    peers = {name: CONTENDERS[name] for name in contenders.OURS}
    peers |= {
        each.name: each for each in (contender("good"), contender("bad", fails_at=2), contender("late", fails_at=5))
    }
    peers["large"] = Contender("large", "torch", out_of_memory)
    peers["absent"] = Contender("absent", "no-such-package", CONTENDERS["APOLLO"].make)
    monkeypatch.setattr(whole_step, "CONTENDERS", peers)
    monkeypatch.setattr(whole_step, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(whole_step.Case, "shapes", SMALL)
    monkeypatch.setattr(clock, "FLUSHED_BYTES", 1 << 10)
    whole_step.bandwidth.cache_clear()
    yield whole_step.Case("60M", torch.float32, 3, tuple(peers), rank=4)
    whole_step.bandwidth.cache_clear()


def test_other_packages_come_last(results, monkeypatch):
    """A time limit that ends a case while apollo-torch runs, before this package's own variants were timed."""
    order = []
    monkeypatch.setattr(Contender, "obstacle", lambda *rest: None)
    monkeypatch.setattr(whole_step, "bandwidth", lambda device: None)
    monkeypatch.setattr(whole_step, "batches", lambda found, *rest: order.extend(each.name for each in found) or ())
    monkeypatch.setattr(whole_step.Case, "shapes", SMALL)
    given = ("apollo-torch", "Q-Mini", "flashoptim AdamW", "PyTorch SGD, fused", "APOLLO", "APOLLO, clipped")
    whole_step.measure(whole_step.Case("60M", torch.float32, 3, given, rank=4), "cpu", results())
    assert order == [*contenders.OURS, "Q-Mini", "PyTorch SGD, fused", "APOLLO, clipped", *given[:3:2]]


@pytest.mark.slow
@pytest.mark.parametrize("together", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_peer_that_fails_does_not_stop_the_others(case, results, together, monkeypatch):
    if not together:
        monkeypatch.setattr(whole_step, "available_memory", lambda: 0)
    whole_step.measure(case, "cpu", results())
    saved = json.loads(results().path.read_text())["rows"]
    rows = {row["contender"]: row for row in saved}
    assert set(rows) == {*contenders.OURS, "good", "bad", "late", "large", "absent"}
    assert rows["late"]["skipped"] == rows["bad"]["skipped"]  # at its first step that counts
    assert rows["large"]["skipped"] == "it does not fit into the memory of this device"
    assert rows["bad"]["skipped"] == "it failed: RuntimeError: first line"
    assert rows["absent"]["skipped"] == "no-such-package is not installed"
    for name in (*contenders.OURS, "good"):
        row = rows[name]
        assert 0 < row["ms"][0] <= row["ms"][1] <= row["ms"][2]
        assert row["copy_bandwidth"] == 1e9
    assert rows["APOLLO-Mini"]["times APOLLO-Mini"] == 1
    assert rows["APOLLO"]["refresh_ms"] > 0
    assert rows["good"]["refresh_ms"] is None
    assert rows["good"]["extra_bytes"] >= 6 << 20


@pytest.mark.slow
def test_a_case_goes_on_where_it_was_left(case, results, monkeypatch):
    whole_step.measure(case, "cpu", results())
    kept = results()
    stepped = []
    inner = whole_step.Stepper
    monkeypatch.setattr(
        whole_step, "Stepper", lambda contender, *more: stepped.append(contender.name) or inner(contender, *more)
    )
    ours = kept.rows[f"{case.name}: APOLLO"]
    whole_step.measure(case, "cpu", kept)
    assert stepped == [*contenders.OURS, "bad", "late", "large"]  # ours for their ratio, and those without a figure
    assert kept.rows[f"{case.name}: APOLLO"] == ours


def test_all_cases_have_names_of_their_own_and_contenders_that_exist():
    for device in ("cpu", "cuda"):
        every = whole_step.cases(device)
        assert len({each.name for each in every}) == len(every)
        assert all(set(each.contenders) <= set(CONTENDERS) for each in every)
    left = {each.name for each in whole_step.cases("cuda")}
    for stage in stages.GPU:
        if stage.module == "whole_step":
            pattern = stage.arguments[stage.arguments.index("--cases") + 1]
            chosen = {each.name for each in whole_step.cases("cuda") if re.fullmatch(pattern, each.name)}
            assert chosen, stage
            left -= chosen
    assert not left
    files = [stage.arguments[1] for stage in stages.GPU if "--name" in stage.arguments]
    assert len(set(files)) == len(files)  # none can overwrite another's


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100, 255, 256, 1000])
def test_the_largest_batch_is_found(limit, monkeypatch):
    run = training.Training.__new__(training.Training)
    tried = []
    monkeypatch.setattr(run, "_fits", lambda batch: tried.append(batch) or batch <= limit, raising=False)
    assert run.largest_batch() == min(limit, training.MOST_BATCHES)
    assert len(tried) <= 18
    assert len(set(tried)) == len(tried)


def test_a_training_is_kept_before_its_largest_batch_is_sought(results, monkeypatch):
    """A lent GPU that is gone while the largest batch is sought, with the peak and speed that were measured before; a
    row without it that is never completed; a failure there that takes the row's figures."""

    class Inline:
        def __init__(self, *rest):
            self.submit = lambda function, *given: SimpleNamespace(result=lambda: function(*given))

        __enter__ = __exit__ = lambda self, *rest: self if not rest else None

    monkeypatch.setattr(training, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(training, "METHODS", ("APOLLO",))
    monkeypatch.setattr(training, "counted", lambda *rest: 1)
    monkeypatch.setattr(training, "load_corpus", lambda *rest: SimpleNamespace(train=None))
    monkeypatch.setattr(training, "run", lambda *rest: {"peak_bytes": 5})
    monkeypatch.setattr(training, "run_largest", lambda: {"largest_batch": 9})
    kept = results()
    found = training.rows(["7B"], 1, 16, "cuda", kept)
    identity, row = next(found)
    kept.add(identity, **row)  # and now the GPU is gone
    assert row["peak_bytes"] == 5
    assert [more["largest_batch"] for _, more in list(training.rows(["7B"], 1, 16, "cuda", kept))[1:]] == [9]
    monkeypatch.setattr(training, "run_largest", lambda: 1 / 0)
    *_, (_, failed) = training.rows(["7B"], 1, 16, "cuda", kept)
    assert "division" in failed["largest_skipped"]
    assert "skipped" not in failed
    kept.add(identity, **row, largest_batch=9)
    assert list(training.rows(["7B"], 1, 16, "cuda", kept)) == []


def test_training_steps_of_a_model_are_measured(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device("meta"):
        small = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    monkeypatch.setattr(training, "meta_model", lambda size, *dtype: small)
    monkeypatch.setattr(training, "default_rank", lambda size: 8)
    tokens = torch.arange(200) % 64
    for method in ("AdamW", "APOLLO", "APOLLO-Mini"):
        row = training.run("60M", method, 2, 16, torch.float32, "cpu", tokens)
        assert row["batch"] == 2
        milliseconds = row["backward_ms"] + row["optimizer_ms"]
        assert row["tokens_per_second"] == pytest.approx(2 * 16e3 / milliseconds, rel=1e-2)
        assert training.counted(method, "60M", torch.float32) > 0


def test_known_kernels_are_left_out_and_each_is_put_down_as_it_ends(results):
    kept = results()
    kept.add("60M-512x512-rank1-apply", us=[1, 1, 1])
    keeper = kernels.Keeper(kept)
    items = [SimpleNamespace(name=f"test_verb[60M-512x512-rank{rank}-apply]") for rank in (1, 4)]
    gone = []
    keeper.pytest_collection_modifyitems(
        SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))), items
    )
    assert [item.name for item in items] == ["test_verb[60M-512x512-rank4-apply]"]
    assert len(gone) == 1
    stats = SimpleNamespace(stats=SimpleNamespace(q1=1e-6, median=2e-6, q3=4e-6))
    items[0].funcargs = {"benchmark": SimpleNamespace(stats=stats, extra_info={"bytes": 8, "share_of_copy": 1 / 3})}
    keeper.pytest_runtest_teardown(items[0])
    row = results().rows["60M-512x512-rank4-apply"]
    assert row["us"] == [1.0, 2.0, 4.0]
    assert row["share_of_copy"] == 0.3333


@pytest.mark.slow
def test_the_microbenchmarks_run(tmp_path, monkeypatch, capsys):
    """In this process, because a new one takes four seconds to import torch."""
    out = tmp_path / "out.json"
    monkeypatch.setitem(clock.COPIED_BYTES, "cpu", 1 << 16)  # small buffers, because no figure counts
    monkeypatch.setattr(clock, "FLUSHED_BYTES", 1 << 16)
    monkeypatch.setattr(clock, "_flush_buffer", cache(clock._flush_buffer.__wrapped__))
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # under a worker of pytest-xdist pytest-benchmark would turn itself off
    command = ["bench", "--benchmark-only", f"--benchmark-json={out}", "-q", "-p", "no:cacheprovider"]
    assert pytest.main([*command, "-k", "60M-512x512 and float32 and rank4-"]) == 0, capsys.readouterr().out
    figures = {each["extra_info"]["verb"]: each for each in json.loads(out.read_text())["benchmarks"]}
    assert set(figures) == {"sketch", "rescale", "sketch + rescale", "apply"}
    for each in figures.values():
        rate = each["extra_info"]["bytes"] / each["stats"]["median"]
        assert each["extra_info"]["GB_per_s"] == pytest.approx(rate / 1e9)
        assert each["stats"]["rounds"] >= 5


@pytest.mark.slow
def test_a_stage_that_fails_or_hangs_is_told_and_the_next_one_starts(monkeypatch, capfd):
    listed = [
        stages.Stage("absent", "no_such_benchmark"),
        stages.Stage("slow", "import_time", ("--rounds", "1000"), seconds=1, resumes=False),
        stages.Stage("quick", "whole_step", ("--list",), resumes=False),
    ]
    monkeypatch.setattr(stages, "CPU", listed)
    monkeypatch.setattr(stages, "COUNTED", listed)
    monkeypatch.setattr(stages, "SHORT_GPU", [])
    monkeypatch.setattr(sys, "argv", ["bench"])
    real = stages.run
    monkeypatch.setattr(stages, "run", lambda stage, fresh: stage.name == "report" or real(stage, fresh))
    assert stages.main() == 1
    said = capfd.readouterr().out
    assert "absent: it failed" in said
    assert "No module named bench.no_such_benchmark" in said
    assert "slow: it was stopped" in said
    assert "60M matrices float32" in said
    assert "Not all went well: absent, slow" in said


@pytest.mark.parametrize("from_factors", [True, False])
def test_every_timed_update_of_a_layer_updates_it(from_factors, monkeypatch):
    """A hook that has no gradient, or a layer that counts as updated already: then nothing would be timed."""
    started = []
    monkeypatch.setattr(host_overhead, "_no_launch", lambda kernel, *rest, **constants: started.append(kernel.__name__))
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    monkeypatch.setattr(host_overhead.device_backend, "_obstacle", lambda device: None)
    row = host_overhead.measured_layer(MINI, from_factors, rounds=2)
    assert row["us"] > 0
    assert row["launched_us"] > 0
    assert row["launches"] >= 2
    assert len(started) == 2 * host_overhead.UPDATES_A_ROUND * row["launches"]
    assert ("apply_operands_kernel" in started) == from_factors
    assert ("apply_kernel" in started) != from_factors


def test_the_host_s_time_of_steps_and_of_layers_has_a_row_each(tmp_path, monkeypatch):
    """A row that overwrites another's, or a figure that is measured and not kept."""
    monkeypatch.setattr(host_overhead, "Results", lambda name, **options: Results(name, folder=tmp_path, **options))
    monkeypatch.setattr(host_overhead, "MATRICES", [(64, 64), (172, 64)])
    monkeypatch.setattr(host_overhead, "install", lambda: None)  # the kernels are the interpreter's here
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    monkeypatch.setattr(sys, "argv", ["host_overhead", "--rounds", "1"])
    host_overhead.main()
    (path,) = tmp_path.rglob("host_overhead.json")
    rows = {row["id"]: row for row in json.loads(path.read_text())["rows"]}
    for method in host_overhead.GROUPS:
        figures = {"id", "stable_ms", "moved_ms", "stable_launched_ms", "moved_launched_ms", "launches"}
        assert rows.pop(f"{method}, 2 matrices").keys() == figures
        assert rows.pop(f"{method}, 2 matrices and 66 dense").keys() == figures
        for source in ("factors", "gradient"):
            assert rows.pop(f"{method}, one layer from its {source}").keys() == {"id", "us", "launched_us", "launches"}
    assert not rows


MODULES = (clock, parameter_sets, pretrain_data, report_data, report_tables, results_file, verbs)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_examples_of_the_docstrings_hold(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.slow
def test_the_kernels_are_found_in_a_checkout_that_is_not_installed(tmp_path):
    code = "import bench, apollo_triton; print(apollo_triton.__path__[-1])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / "kernels" / "table.py").is_file()
    assert MINI["rank"] == 1
