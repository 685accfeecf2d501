"""The data of the report: all results files, by machine, and statistics over seeds."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results_file import BENCH, EVERY_MACHINE, RESULTS, Row

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. Beyond them a normal's is used.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Machine:
    """A folder of results files, each with its rows and its header."""

    folder: str
    files: dict[str, Row]

    @property
    def name(self) -> str:
        return next((file["machine"]["name"] for file in self.files.values()), self.folder)

    @property
    def is_gpu(self) -> bool:
        return any("toolkit" in file["machine"] for file in self.files.values())

    def of(self, benchmark: str) -> list[Row]:
        """The results files of a benchmark: ``benchmark.json`` and those of its stages, ``benchmark-STAGE.json``."""
        return [file for name, file in self.files.items() if name == benchmark or name.startswith(f"{benchmark}-")]

    def rows(self, benchmark: str) -> list[Row]:
        """The rows of all files of a benchmark."""
        return [row for file in self.of(benchmark) for row in file["rows"]]

    def find(self, benchmark: str, identity: str) -> Row | None:
        """The row with this id. None if it was not measured."""
        return next((row for row in self.rows(benchmark) if row["id"] == identity and "skipped" not in row), None)


def load(folder: Path = RESULTS) -> tuple[Machine, list[Machine]]:
    """The results that are the same on every machine, and the machines, GPUs first."""
    found = {}
    for path in sorted(folder.iterdir() if folder.exists() else []):
        if files := {file.stem: _read(file) for file in sorted(path.glob("*.json"))}:
            found[path.name] = Machine(path.name, files)
    counted = found.pop(EVERY_MACHINE, Machine(EVERY_MACHINE, {}))
    return counted, sorted(found.values(), key=lambda machine: (not machine.is_gpu, machine.folder))


def _read(path: Path) -> Row:
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        return file | {"rows": file["rows"], "machine": file["machine"]}
    except (ValueError, KeyError) as error:
        raise SystemExit(f"{path} is not a whole results file ({error!r}); delete it and measure it again") from error


def paper() -> dict[str, Any]:
    """The published tables of ``bench/paper.json``."""
    return json.loads((BENCH / "paper.json").read_text(encoding="utf-8"))


def cases(machine: Machine) -> dict[str, list[Row]]:
    """The rows of the whole step by case, in the order in which they were measured."""
    grouped: dict[str, list[Row]] = {}
    for row in machine.rows("whole_step"):
        grouped.setdefault(row["case"], []).append(row)
    return grouped


def curve(machine: Machine, name: str) -> dict[str, list[tuple[float, float]]]:
    """How each contender's milliseconds grow with "parameters" (of whole models in bfloat16), "rank" or "layers"."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in machine.rows("whole_step"):
        is_whole_model = not row.get("curve") and not row.get("matrices_only") and row.get("dtype") == "bfloat16"
        if "ms" in row and (is_whole_model if name == "parameters" else row.get("curve") == name):
            points.setdefault(row["contender"], []).append((row[name], row["ms"][1]))
    return {contender: sorted(found) for contender, found in points.items() if len(found) > 1}


def of_tallest_matrices(machine: Machine) -> list[Row]:
    """The microbenchmarks of the tallest measured matrix of each size: gate's and up's, if all were measured."""
    rows = [row for row in machine.rows("kernels") if "us" in row]
    tallest: dict[str, list[int]] = {}
    for row in rows:
        tallest[row["size"]] = max(row["shape"], tallest.get(row["size"], []))
    return [row for row in rows if row["shape"] == tallest[row["size"]]]


def pretrainings(machine: Machine) -> list[Row]:
    """The pre-training runs: settings with their rows. Files with the same settings count as one."""
    found: dict[str, Row] = {}
    for file in machine.of("pretrain"):
        one = found.setdefault(json.dumps(file["settings"]), {"settings": file["settings"], "rows": []})
        one["rows"] += file["rows"]
    return list(found.values())


def by_variant(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Finished runs, variant -> seed -> row. Only runs with a variant's last learning rate count."""
    rates = {row["variant"]: row["learning_rate"] for row in rows if "held_out_loss" in row}
    grouped: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "held_out_loss" in row and row["learning_rate"] == rates[row["variant"]]:
            grouped.setdefault(row["variant"], {})[row["seed"]] = row
    return grouped


def baseline(variant: str) -> str | None:
    """The variant that another one is compared with: the one with float weights for int8 weights, AdamW for the rest.

    >>> baseline("Q-Mini, to the nearest"), baseline("Mini, bf16 moments"), baseline("AdamW")
    ('Mini', 'AdamW', None)
    """
    if variant.startswith("Q-"):
        return variant.removeprefix("Q-").partition(",")[0]
    return None if variant == "AdamW" else "AdamW"


def differences(runs: dict[str, dict[int, Row]], variant: str) -> list[float]:
    """A variant's losses minus those of its baseline with the same seeds."""
    baseline_runs = runs.get(baseline(variant) or "", {})
    shared = sorted(runs.get(variant, {}).keys() & baseline_runs.keys())
    return [runs[variant][seed]["held_out_loss"] - baseline_runs[seed]["held_out_loss"] for seed in shared]


def mean_and_margin(values: list[float]) -> tuple[float, float | None]:
    """The mean and the half-width of its 95 % confidence interval, by Student's t. One value has no half-width.

    >>> mean_and_margin([1.0, 2.0, 3.0])
    (2.0, 2.484338...)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    quantile = _STUDENT[len(values) - 2] if len(values) - 2 < len(_STUDENT) else 1.96
    return mean, quantile * statistics.stdev(values) / len(values) ** 0.5


def share_of_roofline(row: Row) -> float:
    """The time that the step's bytes would take at the measured bandwidth of a copy, divided by the step's time."""
    return row["bytes"] / row["copy_bandwidth"] / (row["ms"][1] / 1e3)
