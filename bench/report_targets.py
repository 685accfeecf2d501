"""The targets, each with the figure that was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .report_data import Machine, share_of_roofline
from .results_file import EVERY_MACHINE

MISSING = "not measured"
LARGE, SMALL = "7B matrices bfloat16", "60M matrices float32"


@dataclass(frozen=True)
class Target:
    """A bound for a figure.

    ``value`` finds the figure of a machine, or None if it was not measured there. The target is reached if the figure
    is at most ``bound``, or with ``at_least`` at least ``bound``. ``gpu``: the target is for GPUs (True), for CPUs
    (False), or for both (None).
    """

    text: str
    bound: float
    value: Callable[[Machine], float | None]
    at_least: bool = False
    gpu: bool | None = True
    form: str = "{:.2f}"

    def line(self, machines: Sequence[Machine]) -> list[str]:
        """The target's cells in the table: text, bound, figure with its verdict, machine."""
        bound = f"{'at least' if self.at_least else 'at most'} {self.form.format(self.bound)}"
        for machine in machines:
            figure = self.value(machine) if self.gpu is None or machine.is_gpu == self.gpu else None
            if figure is not None:
                reached = figure >= self.bound if self.at_least else figure <= self.bound
                verdict = "reached" if reached else "**missed**"
                where = "counted" if machine.folder == EVERY_MACHINE else machine.name
                return [self.text, bound, f"{self.form.format(figure)}, {verdict}", where]
        return [self.text, bound, MISSING, "needs a GPU" if self.gpu else ""]


def _ratio(case: str, contender: str, to: str, inverse: bool = False) -> Callable[[Machine], float | None]:
    def value(machine: Machine) -> float | None:
        row = machine.find("whole_step", f"{case}: {contender}")
        figure = row and row.get(f"times {to}")
        return (1 / figure if inverse else figure) if figure else None

    return value


def _slower_of_host_and_device(case: str, contender: str, to: str) -> Callable[[Machine], float | None]:
    """A ratio of step times. A step takes the time of the host or of the device, whichever is longer."""

    def value(machine: Machine) -> float | None:
        rows = [machine.find("whole_step", f"{case}: {name}") for name in (contender, to)]
        times = [max(row["ms"][1], row["host_ms"]) for row in rows if row]
        return times[0] / times[1] if len(times) == 2 else None

    return value


def _mini_of_copy(machine: Machine) -> float | None:
    row = machine.find("whole_step", f"{LARGE}: APOLLO-Mini")
    return row and share_of_roofline(row) * 8 * row["parameters"] / row["bytes"]


def _figure(file: str, identity: str, name: str) -> Callable[[Machine], float | None]:
    def value(machine: Machine) -> float | None:
        row = machine.find(file, identity)
        return row and row.get(name)

    return value


HOST = "APOLLO, rank 32, 224 matrices"
LAYER = "APOLLO, rank 32, one layer from its"
TARGETS = (
    Target("7B matrices: Mini, share of the copy bandwidth at 8 bytes a parameter", 0.90, _mini_of_copy, at_least=True),
    Target("7B matrices: APOLLO at rank 256, times Mini", 1.45, _ratio(LARGE, "APOLLO", "APOLLO-Mini")),
    Target(
        "7B matrices: PyTorch's fused AdamW, times Mini",
        1.75,
        _ratio(LARGE, "PyTorch AdamW, fused", "APOLLO-Mini"),
        at_least=True,
    ),
    Target(
        "7B matrices: apollo-torch Mini, times Mini",
        3.0,
        _ratio(LARGE, "apollo-torch, Mini", "APOLLO-Mini"),
        at_least=True,
    ),
    Target("7B matrices: Mini, times fused SGD", 1.4, _ratio(LARGE, "PyTorch SGD, fused", "APOLLO-Mini", inverse=True)),
    Target(
        "60M, whole model: Mini, times fused AdamW, host included",
        1.0,
        _slower_of_host_and_device("60M bfloat16", "APOLLO-Mini", "PyTorch AdamW, fused"),
    ),
    *(
        Target(label, bound, _figure("host_overhead", row, kind), gpu=None)
        for label, bound, row, kind in (
            ("a step of 224 matrices on the host, ms", 0.35, HOST, "stable_launched_ms"),
            ("the same, every gradient moved, ms", 0.55, HOST, "moved_launched_ms"),
            ("one layer from its factors on the host, µs", 60.0, f"{LAYER} factors", "launched_us"),
            ("one layer from its gradient on the host, µs", 60.0, f"{LAYER} gradient", "launched_us"),
        )
    ),
    Target(
        "launches for all matrices", 4, _figure("launches", "APOLLO-Mini: a step", "launches"), gpu=None, form="{:.0f}"
    ),
    Target("Mini: bytes moved a parameter, bfloat16", 8.2, _figure("launches", "APOLLO-Mini: a step", "all"), gpu=None),
    Target("import apollo_triton, times import torch", 1.2, _figure("import_time", "import", "ratio"), gpu=None),
    *(
        Target(
            f"CPU, {dtype}: {label}, times {peer_label}",
            bound,
            _ratio(f"60M matrices {dtype}", peer, ours, inverse=True),
            gpu=False,
        )
        for dtype, label, ours, peer_label, peer, bound in (
            ("float32", "Mini", "APOLLO-Mini", "fused AdamW", "PyTorch AdamW, fused", 1.25),
            ("float32", "Mini", "APOLLO-Mini", "apollo-torch Mini", "apollo-torch, Mini", 0.5),
            ("float32", "rank 128", "APOLLO", "apollo-torch", "apollo-torch", 0.8),
            ("bfloat16", "Mini", "APOLLO-Mini", "apollo-torch Mini", "apollo-torch, Mini", 0.67),
            ("bfloat16", "rank 128", "APOLLO", "apollo-torch", "apollo-torch", 0.5),
        )
    ),
)
