"""The report's pictures, each a function of a machine's results that draws one and gives the line that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apollo_triton.core.extras import require

from .report_data import Machine, by_variant, curve, differences, mean_and_margin, of_tallest_matrices, pretrainings

# Okabe and Ito's, which colour-blind readers can tell apart; ours strong, peers told apart by their markers too.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#555555", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*<>hp"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


@contextmanager
def _figure(path: Path, panels: int, width: float, height: float) -> Iterator[list[Any]]:
    """Axes side by side; the picture is written at the end."""
    require("matplotlib", "bench").use("Agg")
    pyplot = require("matplotlib.pyplot", "bench")
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, panels, figsize=(width, height), dpi=90, layout="constrained", squeeze=False)
        yield list(axes[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
        pyplot.close(figure)


def _shown(path: Path, text: str) -> str:
    return f"![{text}]({path.parent.name}/{path.name})"


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def roofline(machine: Machine, folder: Path) -> str:
    """Time against bytes of every optimizer over whole models and their matrices, and the line of a copy."""
    rows = [row for row in machine.rows("whole_step") if "ms" in row and not row["curve"]]
    if not rows:
        return ""
    path = folder / f"{machine.folder}-roofline.png"
    with _figure(path, 1, 9, 5) as (axes,):
        for index, name in enumerate(dict.fromkeys(row["contender"] for row in rows)):
            own = [(row["bytes"] / 1e9, row["ms"][1]) for row in rows if row["contender"] == name]
            axes.scatter(*zip(*own, strict=True), label=name, s=36, alpha=0.85, **_style(index))
        bandwidth = sorted(row["copy_bandwidth"] for row in rows)[len(rows) // 2]
        ends = [f(row["bytes"] / 1e9 for row in rows) for f in (min, max)]
        line = [1e12 * x / bandwidth for x in ends]
        axes.plot(ends, line, color="black", linewidth=1, label=f"a copy, {bandwidth / 1e9:,.3g} GB/s")
        axes.set(xscale="log", yscale="log", xlabel="GB that the step must move", ylabel="milliseconds a step")
        ticker = require("matplotlib.ticker", "bench")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title(f"{machine.name}: time against bytes, lower is better", loc="left", fontsize="medium")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return _shown(path, f"Time of a step against the bytes it must move, {machine.name}")


def growth(machine: Machine, folder: Path) -> str:
    """Time by parameters, by rank and by number of layers."""
    curves = {name: curve(machine, name) for name in ("parameters", "rank", "layers")}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    path = folder / f"{machine.folder}-growth.png"
    names = list(dict.fromkeys(who for points in curves.values() for who in points))
    with _figure(path, len(curves), 4 * len(curves), 4.4) as all_axes:
        for axes, (name, points) in zip(all_axes, curves.items(), strict=True):
            for who, each in points.items():
                axes.plot(*zip(*each, strict=True), label=who, markersize=5, **_style(names.index(who)))
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel="milliseconds a step")
            along = sorted({x for each in points.values() for x, _ in each})
            axes.set_xticks(along, [f"{x / 1e6:.0f} M" if name == "parameters" else f"{x:g}" for x in along])
            axes.minorticks_off()
        handles = {
            label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        all_axes[0].figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return _shown(path, f"How the time of a step grows, {machine.name}")


def kernels(machine: Machine, folder: Path) -> str:
    """The share of a copy's bandwidth by rank: a panel a verb, a line a size, its tallest matrix."""
    rows = [row for row in of_tallest_matrices(machine) if row["dtype"] == "bfloat16"]
    if not rows:
        return ""
    path = folder / f"{machine.folder}-kernels.png"
    verbs = list(dict.fromkeys(row["verb"] for row in rows))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    with _figure(path, len(verbs), 3 * len(verbs), 3.6) as all_axes:
        for axes, verb in zip(all_axes, verbs, strict=True):
            for index, size in enumerate(sizes):
                own = [row for row in rows if (row["size"], row["verb"]) == (size, verb)]
                points = sorted((row["rank"], 100 * row["share_of_copy"]) for row in own)
                if points:
                    label = f"{size}, {own[0]['shape'][0]} x {own[0]['shape'][1]}"
                    axes.plot(*zip(*points, strict=True), label=label, markersize=5, **_style(index))
            axes.set(xscale="log", xlabel="rank", title=verb, ylim=(0, None))
            ticks = sorted({row["rank"] for row in rows})[::2]
            axes.set_xticks(ticks, labels=ticks)
            axes.minorticks_off()
        all_axes[0].set_ylabel("% of a copy's bandwidth, bfloat16")
        all_axes[0].figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return _shown(path, f"Achieved bandwidth of each verb, {machine.name}")


def pretraining(machine: Machine, folder: Path) -> str:
    """Held-out loss, the mean over seeds in a band of its confidence, and the last one's difference to AdamW's."""
    return "\n\n".join(filter(None, (_curves(machine, *each, folder) for each in enumerate(pretrainings(machine), 1))))


def _curves(machine: Machine, number: int, training: dict[str, Any], folder: Path) -> str:
    runs = by_variant(training["rows"])
    if not runs:
        return ""
    path = folder / f"{machine.folder}-pretraining-{number}.png"
    names = ("AdamW", "apollo-torch", "APOLLO", "Mini", "Q-APOLLO", "Q-Mini")
    plain = [variant for variant in names if variant in runs]
    with _figure(path, 2, 10, 4.6) as (losses, gaps):
        for index, variant in enumerate(plain):
            steps = sorted(map(int, next(iter(runs[variant].values()))["curve"]))[1:]  # the first is that of chance
            means, margins = [], []
            for step in steps:
                mean, margin = mean_and_margin([row["curve"][str(step)] for row in runs[variant].values()])
                means.append(mean)
                margins.append(margin or 0.0)
            colour = COLOURS[index]
            losses.plot(steps, means, color=colour, label=f"{variant}  {means[-1]:.3f}")
            band = [[m + sign * each for m, each in zip(means, margins, strict=True)] for sign in (-1, 1)]
            losses.fill_between(steps, *band, color=colour, alpha=0.15, linewidth=0)
        losses.set(
            xlabel="step", ylabel="held-out loss, nats a token", title="mean over seeds, and its 95 % confidence"
        )
        losses.legend()
        others = [variant for variant in runs if differences(runs, variant)]
        for height, variant in enumerate(reversed(others)):
            mean, margin = mean_and_margin(differences(runs, variant))
            gaps.errorbar(mean, height, xerr=margin, fmt="o", color=COLOURS[1], capsize=3)
        gaps.axvline(0, color="black", linewidth=1)
        gaps.set_yticks(range(len(others)), list(reversed(others)))
        against = "AdamW's" if "AdamW" in runs else "float weights'"
        gaps.set(xlabel=f"final loss less {against}, same seed (left is better)", title="differences")
    return _shown(path, f"Pre-training curves, {machine.name}")
