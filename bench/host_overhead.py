"""What an update costs on the host: Python and tables, without launches and with Triton's part of them.

``python -m bench.host_overhead`` measures two things in under a minute:

* a whole step of LLaMA-7B's 224 matrices, alone and together with its 66 dense parameters;
* one layer-wise update of one linear layer (``gradients="none"``), from the two factors of its gradient and from the
  gradient itself.

Each is measured twice: with ``gpu.launch`` doing nothing, and ("launched") with everything but the driver's launch
itself (``stub_driver.py``). The figures are the least CPU time of this thread in many rounds, so that other processes
hardly enter. The matrices have 7B's three shapes scaled down: the host's time depends on how many there are, not on
their size. It runs on any machine. A GPU adds the driver's launches and the copy of changed addresses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.core import device_backend, gpu
from apollo_triton.core.implicit_gradient import ImplicitGradient

from .contenders import MINI
from .results_file import Results
from .stub_driver import install

MATRICES = [(64, 64)] * 128 + [(172, 64)] * 64 + [(64, 172)] * 32
DENSE = [(64,)] * 66
GROUPS = {"APOLLO, rank 32": {"rank": 32}, "APOLLO-Mini": MINI}
TARGETS = {"stable_launched_ms": 0.35, "moved_launched_ms": 0.55, "launched_us": 60.0}
# The one layer has out = in = 64. 4 tokens are to it what 256 are to a layer of 4096 x 4096, where a step without a
# gradient pays: its exact norms come from the Gram matrix, the way with the most launches.
FEATURES, TOKENS = 64, 4
UPDATES_A_ROUND = 10  # one layer's update takes a tenth of a step or less


def least_seconds(timed: Callable[[], None], before: Callable[[], None], rounds: int) -> float:
    """The least CPU time of ``timed``. ``before`` runs ahead of each call and is not timed."""
    least = float("inf")
    for _ in range(rounds):
        before()
        start = time.thread_time()
        timed()
        least = min(least, time.thread_time() - start)
    return least


def _no_launch(*arguments: object, **constants: object) -> None:
    """A kernel that costs nothing. A mock would keep its arguments and cost more than a step."""


def _ways() -> dict[str, AbstractContextManager[object]]:
    """How launches are measured, by what the name of a figure begins its unit with."""
    return {"": mock.patch.object(gpu, "launch", _no_launch), "launched_": nullcontext()}


def _launches(update: Callable[[], None], before: Callable[[], None]) -> int:
    """How many kernels an update launches. The first update, which makes the state and the plan, does not count."""
    with mock.patch.object(gpu, "launch") as launch:
        before()
        update()
        launch.reset_mock()
        before()
        update()
        return launch.call_count


def measured_step(group: dict[str, object], dense: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of a step when every gradient stays where it was ("stable") and when all have moved; launches."""
    matrices = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in MATRICES]
    rest = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in DENSE] if dense else []
    groups = [{"params": matrices, **group}] + ([{"params": rest}] if rest else [])
    optimizer = APOLLOAdamW(groups)
    kept: list[torch.Tensor] = []

    def move() -> None:
        """New gradients while the old ones are still there, so that no address stays."""
        old = [parameter.grad for parameter in matrices + rest if parameter.grad is not None]
        for parameter in matrices + rest:
            parameter.grad = torch.zeros_like(parameter)
        kept[:] = old

    def stay() -> None:
        pass

    move()
    launches = _launches(optimizer.step, stay)
    figures: dict[str, float] = {"launches": launches}
    for way, launching in _ways().items():
        with launching:
            figures[f"stable_{way}ms"] = 1e3 * least_seconds(optimizer.step, stay, rounds)
            figures[f"moved_{way}ms"] = 1e3 * least_seconds(optimizer.step, move, rounds)
    return figures


def measured_layer(group: dict[str, object], from_factors: bool, rounds: int) -> dict[str, float]:
    """Microseconds of one layer-wise update of one linear layer, from factors or gradients that stay in place;
    launches."""
    layer = torch.nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.bfloat16)
    weight = layer.weight
    optimizer = APOLLOAdamW([{"params": [weight], **group}])
    handle = attach_layerwise(layer, optimizer, gradients="none")
    X, dY = (torch.zeros(TOKENS, FEATURES, dtype=torch.bfloat16) for _ in range(2))
    gradient = torch.zeros_like(weight)

    def ready() -> None:
        """Bring back what an update takes away: it marks the weight as updated, and the hook frees the gradient."""
        handle._updated.clear()
        if not from_factors:
            weight.grad = gradient

    def update() -> None:
        if from_factors:
            handle.update(weight, ImplicitGradient(X, dY))
        else:
            handle._update_from_gradient(weight)

    launches = _launches(update, ready)
    figures: dict[str, float] = {"launches": launches}
    for way, launching in _ways().items():
        with launching:
            figures[f"{way}us"] = 1e6 * least_seconds(update, ready, UPDATES_A_ROUND * rounds)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="steps that the least is of (%(default)s)")
    rounds = parser.parse_args().rounds
    results = Results("host_overhead", fresh=True, settings={"rounds": rounds})
    install()

    def add(name: str, figures: dict[str, float]) -> None:
        row = {kind: figure if kind == "launches" else round(figure, 3) for kind, figure in figures.items()}
        results.add(name, **row)
        print(f"{name:45}", "   ".join(f"{kind} {figure}" for kind, figure in row.items()), flush=True)

    # A CPU tensor's address is as good as another's.
    with mock.patch.object(device_backend, "_obstacle", return_value=None):
        for method, group in GROUPS.items():
            for dense in (False, True):
                name = f"{method}, {len(MATRICES)} matrices" + (f" and {len(DENSE)} dense" if dense else "")
                add(name, measured_step(group, dense, rounds))
        for method, group in GROUPS.items():
            for source in ("factors", "gradient"):
                add(f"{method}, one layer from its {source}", measured_layer(group, source == "factors", rounds))
    print("at most, without dense parameters:", ", ".join(f"{kind} {most}" for kind, most in TARGETS.items()))
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
