"""What the demo leaves behind: a table on the terminal, results.json, losses.csv and losses.png."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...core.extras import require
from ...version import __version__
from .training import LABELS, History, Run, RunConfig

# The colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {"adamw": "#555555", "apollo": "#0072B2", "mini": "#D55E00"}
CSV_COLUMNS = ("method", "step", "tokens", "training_loss", "held_out_loss")


@dataclass(frozen=True)
class Result:
    """A finished run, without its tensors. Seconds are medians over the steps. Those of a step include the
    optimizer's."""

    config: RunConfig
    history: History
    parameters: int
    state_bytes: int

    @classmethod
    def of(cls, run: Run) -> Result:
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        return cls(run.config, run.history, parameters, run.state_bytes())

    @property
    def label(self) -> str:
        return LABELS[self.config.method]

    @property
    def held_out_loss(self) -> float:
        return self.history.held_out_loss[self.config.steps]

    @property
    def optimizer_seconds(self) -> float:
        return median(self.history.optimizer_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.config.batch * self.config.sequence / median(self.history.step_seconds)


def write_results(results: list[Result], corpus_name: str, folder: Path) -> list[Path]:
    """Write results.json, losses.csv and losses.png into ``folder``."""
    paths = [folder / name for name in ("results.json", "losses.csv", "losses.png")]
    paths[0].write_text(json.dumps(summary(results, corpus_name), indent=2) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(row for result in results for row in csv_rows(result))
    draw(results, paths[2])
    return paths


def csv_rows(result: Result) -> Iterable[tuple[Any, ...]]:
    """A row for each step, from 0. Losses are in full precision, and empty if there is none."""
    config, history = result.config, result.history
    for step, loss in enumerate(["", *history.training_loss]):
        yield config.method, step, step * config.batch * config.sequence, loss, history.held_out_loss.get(step, "")


def summary(results: list[Result], corpus_name: str) -> dict[str, Any]:
    """The content of results.json: the settings, and the table's figures, not rounded."""
    return {
        "versions": {"apollo_triton": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "text": corpus_name,
        "parameters": results[0].parameters,
        "methods": {
            result.config.method: {
                "held_out_loss": result.held_out_loss,
                "state_bytes": result.state_bytes,
                "optimizer_step_seconds": result.optimizer_seconds,
                "tokens_per_second": result.tokens_per_second,
                "settings": asdict(result.config),
            }
            for result in results
        },
    }


def table(results: list[Result]) -> Any:
    """The table that the demo prints at its end, a rich ``Table`` at most 80 columns wide."""
    rich_table = require("rich.table", "demo")
    first = results[0]
    shown = rich_table.Table(title=f"LLaMA {first.config.model}, {first.config.steps} steps", title_justify="left")
    shown.add_column("optimizer", no_wrap=True)
    for heading in ("lr", "held-out loss", "state", "optimizer step", "tokens/s"):
        shown.add_column(heading, justify="right")
    for result in results:
        shown.add_row(
            result.label,
            f"{result.config.learning_rate:g}",
            f"{result.held_out_loss:.3f}{_against(result, first)}",
            as_bytes(result.state_bytes),
            f"{1e3 * result.optimizer_seconds:.1f} ms",
            f"{result.tokens_per_second:,.0f}",
        )
    return shown


def as_bytes(count: float) -> str:
    """``count`` bytes as text, for people.

    >>> as_bytes(7_340_032)
    '7.34 MB'
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def draw(results: list[Result], path: Path) -> None:
    """Draw the loss curves and, beside them, the bytes of optimizer state: 900 x 500 pixels."""
    require("matplotlib", "demo").use("Agg")
    pyplot = require("matplotlib.pyplot", "demo")
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, (losses, states) = pyplot.subplots(
            1, 2, figsize=(9, 5), dpi=100, width_ratios=(2.2, 1), layout="constrained"
        )
        # In the first tenth of the steps the loss falls from log 256, which would flatten the rest of the curve.
        shown_from = results[0].config.steps / 10
        for result in results:
            points = [(s, loss) for s, loss in result.history.held_out_loss.items() if s >= shown_from]
            label = f"{result.label}  {result.held_out_loss:.3f}"
            losses.plot(*zip(*points, strict=True), color=COLOURS[result.config.method], linewidth=2, label=label)
        config = results[0].config
        losses.set_xlabel(f"step ({config.batch * config.sequence:,} bytes each)")
        losses.set_ylabel("held-out loss, nats per byte")
        losses.grid(axis="y", alpha=0.3)
        losses.legend(frameon=False, title="final held-out loss", alignment="left")
        heights = [result.state_bytes for result in results]
        colours = [COLOURS[result.config.method] for result in results]
        bars = states.bar([result.label.replace("-", "-\n") for result in results], heights, color=colours)
        states.bar_label(bars, [as_bytes(height) for height in heights], padding=3)
        states.set_title("optimizer state", fontsize="medium")
        states.set_yticks([])
        states.spines.left.set_visible(False)
        states.margins(y=0.1)
        figure.suptitle(f"LLaMA {config.model} on bytes: same weights, same batches, three optimizers")
        unfinished = path.with_suffix(".tmp")
        figure.savefig(unfinished, format="png")
        pyplot.close(figure)
    os.replace(unfinished, path)


def _against(result: Result, first: Result) -> str:
    if result is first:
        return ""
    return f" ({100 * (result.held_out_loss / first.held_out_loss - 1):+.1f}%)"
