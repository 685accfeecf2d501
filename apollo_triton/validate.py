"""Check the Triton kernels and the reference path against float64, on the GPU here or in Triton's interpreter.

What is run: ``validate_cases.py``; how: ``validate_runs.py``; the algorithm in float64, and the limits with the reason
for each: ``validate_float64.py``. Triton is imported by ``run`` alone, which has it interpret where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from textwrap import fill

import torch

from .backends import choose
from .extras import require
from .validate_cases import DTYPES, Case, default_cases, full_cases
from .version import __version__

COLUMNS = 79  # of a small terminal
HEADINGS = {
    "projection": "P, made in the kernel or in memory, against projection_matrix",
    "verbs": "Verb by verb",
    "steps": "Trajectories",
}
_PROGRESS_SECONDS = 30  # between the lines that --full shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``apollo-triton validate``."""
    parser.add_argument(
        "--full", action="store_true", help="the product of shapes, dtypes, ranks and options: hours in the interpreter"
    )
    parser.add_argument(
        "--device", help="cuda, cuda:1, xpu, ..., or cpu for Triton's interpreter (default: a GPU if there is one)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, gradients and projections (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Run the cases and print a line for each; 0 if every error is within its limit, else 1.

    Raises ValueError or ModuleNotFoundError where the kernels cannot run.
    """
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed {options.seed}: a seed is 0 to 2**32 - 1")
    device = _ready(options.device)
    cases = full_cases(device.type != "cpu") if options.full else default_cases(device.type != "cpu")
    print(_heading(device, options.seed))
    report = Report(len(cases), device, options)
    try:
        for case in cases:
            report.add(case)
    except KeyboardInterrupt:
        print(f"\ninterrupted\n{report.summary()}")
        raise
    print(f"\n{report.summary()}")
    return 1 if report.missed else 0


def _ready(asked: str | None) -> torch.device:
    """The device to run on, with Triton imported to compile for it, or to interpret on a CPU."""
    require("torch", "triton")
    device = _default_device() if asked is None else _device(asked)
    interpreting = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton defines its functions, and ours
    elif interpreting:
        raise ValueError(
            f"--device {device}: TRITON_INTERPRET=1 is set, with which kernels run on a CPU alone; unset it"
        )
    try:
        triton = require("triton", "triton")
        if device.type == "cpu" and isinstance(triton.language.zeros, triton.runtime.JITFunction):
            raise ValueError("triton was imported before, to compile: set TRITON_INTERPRET=1 before that, or use a GPU")
        choose(torch.empty(1, device=device), "triton")
    except (ValueError, ModuleNotFoundError):
        if not interpreting:
            os.environ.pop("TRITON_INTERPRET", None)
        raise
    return device


def _default_device() -> torch.device:
    """The current GPU if the kernels can be compiled for it, else the CPU."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        for name in ("cuda", "xpu"):
            if getattr(torch, name).is_available() and choose(torch.empty(1, device=name), "auto").name == "triton":
                return torch.device(name)
    return torch.device("cpu")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has all of them for what is not there
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: {reason}") from None


def _heading(device: torch.device, seed: int) -> str:
    """What is run, and on what."""
    triton = require("triton", "triton")
    if device.type == "cpu":
        where = f"{platform.machine()} CPU, in Triton's interpreter"
    else:
        where = f"{torch.get_device_module(device).get_device_name(device)} ({device}), compiled"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    explained = (
        "Errors are against float64, as shares of what float32 arithmetic rounds; of W in 16 bits, and of 16-bit M and "
        "V, the share of entries that are not float64's rounded once. Of all that a case measures, the line shows what "
        "is nearest its limit. Why each limit is what it is: apollo_triton/validate_float64.py."
    )
    title = f"apollo-triton {__version__} on {where}; {versions}; seed {seed}"
    return f"{fill(title, COLUMNS)}\n\n{fill(explained, COLUMNS)}"


class Report:
    """Runs cases, prints a line for each (with ``full`` for each that misses, and progress), and keeps count."""

    def __init__(self, total: int, device: torch.device, options: argparse.Namespace) -> None:
        self.total, self.device, self.options = total, device, options
        self.done, self.missed = 0, 0
        self._largest = (0.0, "")
        self._left_out: set[str] = set()
        self._kind = ""
        self._start = self._shown = time.monotonic()

    def add(self, case: Case) -> None:
        """Run a case and print what came out."""
        from .validate_runs import measured

        weight, gradient = DTYPES[case.dtypes]
        if weight != gradient and not hasattr(torch.Tensor, "grad_dtype"):
            self._left_out.add(f"{case.dtypes} (torch {torch.__version__} has no gradients of another dtype)")
            return
        if case.kind != self._kind:
            self._kind = case.kind
            columns = ("of", "kernels", "reference", "limit")
            print("\n{:<41}{:<9}{:>8}{:>10}{:>8}".format(f"{HEADINGS[case.kind]}", *columns))
        errors = measured(case, self.device, self.options.seed)
        worst = errors.worst()
        missed = [measure for measure in worst if errors.share(measure) > 1]
        for measure in missed or worst[:1]:
            found = (f"{errors.found[measure][path]:.1e}" for path in errors.found[measure])
            verdict = "MISS" if missed else "ok"
            line = "{:<41}{:<9}{:>8}{:>10}{:>8.1e} {}"
            print(line.format(case.name, measure, *found, errors.limits[measure], verdict), flush=True)
        self.done += 1
        self.missed += bool(missed)
        self._largest = max(self._largest, (errors.share(worst[0]), f"{worst[0]}, {case.name}"))

    def summary(self) -> str:
        """Counts, the largest share, and the time."""
        share, where = self._largest
        left_out = f" Left out: {'; '.join(sorted(self._left_out))}." if self._left_out else ""
        return fill(
            f"{self.done} of {self.total} cases: {self.done - self.missed} ok, {self.missed} missed. Largest share of a "
            f"limit: {share:.0%} ({where}). {time.monotonic() - self._start:.0f} s.{left_out}",
            COLUMNS,
        )
