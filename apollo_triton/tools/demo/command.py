"""Train a small LLaMA with AdamW, APOLLO and APOLLO-Mini and compare them: three minutes on two free CPU cores.

All three start from the same weights, see the same batches and have the same learning rate, which a sweep chose for
AdamW (docs/demo.md). The text is the source of Python's standard library, which is on every machine. A byte is a
token. With the checkpoints in the output folder ``--resume`` continues an interrupted demo, and ends with the same
bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...core.extras import require
from ...core.settings import AUTO
from .corpus import Corpus, load_corpus
from .report import OUTPUTS, Result, table, write_results
from .training import GRADIENTS, LABELS, SIZES, Run, RunConfig, read_checkpoint

# An interrupted demo loses at most this much work.
SECONDS_BETWEEN_CHECKPOINTS = 20


def run(options: argparse.Namespace) -> int:
    """Train and report. Returns the exit status: 0, or 130 after Ctrl-C."""
    started = time.perf_counter()
    console = require("rich.console", "demo").Console(highlight=False)
    for module in ("transformers", "matplotlib"):  # if one is missing, say so before the training
        with console.status(f"loading {module}"):
            require(module, "demo")
    corpus = load_corpus(options.data, _at_least("sequence", options.sequence, 1) + 1)
    configs = make_configs(options, corpus)
    checkpoints = _prepare(options.out, configs, options.resume)
    first = configs[0]
    console.print(
        f"{corpus.name}: {len(corpus.train) / 1e6:.2f} MB to train on, {len(corpus.held_out) / 1e6:.2f} MB held out\n"
        f"LLaMA {first.model}, float32 on {first.device}, {first.steps} steps of {first.batch} x {first.sequence} bytes"
    )
    results: list[Result] = []
    try:
        for config in configs:
            results.append(train(config, corpus, checkpoints[config.method], options.resume, console))
    except KeyboardInterrupt:
        if any(path.exists() for path in checkpoints.values()):
            advice = "Nothing is lost: give the same command again with [bold]--resume[/bold] added."
        else:
            advice = "No checkpoint was saved yet: give the same command again to begin anew."
        console.print(f"\nInterrupted. {advice}")
        return 130
    paths = write_results(results, corpus.name, options.out)
    console.print(table(results))
    console.print(f"{time.perf_counter() - started:.0f} s; see {options.out}: {', '.join(path.name for path in paths)}")
    return 0


def train(config: RunConfig, corpus: Corpus, checkpoint: Path, resume: bool, console: Any) -> Result:
    """Train to the end of ``config`` and save checkpoints. With ``resume`` start from ``checkpoint``, if it exists."""
    run = Run(config, corpus)
    if resume and checkpoint.exists():
        run.load(checkpoint)
    saved = time.monotonic()
    with _progress(run, console) as show:
        while True:
            evaluated = run.evaluation_due
            if evaluated:
                run.evaluate()
            if evaluated or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                run.save(checkpoint)
                saved = time.monotonic()
            show(evaluated)
            if run.finished:
                return Result.of(run)
            run.advance()


def make_configs(options: argparse.Namespace, corpus: Corpus) -> list[RunConfig]:
    """One config for each method, from the command line.

    Raises ValueError that names the option, its value and what is allowed.
    """
    if options.model not in SIZES:
        raise ValueError(f"--model {options.model}: unknown size (allowed: {', '.join(SIZES)})")
    methods = list(dict.fromkeys(options.methods.split(",")))
    if not 0 <= options.lr < float("inf"):
        raise ValueError(f"--lr {options.lr}: a learning rate is a finite number, 0 or more")
    scale = _scale(options.scale)
    if not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed {options.seed}: it must be an integer from 0 to 2**31 - 1")
    if options.gradients not in GRADIENTS:
        raise ValueError(f"--gradients {options.gradients}: allowed are {', '.join(GRADIENTS)}")
    for method in methods:
        _check_method("methods", method)
    return [
        RunConfig(
            method=method,
            learning_rate=options.lr,
            scale=None if method == "adamw" else scale,
            model=options.model,
            steps=_at_least("steps", options.steps, 1),
            batch=_at_least("batch", options.batch, 1),
            sequence=options.sequence,
            seed=options.seed,
            device=_device(options.device),
            data=corpus.fingerprint,
            gradients=options.gradients,
        )
        for method in methods
    ]


@contextmanager
def _progress(run: Run, console: Any) -> Iterator[Any]:
    """Yields a function to call after every step. It moves a bar on a terminal, and prints a line per evaluation
    elsewhere."""
    config, history, label = run.config, run.history, LABELS[run.config.method]

    def loss() -> str:
        return f"held-out loss {next(reversed(history.held_out_loss.values())):.3f}"

    if not console.is_terminal:
        yield lambda evaluated: evaluated and print(f"{label:<12} step {run.step}/{config.steps}  {loss()}", flush=True)
        return
    progress = require("rich.progress", "demo")
    columns = (
        progress.TextColumn(f"{label:<12}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.fields[loss]}"),
    )
    with progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=config.steps, completed=run.step, loss="")
        yield lambda evaluated: bar.update(task, completed=run.step, loss=loss())


def _prepare(folder: Path, configs: list[RunConfig], resume: bool) -> dict[str, Path]:
    """Make the output folder ready. Its checkpoints are checked against ``configs`` or, without ``resume``, deleted."""
    paths = {config.method: folder / f"{config.method}.checkpoint" for config in configs}
    existing = [config for config in configs if paths[config.method].exists()]
    if resume and not existing:
        raise ValueError(f"--resume: {folder} holds no run of {', '.join(paths)} to continue")
    for config in existing if resume else ():
        read_checkpoint(paths[config.method], config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: the folder cannot be made ({error.strerror}); choose another") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder}: nothing can be written there ({error.strerror}); choose another") from error
    for path in [*paths.values(), *(folder / name for name in OUTPUTS)]:
        if path.is_dir():
            raise ValueError(f"--out {folder}: {path.name} is a folder there; move it away, or choose another")
    for config in () if resume else existing:
        paths[config.method].unlink()
    return paths


def _scale(text: str) -> float | str:
    if text == AUTO:
        return text
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise ValueError(f"--scale {text}: it must be a number above 0, or {AUTO}")
    return scale


def _check_method(option: str, method: str) -> None:
    if method not in LABELS:
        raise ValueError(f"--{option}: {method!r} is not a method (allowed: {', '.join(LABELS)})")


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"--{option} {value}: it must be an integer of {least} or more")
    return value


def _device(name: str) -> str:
    if name not in ("cpu", "cuda", "auto"):
        raise ValueError(f"--device {name}: allowed are cpu, cuda and auto")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
    if name == "auto":
        return "cuda" if available else "cpu"
    return name
