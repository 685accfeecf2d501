"""The report says what the results files say, of the machine that they are from, and says where there is nothing."""

from __future__ import annotations

import json
import re
import sys

import pytest
from pictures import check_picture, record_figures

from apollo_triton import cli
from apollo_triton.tools.pictures import method_of
from bench import report, report_data, report_figures
from bench.contenders import CONTENDERS
from bench.pretrain import VARIANTS
from bench.report_data import load, mean_and_margin
from bench.results_file import RESULTS, ROOT, Results

GPU = {"name": "Some GPU", "memory_GiB": 80, "toolkit": "13.0"}
CPU = {"name": "Some CPU, 2 cores", "memory_GiB": 24}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that opens a results file of a machine that is not this one."""

    def opened(described, name, settings=None):
        monkeypatch.setattr("bench.results_file.describe", lambda device: described)
        return Results(name, folder=tmp_path / "results", settings=settings)

    return opened


def written(tmp_path):
    counted, machines = load(tmp_path / "results")
    return report.report(counted, machines, tmp_path / "pictures")


def section(text, heading):
    """From a heading to the next one of its kind."""
    return re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def add_step(results, case, contender, ms, **more):
    row = {
        **{"case": case, "size": case.split()[0], "dtype": case.split()[-1], "contender": contender, "curve": ""},
        **{"layers": None, "matrices_only": "matrices" in case, "rank": 256, "parameters": 10**9, "rounds": 30},
        **{"launches": 4, "state_bytes": 10**6, "extra_bytes": 10**5, "bytes": 8 * 10**9, "copy_bandwidth": 4e12},
        **{"refresh_ms": None, "ms": [ms - 0.1, ms, ms + 0.1], "host_ms": 0.5},
    }
    results.add(f"{case}: {contender}", **row | more)


def test_an_empty_folder_makes_a_report_without_a_figure(tmp_path):
    text = written(tmp_path)
    targets = section(text, "Targets")
    assert targets.count("not measured") == len(report.TARGETS)
    assert "reached" not in text
    assert "no GPU has run this yet" in text
    assert not (tmp_path / "pictures").exists()


def test_targets_are_judged_on_the_machines_they_are_meant_for(tmp_path, machine):
    gpu, cpu = machine(GPU, "whole_step"), None
    case = "7B matrices bfloat16"
    add_step(gpu, case, "APOLLO-Mini", 2.5, **{"times APOLLO-Mini": 1.0})  # 8 GB at 4 TB/s are 2 ms: 80 %
    add_step(gpu, case, "APOLLO", 3.0, **{"times APOLLO-Mini": 1.2})
    add_step(gpu, case, "PyTorch AdamW, fused", 5.0, **{"times APOLLO-Mini": 2.0})
    add_step(gpu, case, "PyTorch SGD, fused", 1.25, **{"times APOLLO-Mini": 0.5})
    cpu = machine(CPU, "whole_step")
    add_step(cpu, "60M matrices float32", "APOLLO-Mini", 20.0, **{"times APOLLO-Mini": 1.0})
    add_step(cpu, "60M matrices float32", "PyTorch AdamW, fused", 17.0, **{"times APOLLO-Mini": 0.5})
    add_step(cpu, case, "apollo-torch, Mini", 1.0, **{"times APOLLO-Mini": 9.0})  # no GPU's figure
    text = section(written(tmp_path), "Targets")
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    bandwidth = "7B matrices: Mini, share of the copy bandwidth at 8 bytes a parameter"
    assert "| 0.80, **missed** | Some GPU |" in lines[bandwidth]
    assert "| 1.20, reached | Some GPU |" in lines["7B matrices: APOLLO at rank 256, times Mini"]
    assert "| 2.00, reached | Some GPU |" in lines["7B matrices: PyTorch's fused AdamW, times Mini"]
    assert "| 2.00, **missed** | Some GPU |" in lines["7B matrices: Mini, times fused SGD"]
    assert "| not measured | needs a GPU |" in lines["7B matrices: apollo-torch Mini, times Mini"]
    assert "| 2.00, **missed** | Some CPU, 2 cores |" in lines["CPU, float32: Mini, times fused AdamW"]


def test_machines_do_not_mix(tmp_path, machine):
    add_step(machine(GPU, "whole_step"), "7B bfloat16", "APOLLO-Mini", 2.5, **{"times APOLLO-Mini": 1.0})
    add_step(machine(CPU, "whole_step"), "60M bfloat16", "APOLLO-Mini", 77.7, **{"times APOLLO-Mini": 1.0})
    text = written(tmp_path)
    assert text.index("## Some GPU") < text.index("## Some CPU")
    assert "77.7" not in section(text, "Some GPU")
    assert "7B bfloat16" not in section(text, "Some CPU, 2 cores")
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "some-gpu-roofline.png",
        "some-cpu-2-cores-roofline.png",
    }
    for line in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / line).stat().st_size > 1000


def test_a_step_s_row_and_one_that_was_skipped(tmp_path, machine):
    results = machine(GPU, "whole_step")
    about = {"times APOLLO-Mini": 1.0, "times APOLLO": 0.8, "refresh_ms": 12.0}
    add_step(results, "7B bfloat16", "APOLLO-Mini", 2.5, **about)
    results.add("7B bfloat16: GaLore", case="7B bfloat16", contender="GaLore", skipped="it takes too long")
    lines = section(written(tmp_path), "Some GPU").splitlines()
    (mini,) = [line for line in lines if line.startswith("| APOLLO-Mini |")]
    cells = [cell.strip() for cell in mini.strip("|").split("|")]
    assert cells[1:] == ["2.50 (2.40 to 2.60)", "1.00", "0.80", "100 kB", "1 MB", "8.0", "80 %", "12.0", "4", "0.500"]
    assert "Not measured: GaLore: it takes too long." in lines


def test_growth_takes_whole_models_by_size_and_leaves_the_others_out(tmp_path, machine):
    results = machine(GPU, "whole_step")
    for case, parameters, ms in (("350M bfloat16", 35e7, 2.0), ("60M bfloat16", 6e7, 1.0), ("60M float32", 6e7, 9.0)):
        add_step(results, case, "APOLLO", ms, parameters=parameters)
    add_step(results, "7B matrices 4 layers rank 16 bfloat16", "APOLLO", 5.0, curve="rank", rank=16)
    add_step(results, "7B matrices 4 layers rank 1 bfloat16", "APOLLO", 4.0, curve="rank", rank=1)
    ((_, machines), _) = load(tmp_path / "results"), None
    assert report_data.curve(machines[0], "parameters") == {"APOLLO": [(6e7, 1.0), (35e7, 2.0)]}
    assert report_data.curve(machines[0], "rank") == {"APOLLO": [(1, 4.0), (16, 5.0)]}
    assert report_data.curve(machines[0], "layers") == {}


def test_a_loss_is_compared_seed_by_seed(tmp_path, machine):
    about = {"model": "1M", "steps": 10, "batch": 2, "sequence": 8, "text": "t", "vocabulary": 256, "dtype": "float32"}
    results = machine(CPU, "pretrain", settings=about)
    losses = {"AdamW": (3.0, 4.0, 5.0), "APOLLO": (2.9, 3.8, 4.7)}
    for variant, values in losses.items():
        for seed, loss in enumerate(values):
            row = {"variant": variant, "seed": seed, "learning_rate": 1e-3, "held_out_loss": loss, "state_bytes": 1}
            results.add(f"{variant} {seed}", **row, curve={"0": 5.5, "5": loss + 0.1, "10": loss})
    results.add("Mini 0", variant="Mini", seed=0, skipped="its process was killed")
    sweep = machine(CPU, "pretrain_sweep", settings=about)  # of learning rates: no comparison
    sweep.add("x", **row | {"held_out_loss": 123.0}, curve={})
    curve = {"0": 5.5, "10": 4.5}
    more = machine(CPU, "pretrain-variants", settings=about)  # another stage of the same
    more.add("Mini 1", variant="Mini", seed=1, learning_rate=1e-3, held_out_loss=4.5, state_bytes=1, curve=curve)
    text = written(tmp_path)
    # Differences of -0.1, -0.2, -0.3: their mean, and 4.303 of 0.1 / sqrt(3).
    assert "| APOLLO | 0.001 | 3 | 3.800 ± 2.236 | -0.200 ± 0.248 |" in text
    assert "Mini, seed 0 |  |  | not measured: its process was killed" in text
    assert "123" not in text
    assert "| Mini | 0.001 | 1 | 4.500 | +0.500 (one seed) | 1 B |" in text
    assert text.count("### Quality") == 1
    assert "APOLLO -0.200 ± 0.248" in section(text, "In a minute")


def test_int8_weights_are_compared_with_the_float_ones_of_the_same_optimizer(tmp_path, machine):
    about = {"model": "1M", "steps": 10, "batch": 2, "sequence": 8, "text": "t", "vocabulary": 256, "dtype": "float32"}
    results = machine(CPU, "pretrain-int8", settings=about)
    losses = {"APOLLO": 9.0, "Mini": 3.0, "Q-Mini": 3.25, "Q-Mini, to the nearest": 3.5, "Q-APOLLO": 9.125}
    for variant, loss in losses.items():
        row = {"variant": variant, "seed": 0, "learning_rate": 1e-3, "held_out_loss": loss, "state_bytes": 1}
        results.add(variant, **row, curve={"0": 9.5, "10": loss})
    text = written(tmp_path)
    assert "| Q-Mini | 0.001 | 1 | 3.250 | +0.250 (one seed) | 1 B |" in text
    assert "| Q-Mini, to the nearest | 0.001 | 1 | 3.500 | +0.500 (one seed) | 1 B |" in text
    minute = section(text, "In a minute")
    assert "of int8 weights against float ones" in minute
    assert "Q-APOLLO +0.125 (one seed); Q-Mini +0.250" in minute
    assert "against AdamW" not in minute


def test_steps_without_gradients_stand_beside_the_others(tmp_path, machine):
    """A contender in another's row, tokens in another column, a failure or the host's time that is not said."""
    results = machine(GPU, "no_gradient")
    for tokens in (64, 1024):
        for factor, contender in ((1.0, "AdamW"), (1.5, "APOLLO-Mini, no gradient, exact")):
            row = {"size": "60M", "dtype": "float32", "tokens": tokens, "contender": contender}
            figures = {"ms": [0.0, factor * tokens, 0.0], "times AdamW": factor, "peak_bytes": 1000 * tokens}
            if tokens == 1024:  # beside a file from before the host was measured
                figures["host_ms"] = 7 * factor
            results.add(f"60M {tokens}: {contender}", **row, **figures)
    results.add("60M 4096: AdamW", size="60M", dtype="float32", tokens=4096, contender="AdamW", skipped="no memory")
    text = section(written(tmp_path), GPU["name"])
    assert "| APOLLO-Mini, no gradient, exact | 96.0 (1.50) | 1536 (1.50) |" in text
    assert "| APOLLO-Mini, no gradient, exact |  | 10.5 |" in text
    assert "60M at 4,096 tokens: no memory" in text
    assert text.count("| AdamW |") == 3


def test_a_layer_s_host_time_stands_beside_a_step_s(tmp_path, machine):
    """A layer's microseconds read as a step's milliseconds, or a file of before that has no such row."""
    results = machine(CPU, "host_overhead")
    results.add("Mini, 224 matrices", stable_ms=0.501, moved_ms=0.978, launches=4)
    text = section(written(tmp_path), CPU["name"])
    assert "| Mini, 224 matrices | 0.50 | 0.98 | 4 |" in text
    assert "µs of" not in text
    assert "counted in" not in text
    results.add("Mini, one layer from its factors", us=61.7, launched_us=99.4, launches=5)
    results.add("Mini, one layer from its gradient", us=48.2, launched_us=57.8, launches=2)
    text = section(written(tmp_path), CPU["name"])
    assert "| Mini, 224 matrices | 0.50 | 0.98 | 4 |" in text
    assert "| Mini, one layer from its factors | 62 | 99 | 5 |" in text
    assert "| Mini, one layer from its gradient | 48 | 58 | 2 |" in text


def test_the_confidence_interval_is_student_s():
    assert mean_and_margin([2.0]) == (2.0, None)
    # Of four values by a table of t: 3.182 standard errors.
    mean, margin = mean_and_margin([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert margin == pytest.approx(3.182 * (5 / 3) ** 0.5 / 2)


def test_a_file_that_is_not_whole_is_named(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results" / "some-cpu"
    folder.mkdir(parents=True)
    (folder / "whole_step.json").write_text('{"machine": {"name": "x"}, "ro')
    paths = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "R.md")]
    monkeypatch.setattr(sys, "argv", ["report", *paths])
    with pytest.raises(SystemExit, match=r"whole_step\.json is not a whole results file"):
        report.main()
    assert not (tmp_path / "R.md").exists()


def test_a_report_of_another_folder_is_written_there(tmp_path, monkeypatch):
    """The committed report, overwritten by that of a rehearsal or of a folder that is not there."""
    monkeypatch.setattr(report, "BENCH", tmp_path / "committed")
    monkeypatch.setattr(report, "report", lambda *rest: "the report")
    monkeypatch.setattr(report_figures, "demo", lambda path: None)
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path)])
    report.main()
    assert (tmp_path / "REPORT.md").read_text() == "the report"
    monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no such folder"):
        report.main()
    assert [path.name for path in tmp_path.iterdir()] == ["REPORT.md"]


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The report of the committed results, and its figures and the demo's by their files' names."""
    counted, machines = load()
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        figures = record_figures(patch)
        text = report.report(counted, machines, folder / "pictures")
        report_figures.demo(folder / "demo.png")
    return text, figures, folder


def test_the_committed_report_is_that_of_the_committed_results(committed):
    assert (report.BENCH / "REPORT.md").read_text() == committed[0]


def test_pictures_keep_to_their_methods_colours_and_within_their_edges(committed):
    """See ``check_picture``. What of a machine has no picture, or a picture that nobody checks, fails as well."""
    _, figures, folder = committed
    names = {"demo": {"AdamW", "APOLLO", "APOLLO-Mini"}}
    for machine in load()[1]:
        timed = [row for row in machine.rows("whole_step") if "ms" in row]
        names[f"{machine.folder}-roofline"] = {row["contender"] for row in timed if not row["curve"]}
        along = ("parameters", "rank", "layers")
        names[f"{machine.folder}-growth"] = {who for name in along for who in report_data.curve(machine, name)}
        names[f"{machine.folder}-kernels"] = {"APOLLO"} if machine.rows("kernels") else set()
        for index, training in enumerate(report_data.pretrainings(machine), 1):
            names[f"{machine.folder}-pretraining-{index}"] = set(report_data.by_variant(training["rows"]))
    assert set(figures) == {name for name, methods in names.items() if methods}
    for name, figure in figures.items():
        check_picture(figure, names[name])
        about = " ".join(text.get_text() for text in figure.texts + [axes.title for axes in figure.axes])
        about += " ".join(axes.get_title(loc="left") for axes in figure.axes)
        for part in ("is better", "LLaMA", "float", "rank" if name != "demo" else "seed"):
            assert part in about, f"{name} does not say {part!r}: {about}"
    assert max(path.stat().st_size for path in folder.rglob("*.png")) < 150_000


def test_every_contender_and_variant_has_its_method_s_colour():
    """A new one with which the report could not be drawn, or in the colour of another method."""
    expected = {
        "AdamW": ["AdamW", "PyTorch AdamW, fused", "PyTorch AdamW, foreach", "PyTorch AdamW, fused, graph replay"],
        "SGD": ["PyTorch SGD, fused"],
        "APOLLO": ["APOLLO", "APOLLO, graph replay", "APOLLO, clipped", "APOLLO, stochastic"],
        "APOLLO-Mini": ["Mini", *(f"APOLLO-Mini{how}" for how in ("", ", graph replay", ", clipped", ", stochastic"))],
        "Q-APOLLO": ["Q-APOLLO", "Q-APOLLO, to the nearest"],
        "Q-Mini": ["Q-Mini", "Q-Mini, to the nearest", "Q-Mini, 8-bit moments"],
        "apollo-torch": ["apollo-torch"],
        "apollo-torch Mini": ["apollo-torch Mini", "apollo-torch, Mini"],
        "bitsandbytes": ["bitsandbytes AdamW8bit"],
        "torchao": ["torchao AdamW8bit"],
        "GaLore": ["GaLore"],
        "optimi": ["optimi AdamW, triton"],
        "Muon": ["PyTorch Muon"],
        "flashoptim": ["flashoptim AdamW"],
        "adafactor8bit": ["adafactor8bit, Mini", "adafactor8bit, APOLLO"],
    }
    for variant in ("a seed per matrix", "Rademacher", "bf16 moments"):
        expected["APOLLO"].append(f"APOLLO, {variant}")
        expected["APOLLO-Mini"].append(f"Mini, {variant}")
    found: dict[str, list[str]] = {}
    for name in {*CONTENDERS, *VARIANTS}:
        found.setdefault(method_of(name)[0], []).append(name)
    assert {method: sorted(names) for method, names in found.items()} == {
        method: sorted(names) for method, names in expected.items()
    }


def test_the_first_table_of_the_readme_is_what_was_counted_and_measured(capsys):
    """A figure of another run or another model, or one that nobody counted."""
    pytest.importorskip("transformers")
    cli.main(["memory", "--model", "7B", "--json"])
    (counted,) = json.loads(capsys.readouterr().out)
    file = RESULTS / "nvidia-h100-80gb-hbm3" / "whole_step-7B-matrices.json"
    timed = {row["contender"]: row for row in json.loads(file.read_text())["rows"] if "ms" in row}
    labels = {
        "PyTorch AdamW, fused": ("AdamW", "PyTorch AdamW, fused"),
        "APOLLO": ("APOLLO", "**APOLLO**, rank 256"),
        "APOLLO-Mini": ("APOLLO-Mini", "**APOLLO-Mini**, rank 1"),
    }
    expected = []
    for contender, (method, label) in labels.items():
        sizes = counted["methods"][method]
        total, state = (f"{size / 1e9:.1f} GB" for size in (sizes["total"], sizes["moments"] + sizes["other"]))
        expected.append(f"| {label} | {total} | {state} | {timed[contender]['ms'][1]:.1f} ms |")
    sgd = counted["methods"]["AdamW"]["weights"] + counted["methods"]["AdamW"]["gradients"]
    ms = timed["PyTorch SGD, fused"]["ms"][1]
    expected.append(f"| PyTorch SGD, fused, no momentum | {sgd / 1e9:.1f} GB | 0 | {ms:.1f} ms |")
    table = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert table[2 : 2 + len(expected)] == expected
