"""The stages of the check, in the order of their worth, each with its limit within eight minutes.

A stage writes one results file, and goes on at the next call where its limit cut it off. ``rehearsal``: its arguments
on a CPU, at toy sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..stage import Stage

MINUTES = 8.0
# Of whole_step: the cases and contenders of (d), and those of (f).
MATRICES = "7B matrices (bfloat16|float32)|7B matrices 4 layers bfloat16"
OPTIMIZERS = "(?!.*graph replay)(Q-|APOLLO|PyTorch (SGD|AdamW, fused|Muon)|apollo-torch|flashoptim|adafactor8bit).*"
MODELS = "(60M|1B) bfloat16"
REPLAYS = "APOLLO(-Mini)?(, graph replay)?|PyTorch (SGD|AdamW), fused(, graph replay)?"
# The paper's learning rate for APOLLO, and a usual one for AdamW. 7 million bytes of the standard library's source.
PRETRAINING = (
    *("--model", "60M", "--sequence", "256", "--batch", "64", "--steps", "400", "--dtype", "bfloat16"),
    *("--vocabulary", "256", "--seeds", "1", "--lr", "AdamW=2e-3", "APOLLO=1e-2", "Mini=1e-2"),
    *("--variants", "APOLLO", "AdamW", "Mini"),
)
TOY = ("--device", "cpu")


@dataclass(frozen=True)
class Check(Stage):
    rehearsal: tuple[str, ...] = ()


def _named(name: str, *arguments: str) -> tuple[str, ...]:
    return ("--name", name, *arguments)


CHECKS = (
    Check("compilation", "gpu_check.compilation", (), 40, resumes=False, rehearsal=("--toy", *TOY)),
    Check(
        "a: float64",
        "gpu_check.exactness",
        (),
        55,
        rehearsal=("--toy", "--repeat", "0.001", "--shapes", "dense|int8, Mini", *TOY),
    ),
    Check("b: tests", "gpu_check.suite", (), 95, rehearsal=("--toy", *TOY)),
    Check("c: validate", "gpu_check.validation", (), 45, rehearsal=("--cases", "projection: rank 1 gaussian.*", *TOY)),
    Check(
        "d: whole step, 7B matrices",
        "whole_step",
        _named("whole_step-7B-matrices", "--cases", MATRICES, "--contenders", OPTIMIZERS),
        75,
        rehearsal=_named("whole_step-7B-matrices", "--cases", "TOY matrices .*", "--contenders", OPTIMIZERS, *TOY),
    ),
    Check("e: changes", "gpu_check.changes", (), 45, rehearsal=("--toy", "--rounds", "1", *TOY)),
    Check(
        "f: whole step, models",
        "whole_step",
        _named("whole_step-models", "--cases", MODELS, "--contenders", REPLAYS),
        40,
        rehearsal=_named("whole_step-models", "--cases", "TOY bfloat16", "--contenders", REPLAYS, *TOY),
    ),
    Check(
        "g: training, 7B",
        "training",
        _named("training-7B", "--sizes", "7B"),
        40,
        rehearsal=_named("training-7B", "--sizes", "TOY", "--sequence", "16", *TOY),
    ),
    Check(
        "h: pre-training",
        "pretrain",
        _named("pretrain-minutes", *PRETRAINING),
        35,
        rehearsal=_named(
            *("pretrain-minutes", "--model", "tiny", "--sequence", "16", "--batch", "2", "--steps", "2"),
            *("--vocabulary", "256", "--seeds", "1", "--variants", "APOLLO", "AdamW", "Mini", *TOY),
        ),
    ),
)
# Where the results of a check are: the file names of its stages, which the stage itself writes.
FILES = (
    *(f"gpu_check-{name}" for name in ("float64", "tests", "validate", "changes")),
    *(check.arguments[1] for check in CHECKS if check.arguments),
)
