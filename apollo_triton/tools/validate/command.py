"""Check the Triton kernels and the reference backend against float64, on the GPU here or in Triton's interpreter.

The cases are in ``cases.py``, and ``runs.py`` runs them. ``float64.py`` has the algorithm in float64, and the limits
with the reason for each. Only ``run`` imports Triton. Without a GPU it makes Triton interpret the kernels.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...core.device_backend import device_backend
from ...core.extras import require
from ...version import __version__
from ..text import fill, table, terminal_columns
from .cases import DTYPES, Case, default_cases, full_cases

if TYPE_CHECKING:
    from .runs import Errors


_LABEL = 40  # columns of a case's name and stage, in a terminal of 80
_FIGURES = "{:<8}{:>8}{:>10}{:>8} {}"
QUANTITIES = {
    "P": "the random projection [rank, width]",
    "R": "the projected gradient, R = G P^T [channels, rank]",
    "|G|^2": "the sum of squares of the gradient G",
    "|G_c|^2": "the sum of squares of each channel c of G",
    "by K": "|G_c|^2 by way of K, the Gram matrix of the tokens",
    "M": "Adam's first moment, of R; of a dense weight that of G",
    "V": "Adam's second moment, likewise",
    "s_c": "the factor of channel c, |N_c| / |R_c| with N = M / (sqrt(V) + eps)",
    "sums": "sums over channels, of which the update's norm and a matrix's single factor are made",
    "W": "the weight after a step",
    "W at end": "the weight after the last step, against float64 that went its own way from the first",
    "u_prev": "the norm of the update, kept for the limiter of the next",
    "skipped": "by how many the count of gradients that are not finite is off",
}
HEADINGS = {
    "projection": "P, made in the kernel or in memory, against projection_matrix: the largest error",
    "verbs": "verb by verb, each given the result of the verb before it",
    "steps": "trajectories of 8 steps with two refreshes of P; each step from the run's state",
    "implicit": "steps from a linear layer's inputs X and output gradients dY; the reference backend gets G",
}
# A line shows the one of these measures that is nearest its limit. All others count too, and are shown if they miss.
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "projection": {"": ("P", "R")},
    "verbs": {
        "sketch": ("R", "|G|^2", "|G_c|^2"),
        "rescale": ("M", "V", "s_c", "sums"),
        "apply": ("W", "u_prev"),
    },
    "steps": {"": ("W", "W at end", "u_prev")},
    "implicit": {"sketch": ("R", "|G_c|^2", "by K"), "apply": ("W", "u_prev")},
}
_PROGRESS_SECONDS = 30  # between the lines that say where it stands


def run(options: argparse.Namespace) -> int:
    """Run the cases and print a line for each. Returns 0 if every error is within its limit, else 1.

    Raises ValueError or ModuleNotFoundError if the kernels cannot run here.
    """
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed {options.seed}: a seed is 0 to 2**32 - 1")
    device = _ready(options.device)
    cases = full_cases(device.type != "cpu") if options.full else default_cases(device.type != "cpu")
    print(_heading(device, options.seed, len(cases)))
    report = Report(cases, device, options)
    try:
        for case in cases:
            report.add(case)
    finally:  # after Ctrl-C too
        print(f"\n{report.summary()}")
    return 1 if report.missed else 0


def _ready(asked: str | None) -> torch.device:
    """The device to run on. Triton is imported then, to compile for a GPU or to interpret on a CPU."""
    require("torch", "triton")
    device = _default_device() if asked is None else _device(asked)
    interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton's functions and ours are defined
    elif interpreting and device.type in ("cuda", "xpu"):
        raise ValueError(
            f"--device {device}: TRITON_INTERPRET=1 is set, with which kernels run only on a CPU; unset it"
        )
    try:
        if device.type == "cpu":
            require("numpy", "triton")  # Triton's interpreter imports it, and triton does not install it
        triton = require("triton", "triton")
        if device.type == "cpu" and isinstance(triton.language.zeros, triton.runtime.JITFunction):
            raise ValueError("triton was imported before, to compile; set TRITON_INTERPRET=1 before that, or use a GPU")
        device_backend(torch.empty(1, device=device), "triton")
    except (ValueError, ModuleNotFoundError):
        if not interpreting:
            os.environ.pop("TRITON_INTERPRET", None)
        raise
    return device


def _default_device() -> torch.device:
    """The current GPU if the kernels can be compiled for it, else the CPU."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        for name in ("cuda", "xpu"):
            if (
                getattr(torch, name).is_available()
                and device_backend(torch.empty(1, device=name), "auto").name == "triton"
            ):
                return torch.device(name)
    return torch.device("cpu")


def _device(name: str) -> torch.device:
    try:
        torch.device(name)
    except RuntimeError:  # torch's text lists all kinds of devices
        raise ValueError(f"--device {name}: not a device; allowed are cpu, cuda, cuda:1, xpu and the like") from None
    try:
        return torch.empty(1, device=name).device
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # torch raises any of these for a missing device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: {reason}") from None


def _heading(device: torch.device, seed: int, cases: int) -> str:
    """The title, with device, versions and the count of cases, and what the figures mean."""
    triton = require("triton", "triton")
    if device.type == "cpu":
        where = f"{platform.machine()} CPU, in Triton's interpreter"
    else:
        where = f"{torch.get_device_module(device).get_device_name(device)} ({device}), compiled"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    explained = (
        "Each line has the largest error of the kernels and of the reference backend, and the limit of both. Errors "
        "are differences from float64, relative to what float32 arithmetic rounds. For 16-bit W, M and V the figure is "
        "the share of entries that differ from float64's, rounded once. Of a line's quantities the one is shown that "
        "is nearest its limit. The reason for each limit: apollo_triton/tools/validate/float64.py. The quantities:"
    )
    title = f"apollo-triton {__version__} on {where}; {versions}; seed {seed}; {cases:,} cases"
    return f"{fill(title)}\n\n{fill(explained)}\n\n{table(list(QUANTITIES.items()), left=(0, 1))}"


class Report:
    """Runs cases, prints lines for each, and counts. With ``full`` it prints only misses and the progress."""

    def __init__(self, cases: Sequence[Case], device: torch.device, options: argparse.Namespace) -> None:
        self.total, self.device, self.options = len(cases), device, options
        self.done, self.missed = 0, 0
        self._sections = [len(list(section)) for _, section in itertools.groupby(cases, lambda case: case.kind)]
        self._largest = (0.0, "")
        self._left_out: dict[str, int] = {}
        self._kind = ""
        self._start = self._shown = time.monotonic()

    def add(self, case: Case) -> None:
        """Run a case and print its lines."""
        from .runs import measured

        if case.kind != self._kind:
            self._kind = case.kind
            self._print_heading()
        weight, gradient = DTYPES[case.dtypes]
        if weight != gradient and not hasattr(torch.Tensor, "grad_dtype"):
            self._left_out[case.dtypes] = self._left_out.get(case.dtypes, 0) + 1
            return
        with warnings.catch_warnings():  # NumPy, in the interpreter, warns of infinities
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
            errors = measured(case, self.device, self.options.seed)
        worst = errors.worst()
        missed = [measure for measure in worst if errors.share(measure) > 1]
        self.done += 1
        self.missed += bool(missed)
        self._largest = max(self._largest, (errors.share(worst[0]), f"{worst[0]}, {case.name}"))
        self._print(case, errors, worst, missed)

    @property
    def _seen(self) -> int:
        return self.done + sum(self._left_out.values())

    def _print_heading(self) -> None:
        first, last = self._seen + 1, self._seen + self._sections.pop(0)
        which = f"Case {first:,}" if first == last else f"Cases {first:,} to {last:,}"
        print(f"\n{fill(f'{which} of {self.total:,}: {HEADINGS[self._kind]}')}")
        self._print_line("", "", "kernels", "reference", "limit", "")

    def _print(self, case: Case, errors: Errors, worst: list[str], missed: list[str]) -> None:
        """Print a line for each miss or, if there is none, for each stage its measure that is nearest its limit."""
        lines = [("", measure) for measure in missed]
        if not missed and not self.options.full:
            stages = STAGES[case.kind].items()
            lines = [(stage, next(measure for measure in worst if measure in of_stage)) for stage, of_stage in stages]
        for index, (stage, measure) in enumerate(lines):
            found = (f"{error:.1e}" for error in errors.found[measure].values())
            label = f"{case.name if missed or index == 0 else '':<32} {stage}".rstrip()
            verdict = "MISS" if missed else "ok"
            self._print_line(label, measure, *found, f"{errors.limits[measure]:.1e}", verdict)
        now = time.monotonic()
        if now - self._shown > _PROGRESS_SECONDS:
            self._shown, left = now, (now - self._start) / self.done * (self.total - self._seen)
            to_go = f"{left:.0f} seconds" if left < 100 else f"{left / 60:.0f} minutes"
            print(f"{self._seen:,} of {self.total:,} cases, {self.missed} missed; about {to_go} to go", flush=True)

    def _print_line(self, label: str, *figures: str) -> None:
        """The label, and the figures beside it or, where the terminal has no room for both, below it."""
        room = max(0, min(_LABEL, terminal_columns() - 40))
        if len(label) > room:  # with --full, and in narrow terminals
            print(" ".join(label.split()))
            label = ""
        print(f"{label:<{room}} {_FIGURES.format(*figures)}".rstrip(), flush=True)

    def summary(self) -> str:
        """The counts, the largest share of a limit, and the time."""
        share, where = self._largest
        left_out = ", ".join(f"{count} {dtypes}" for dtypes, count in self._left_out.items())
        parts = [
            f"{self.done} of {self.total} cases: {self.done - self.missed} ok, {self.missed} missed.",
            f"Largest share of a limit: {share:.0%} ({where})." if self.done else "",
            f"{time.monotonic() - self._start:.0f} s.",
            f"Left out: {left_out}; this torch has no gradients of another dtype." if left_out else "",
        ]
        return fill(" ".join(filter(None, parts)))
