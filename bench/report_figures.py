"""The report's pictures, each a function of a machine's results that draws one and gives the line that shows it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from apollo_triton.tools.demo import report as demo_report
from apollo_triton.tools.demo.training import History, RunConfig
from apollo_triton.tools.pictures import METHODS, draw_curve, log_ticks, move, picture, shifts, styles

from .demo_sweep import of_the_demo
from .report_data import (
    Machine,
    baseline,
    by_variant,
    curve,
    differences,
    mean_and_margin,
    of_tallest_matrices,
    pretrainings,
)
from .results_file import RESULTS, ROOT, Row

# Docs/demo.json says how many threads there were, not on which machine.
DEMO_MACHINE = "AMD EPYC, 2 cores"
# Sizes of one method, by line and marker.
_SIZE_LINES = ("-", "--", ":", "-.")
_SIZE_MARKERS = "osD^vP"


def _shown(path: Path, text: str) -> str:
    return f"![{text}]({path.parent.name}/{path.name})"


def _range(values: Iterable[float], unit: str = "") -> str:
    """
    >>> _range([128, 256, 192], "rank "), _range([3, 3])
    ('rank 128 to 256', '3')
    """
    least, most = min(values := list(values)), max(values)
    return unit + (f"{least:,}" if least == most else f"{least:,} to {most:,}")


def roofline(machine: Machine, folder: Path) -> str:
    """Time against bytes of every optimizer over whole models and their matrices, and the line of a copy."""
    rows = [row for row in machine.rows("whole_step") if "ms" in row and not row["curve"]]
    if not rows:
        return ""
    path = folder / f"{machine.folder}-roofline.png"
    bandwidth = sorted(row["copy_bandwidth"] for row in rows)[len(rows) // 2]
    parts = []
    for kind, alone in (("whole models", False), ("matrices alone", True)):
        if sizes := dict.fromkeys(row["size"] for row in rows if row["matrices_only"] == alone):
            parts.append(f"{', '.join(sizes)} ({kind})")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    fills = {"bfloat16": "full", "float32": "none"}
    shown = "bfloat16 filled, float32 hollow" if len(dtypes) > 1 else dtypes[0]
    ranks = _range((row["rank"] for row in rows), "rank ")
    about = f"{machine.name}; LLaMA {', '.join(parts)}; {shown}; APOLLO of {ranks}"
    looks = styles(row["contender"] for row in rows)
    with picture(path, "A step's time against the bytes that it must move: lower is better", about, 5.4) as (_, axes):
        for name, look in looks.items():
            for dtype in dtypes:
                chosen = [row for row in rows if (row["contender"], row["dtype"]) == (name, dtype)]
                own = [(row["bytes"] / 1e9, row["ms"][1]) for row in chosen]
                if own:
                    style = look | {"linestyle": "none", "fillstyle": fills[dtype], "markersize": 7}
                    axes.plot(*zip(*own, strict=True), label=name, **style)
        first, last = (f(row["bytes"] / 1e9 for row in rows) for f in (min, max))
        along = [first / 1.2 * (1.44 * last / first) ** (step / 20) for step in range(21)]
        copy = f"a copy, {bandwidth / 1e9:,.3g} GB/s" if bandwidth < 1e12 else f"a copy, {bandwidth / 1e12:.2f} TB/s"
        axes.plot(along, [1e12 * x / bandwidth for x in along], color="black", linewidth=1, label=copy)
        axes.set(xscale="log", yscale="log", xlabel="GB that the step must move", ylabel="milliseconds a step")
        log_ticks(axes.xaxis)
        log_ticks(axes.yaxis)
        handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        axes.legend(handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(1, 0.5))
    return _shown(path, f"Time of a step against the bytes it must move, {machine.name}")


def growth(machine: Machine, folder: Path) -> str:
    """Time by parameters, by rank and by number of layers."""
    curves = {name: curve(machine, name) for name in ("parameters", "rank", "layers")}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    path = folder / f"{machine.folder}-growth.png"
    looks = styles(who for points in curves.values() for who in points)
    moved = dict(zip(looks, shifts(len(looks), 14), strict=True))
    about = f"{machine.name}; a method's points stand a little beside their place, so that none hides another"
    with picture(path, "How a step's time grows: lower is better", about, 4.8, ncols=len(curves), squeeze=False) as (
        figure,
        all_axes,
    ):
        for axes, (name, points) in zip(all_axes[0], curves.items(), strict=True):
            for who, each in points.items():
                draw_curve(axes, *zip(*each, strict=True), moved[who], label=who, markersize=5, **looks[who])
            axes.set(xscale="log", yscale="log", xlabel=name, title=_what_grows(machine, name))
            along = sorted({x for each in points.values() for x, _ in each})
            labels = [f"{x / 1e6:.0f} M" if name == "parameters" else f"{x:g}" for x in along]
            axes.set_xticks(along, _where_there_is_room(along, labels))
            log_ticks(axes.yaxis)
            axes.minorticks_off()
            axes.margins(x=0.1)
        all_axes[0][0].set_ylabel("milliseconds a step")
        handles = {
            label: handle
            for axes in all_axes[0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return _shown(path, f"How the time of a step grows, {machine.name}")


def _where_there_is_room(places: list[float], labels: list[str]) -> list[str]:
    """The labels of ticks on a logarithmic axis, "" for one that would lie on the label after it.

    >>> _where_there_is_room([1, 16, 64, 128], ["1", "16", "64", "128"])
    ['1', '16', '', '128']
    """
    kept: list[str] = []
    room, taken_from = (places[-1] / places[0]) ** 0.15, float("inf")
    for place, label in zip(reversed(places), reversed(labels), strict=True):
        fits = place * room <= taken_from
        kept.append(label if fits else "")
        taken_from = place if fits else taken_from
    return kept[::-1]


def _what_grows(machine: Machine, name: str) -> str:
    """The model, dtype and rank of a panel of ``growth``."""
    rows = [row for row in machine.rows("whole_step") if "ms" in row]
    if name == "parameters":
        own = [row for row in rows if not (row["curve"] or row["matrices_only"]) and row["dtype"] == "bfloat16"]
    else:
        own = [row for row in rows if row["curve"] == name]
    sizes, dtypes = (", ".join(dict.fromkeys(row[key] for row in own)) for key in ("size", "dtype"))
    matrices = "" if name == "parameters" else "matrices of "
    rank = "" if name == "rank" else _range((row["rank"] for row in own), ", rank ")
    return f"{matrices}LLaMA {sizes},\n{dtypes}{rank}"


def kernels(machine: Machine, folder: Path) -> str:
    """The share of a copy's bandwidth by rank: a panel a verb, a line a size, its tallest matrix."""
    rows = [row for row in of_tallest_matrices(machine) if row["dtype"] == "bfloat16"]
    if not rows:
        return ""
    path = folder / f"{machine.folder}-kernels.png"
    verbs = list(dict.fromkeys(row["verb"] for row in rows))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    title = "APOLLO's verbs, share of a copy's bandwidth: higher is better"
    about = f"{machine.name}, bfloat16, one matrix of a LLaMA layer; rank 1 is APOLLO-Mini"
    with picture(path, title, about, 3.8, ncols=len(verbs), squeeze=False) as (figure, all_axes):
        for axes, verb in zip(all_axes[0], verbs, strict=True):
            for index, size in enumerate(sizes):
                own = [row for row in rows if (row["size"], row["verb"]) == (size, verb)]
                points = sorted((row["rank"], 100 * row["share_of_copy"]) for row in own)
                if points:
                    label = f"LLaMA {size}, {own[0]['shape'][0]} x {own[0]['shape'][1]}"
                    look = {"color": METHODS["APOLLO"][0], "fillstyle": "none" if index % 2 else "full"}
                    look |= {"linestyle": _SIZE_LINES[index % 4], "marker": _SIZE_MARKERS[index % 6]}
                    draw_curve(axes, *zip(*points, strict=True), label=label, markersize=5, **look)
            axes.set(xscale="log", xlabel="rank", title=verb, ylim=(0, None))
            ranks = sorted({row["rank"] for row in rows})
            axes.set_xticks(ranks, _where_there_is_room(ranks, list(map(str, ranks))))
            axes.minorticks_off()
        all_axes[0][0].set_ylabel("% of a copy's bandwidth")
        figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _shown(path, f"Achieved bandwidth of each verb, {machine.name}")


def pretraining(machine: Machine, folder: Path) -> str:
    """Held-out loss, the mean over seeds with its confidence interval, and at the end its difference to another's."""
    return "\n\n".join(filter(None, (_curves(machine, *each, folder) for each in enumerate(pretrainings(machine), 1))))


def _curves(machine: Machine, number: int, training: Row, folder: Path) -> str:
    runs = by_variant(training["rows"])
    if not runs:
        return ""
    path = folder / f"{machine.folder}-pretraining-{number}.png"
    settings = training["settings"]
    plain = [v for v in ("AdamW", "apollo-torch", "APOLLO", "Mini", "Q-APOLLO", "Q-Mini") if v in runs]
    looks = styles([*plain, *runs])
    about = (
        f"{machine.name}, {settings['dtype']}; {settings['steps']:,} steps of {settings['batch']} x "
        f"{settings['sequence']} tokens; APOLLO's rank is a quarter of the width, Mini's is 1; "
        f"mean and 95 % confidence interval; seeds of each: {_range(map(len, runs.values()))}"
    )
    title = f"Pre-training LLaMA {settings['model']}: lower is better"
    with picture(path, title, about, 5.2, ncols=2, width_ratios=(1.25, 1)) as (_, (losses, gaps)):
        for shift, variant in zip(shifts(len(plain), 12), plain, strict=True):
            steps = sorted(map(int, next(iter(runs[variant].values()))["curve"]))[1:]  # the first is that of chance
            found = [mean_and_margin([row["curve"][str(step)] for row in runs[variant].values()]) for step in steps]
            means, look = [mean for mean, _ in found], {**looks[variant], "markersize": 4}
            draw_curve(losses, steps, means, shift, label=f"{variant}: {means[-1]:.3f}", **look)
            ends = [[mean + sign * (margin or 0) for mean, margin in found] for sign in (-1, 1)]
            move(losses.vlines(steps, *ends, color=look["color"], linewidth=1), shift)
        losses.set(xlabel="step (marks side by side)", ylabel="nats a token", title="held-out loss")
        losses.legend(title="at the end", alignment="left")
        others = [variant for variant in runs if differences(runs, variant)]
        for height, variant in enumerate(reversed(others)):
            mean, margin = mean_and_margin(differences(runs, variant))
            look = {**looks[variant], "linestyle": "none"}
            gaps.errorbar(mean, height, xerr=margin, capsize=3, **look)
        gaps.axvline(0, color="black", linewidth=1)
        gaps.set_yticks(range(len(others)), list(reversed(others)))
        against = {baseline(variant) for variant in others}
        than = "AdamW's" if against == {"AdamW"} else "that of float weights"
        gaps.set(xlabel="nats a token", title=f"loss at the end less {than},\nsame seed: further left is better")
        gaps.locator_params(axis="x", nbins=5)
    return _shown(path, f"Pre-training curves, {machine.name}")


def demo(path: Path) -> None:
    """The picture of docs/demo.md, from docs/demo.json, docs/demo.csv, and the final losses of three seeds."""
    summary = json.loads((ROOT / "docs" / "demo.json").read_text(encoding="utf-8"))
    with (ROOT / "docs" / "demo.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["held_out_loss"]]
    results = []
    for method, known in summary["methods"].items():
        losses = {int(row["step"]): float(row["held_out_loss"]) for row in rows if row["method"] == method}
        config, history = RunConfig(**known["settings"]), History(held_out_loss=losses)
        results.append(demo_report.Result(config, history, summary["parameters"], known["state_bytes"]))
    known = of_the_demo(json.loads((RESULTS / "demo_sweep.json").read_text(encoding="utf-8")))
    seeds = {
        method: {seed: row["held_out_loss"] for seed, row in of_method.items()} for method, of_method in known.items()
    }
    demo_report.draw(results, DEMO_MACHINE, path, seeds)
