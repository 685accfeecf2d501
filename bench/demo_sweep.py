"""Which learning rate should the demo use? It trains the demo's model with each candidate, and at the chosen rate with
three seeds.

    python -m bench.demo_sweep            # writes bench/results/demo_sweep.json and prints docs/demo.md's tables

Each core trains one candidate at a time, with one thread. Candidates that the output file has are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apollo_triton.core.settings import AUTO
from apollo_triton.tools.demo.corpus import load_corpus
from apollo_triton.tools.demo.training import LABELS, Run, RunConfig
from apollo_triton.tools.options import BATCH, LEARNING_RATE, SEQUENCE, STEPS

from .report_tables import table

# A third of the demo's steps tell the good rates from the bad; those around AdamW's best run to the end.
SHORT = 200
METHODS = {"adamw": None, "apollo": AUTO, "mini": AUTO}
SHORT_RATES, RATES = (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2), (2e-3, 3e-3, 5e-3)
# The paper's scales at the best rates that an earlier sweep found for them here, for comparison.
PAPERS = (("apollo", 2e-2, 1.0), ("mini", 1e-2, 128.0))
SEEDS = (0, 1, 2)


def candidates() -> Iterator[tuple[int, str, float, float | str | None, int]]:
    """Steps, method, learning rate, scale and seed of every run."""
    for method, scale in METHODS.items():
        yield from ((SHORT, method, rate, scale, 0) for rate in SHORT_RATES)
        yield from ((STEPS, method, rate, scale, 0) for rate in RATES)
        yield from ((STEPS, method, LEARNING_RATE, scale, seed) for seed in SEEDS[1:])
    yield from ((STEPS, *settings, seed) for settings in PAPERS for seed in SEEDS)


def measure(config: RunConfig) -> dict[str, Any]:
    """Train ``config`` to its end. Returns its row with the held-out loss."""
    torch.set_num_threads(1)
    run = Run(config, load_corpus(None, config.sequence + 1))
    while not run.finished:
        run.advance()
    run.evaluate()
    return row(config) | {"held_out_loss": run.history.held_out_loss[config.steps]}


def row(config: RunConfig) -> dict[str, Any]:
    """What distinguishes one candidate from another."""
    return {
        "method": config.method,
        "learning_rate": config.learning_rate,
        "scale": config.scale,
        "steps": config.steps,
        "seed": config.seed,
    }


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["steps"], row["method"], str(row["scale"]), row["learning_rate"], row["seed"]


def main() -> None:
    """Run the missing candidates, and rewrite the file after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/demo_sweep.json"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    options = parser.parse_args()
    data = load_corpus(None, SEQUENCE + 1).fingerprint
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    configs = [
        RunConfig(method, rate, scale, "1M", steps, BATCH, SEQUENCE, seed, device="cpu", data=data)
        for steps, method, rate, scale, seed in candidates()
    ]
    missing = [config for config in configs if not any(row(config).items() <= known.items() for known in rows)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for result in pool.imap_unordered(measure, missing):
            print(result, flush=True)
            rows.append(result)
            rows.sort(key=_order)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("[\n" + ",\n".join(f"  {json.dumps(known)}" for known in rows) + "\n]\n")
    for steps, rates in ((SHORT, SHORT_RATES), (STEPS, RATES)):
        print(f"{steps} steps:\n{by_rate(rows, steps, rates)}")
    print(f"seeds at {LEARNING_RATE:g}:\n{by_seed(rows)}")


def by_rate(rows: Sequence[Mapping[str, Any]], steps: int, rates: Sequence[float]) -> str:
    """A row for each method, a column for each rate."""
    of_seed_0 = [row for row in rows if row["steps"] == steps and row["seed"] == 0]
    found = {(row["method"], row["learning_rate"], row["scale"]): row for row in of_seed_0}
    cells = [
        [LABELS[method], *(_loss(found.get((method, rate, scale))) for rate in rates)]
        for method, scale in METHODS.items()
    ]
    return table(["learning rate", *(f"{rate:g}" for rate in rates)], cells)


def by_seed(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each method, a column for each seed."""
    found = of_the_demo(rows)
    cells = [[LABELS[method], *(_loss(found[method].get(seed)) for seed in SEEDS)] for method in METHODS]
    return table(["", *(f"seed {seed}" for seed in SEEDS)], cells)


def of_the_demo(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The rows with the demo's own settings, by method and seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {method: {} for method in METHODS}
    for row in rows:
        if (row["steps"], row["learning_rate"], row["scale"]) == (STEPS, LEARNING_RATE, METHODS[row["method"]]):
            found[row["method"]][row["seed"]] = row
    return found


def _loss(row: Mapping[str, Any] | None) -> str:
    return f"{row['held_out_loss']:.3f}" if row else ""


if __name__ == "__main__":
    main()
