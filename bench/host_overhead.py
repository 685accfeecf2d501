"""What an update costs on the host: Python and tables, with the kernels stubbed out.

``python -m bench.host_overhead`` measures two things in under a minute:

* a whole step of LLaMA-7B's 224 matrices, alone and together with its 66 dense parameters;
* one layer-wise update of one linear layer (``gradients="none"``), from the two factors of its gradient and from the
  gradient itself.

The matrices have 7B's three shapes scaled down: the host's time depends on how many there are, not on their size. It
runs on any machine. A GPU adds its launches and the copy of changed addresses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.core import device_backend, gpu
from apollo_triton.core.implicit_gradient import ImplicitGradient

from .contenders import MINI
from .results_file import Results

MATRICES = [(64, 64)] * 128 + [(172, 64)] * 64 + [(64, 172)] * 32
DENSE = [(64,)] * 66
GROUPS = {"APOLLO, rank 32": {"rank": 32}, "APOLLO-Mini": MINI}
TARGETS = {"stable": 1.0, "moved": 2.0}
# The one layer has out = in = 64. 4 tokens are to it what 256 are to a layer of 4096 x 4096, where a step without a
# gradient pays: its exact norms come from the Gram matrix, the way with the most launches.
FEATURES, TOKENS = 64, 4
UPDATES_A_ROUND = 10  # one layer's update takes a tenth of a step or less


def median_seconds(timed: Callable[[], None], before: Callable[[], None], rounds: int) -> float:
    """The median time of ``timed``. ``before`` runs ahead of each call and is not timed."""
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        timed()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _no_launch(*arguments: object, **constants: object) -> None:
    """A kernel that costs nothing. A mock would keep its arguments and cost more than a step."""


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
    """Milliseconds of a step when every gradient stays where it was and when every gradient has moved; launches."""
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
    with mock.patch.object(gpu, "launch", _no_launch):
        stable = median_seconds(optimizer.step, stay, rounds)
        moved = median_seconds(optimizer.step, move, rounds)
    return {"stable": 1e3 * stable, "moved": 1e3 * moved, "launches": launches}


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
    with mock.patch.object(gpu, "launch", _no_launch):
        return {"us": 1e6 * median_seconds(update, ready, UPDATES_A_ROUND * rounds), "launches": launches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="steps that a median is of (%(default)s)")
    rounds = parser.parse_args().rounds
    results = Results("host_overhead", fresh=True, settings={"rounds": rounds})
    # A CPU tensor's address is as good as another's.
    with mock.patch.object(device_backend, "_obstacle", return_value=None):
        for method, group in GROUPS.items():
            for dense in (False, True):
                name = f"{method}, {len(MATRICES)} matrices" + (f" and {len(DENSE)} dense" if dense else "")
                step = measured_step(group, dense, rounds)
                results.add(name, **{f"{kind}_ms": round(step[kind], 3) for kind in TARGETS}, launches=step["launches"])
                times = "   ".join(f"{kind} {step[kind]:.2f} ms" for kind in TARGETS)
                print(f"{name:45} {times}   {step['launches']} launches", flush=True)
        for method, group in GROUPS.items():
            for source in ("factors", "gradient"):
                name = f"{method}, one layer from its {source}"
                layer = measured_layer(group, source == "factors", rounds)
                results.add(name, us=round(layer["us"], 1), launches=layer["launches"])
                print(f"{name:45} {layer['us']:.1f} µs   {layer['launches']} launches", flush=True)
    print(f"targets for the matrices: stable {TARGETS['stable']} ms, moved {TARGETS['moved']} ms")
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
