"""What the demo leaves behind: a table on the terminal, results.json, losses.csv and losses.png."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ...core.extras import require
from ...core.files import replaced
from ...version import __version__
from ..environment import machine_name
from ..pictures import draw_curve, picture, shifts, styles
from ..text import as_bytes
from .training import LABELS, SIZES, History, Run, RunConfig

OUTPUTS = ("results.json", "losses.csv", "losses.png")
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
    """Write the files of ``OUTPUTS`` into ``folder``."""
    paths = [folder / name for name in OUTPUTS]
    with replaced(paths[0]) as unfinished:
        unfinished.write_text(json.dumps(summary(results, corpus_name), indent=2) + "\n", encoding="utf-8")
    with replaced(paths[1]) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(row for result in results for row in csv_rows(result))
    draw(results, machine_name(results[0].config.device), paths[2])
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
        shown.add_column(heading, justify="right", overflow="fold")  # a narrow terminal loses no figure
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


def draw(
    results: list[Result], machine: str, path: Path, seeds: Mapping[str, Mapping[int, float]] | None = None
) -> None:
    """The loss curves, and the bytes of optimizer state beside them: 900 x 500 pixels.

    ``seeds`` has, by method and seed, the final losses of more runs: marks to the right of the curves' ends.
    """
    config = results[0].config
    title = f"LLaMA {config.model} on bytes, {len(results)} optimizers: same initial weights, same batches"
    about = (
        f"{machine}, {config.dtype}, {config.steps:,} steps of {config.batch} x {config.sequence} bytes; "
        f"curves: one run, seed {config.seed}"
    )
    looks = styles(result.label for result in results)
    with picture(path, title, about, 5, ncols=2, width_ratios=(2.2, 1)) as (_, (losses, states)):
        # The first tenth falls from log 256 and would flatten the rest.
        shown_from = config.steps / 10
        for result in results:
            points = {step: loss for step, loss in result.history.held_out_loss.items() if step >= shown_from}
            look = {**looks[result.label], "linewidth": 2, "markersize": 5}
            label = f"{_with_rank(result)}: {result.held_out_loss:.3f}"
            draw_curve(losses, list(points), list(points.values()), label=label, **look)
        if seeds:
            for shift, result in zip(shifts(len(results), 12), results, strict=True):
                finals = list(seeds[result.config.method].values())
                look = {**looks[result.label], "linestyle": "none", "fillstyle": "none"}
                draw_curve(losses, [1.06 * config.steps] * len(finals), finals, shift, **look)
            known = sorted(set().union(*seeds.values()))
            label = f"seeds {', '.join(map(str, known))} at the end"
            losses.plot([], [], "o", color="#999999", fillstyle="none", label=label)
        losses.set(xlabel="step", ylabel="nats per byte", title="held-out loss: lower is better")
        losses.grid(axis="y", alpha=0.3)
        losses.legend(title="held-out loss at the end", alignment="left")
        heights = [result.state_bytes for result in results]
        names = [_with_rank(result).replace(", ", "\n") for result in results]
        bars = states.bar(names, heights, color=[looks[result.label]["color"] for result in results], width=0.7)
        states.bar_label(bars, [as_bytes(height) for height in heights], padding=3)
        states.set(title="optimizer state: less is better", yticks=[])
        states.spines.left.set_visible(False)
        states.tick_params(axis="x", labelsize=9)
        states.margins(y=0.1)


def _with_rank(result: Result) -> str:
    rank = {"apollo": SIZES[result.config.model].hidden // 4, "mini": 1}.get(result.config.method)
    return result.label if rank is None else f"{result.label}, rank {rank}"


def _against(result: Result, first: Result) -> str:
    if result is first:
        return ""
    return f" ({100 * (result.held_out_loss / first.held_out_loss - 1):+.1f}%)"
