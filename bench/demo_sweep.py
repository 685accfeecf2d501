"""Which learning rate, and for Mini which scale, should the demo use? It trains the demo's model with each candidate.

    python -m bench.demo_sweep            # writes bench/results/demo_sweep.json and prints docs/demo.md's table

Each core trains one candidate at a time, with one thread. Candidates that the output file has are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch

from apollo_triton.tools.demo.corpus import load_corpus
from apollo_triton.tools.demo.training import Run, RunConfig
from apollo_triton.tools.options import BATCH, SEQUENCE, STEPS

# A third of the demo's steps tell the good settings from the bad; the best of those run to the end.
SHORT = 200
CANDIDATES = [
    *(("adamw", rate, None) for rate in (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2)),
    *(("apollo", rate, None) for rate in (5e-3, 1e-2, 2e-2, 4e-2)),
    *(("mini", rate, scale) for rate in (5e-3, 1e-2) for scale in (32.0, 128.0, 512.0, 2048.0)),
    ("mini", 2e-2, 128.0),
]
FINALISTS = [
    ("adamw", 2e-3, None),
    ("adamw", 3e-3, None),
    ("adamw", 5e-3, None),
    ("apollo", 1e-2, None),
    ("apollo", 2e-2, None),
    ("mini", 1e-2, 128.0),
    ("mini", 5e-3, 512.0),
]


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
    }


def main() -> None:
    """Run the missing candidates, and rewrite the file after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/demo_sweep.json"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    options = parser.parse_args()
    data = load_corpus(None, SEQUENCE + 1).fingerprint
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    configs = [
        RunConfig(method, rate, scale, "1M", steps, BATCH, SEQUENCE, seed=0, device="cpu", data=data)
        for steps, settings in ((SHORT, CANDIDATES), (STEPS, FINALISTS))
        for method, rate, scale in settings
    ]
    missing = [config for config in configs if not any(row(config).items() <= known.items() for known in rows)]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for result in pool.imap_unordered(measure, missing):
            print(result, flush=True)
            rows.append(result)
            rows.sort(key=lambda known: [known[name] or 0 for name in ("steps", "method", "scale", "learning_rate")])
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("[\n" + ",\n".join(f"  {json.dumps(known)}" for known in rows) + "\n]\n")
    print("| steps | method | scale | learning rate | held-out loss |\n|---|---|---|---|---|")
    for known in rows:
        settings = (known["steps"], known["method"], known["scale"] or "", known["learning_rate"])
        print(f"| {' | '.join(map(str, settings))} | {known['held_out_loss']:.3f} |")


if __name__ == "__main__":
    main()
