"""What the tests of the demo share: a demo of seconds."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from apollo_triton.tools.demo.corpus import Corpus
from apollo_triton.tools.demo.training import RunConfig

METHODS = ("adamw", "apollo", "mini")
STEPS, BATCH, SEQUENCE = 12, 2, 16


def arguments(text: Path, out: Path, *more: str) -> list[str]:
    small = ["--model", "tiny", "--steps", str(STEPS), "--batch", str(BATCH), "--sequence", str(SEQUENCE)]
    return ["demo", "--data", str(text), "--out", str(out), *small, *more]


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def config(corpus: Corpus, method: str = "apollo", **changes) -> RunConfig:
    made = RunConfig(method, 1e-2, None if method == "adamw" else "auto", "tiny", STEPS, BATCH, SEQUENCE, 0, "cpu", "")
    return dataclasses.replace(made, data=corpus.fingerprint, **changes)
