"""What a fused step costs on the host: Python and tables, with the kernels stubbed out, for LLaMA-7B's 224 matrices.

``python -m bench.host_overhead``: matrices of 7B's three shapes, scaled down (addresses count, not sizes), and with its
66 dense parameters besides. Runs anywhere; a GPU adds its launches and the copy of changed addresses.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from apollo_triton import APOLLOAdamW
from apollo_triton.core import backend as backends
from apollo_triton.core import gpu

from .contenders import MINI
from .results_file import Results

MATRICES = [(64, 64)] * 128 + [(172, 64)] * 64 + [(64, 172)] * 32
DENSE = [(64,)] * 66
GROUPS = {"APOLLO, rank 32": {"rank": 32}, "APOLLO-Mini": MINI}
TARGETS = {"stable": 1.0, "moved": 2.0}


def milliseconds(step: Callable[[], None], before: Callable[[], None], rounds: int) -> float:
    """The median time of ``step``, with ``before`` run untimed."""
    times = []
    for _ in range(rounds):
        before()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _no_launch(*arguments: object, **constants: object) -> None:
    """A kernel that costs nothing; a mock would keep its arguments and cost more than a step."""


def measured(group: dict[str, object], dense: bool, rounds: int) -> dict[str, float]:
    """Milliseconds a step with the gradients where they were, and with every one somewhere else; and the launches."""
    matrices = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in MATRICES]
    rest = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in DENSE] if dense else []
    groups = [{"params": matrices, **group}] + ([{"params": rest}] if rest else [])
    optimizer = APOLLOAdamW(groups)
    kept: list[torch.Tensor] = []

    def move() -> None:
        """New gradients while the old ones are still there, so that no address stays."""
        old = [each.grad for each in matrices + rest if each.grad is not None]
        for each in matrices + rest:
            each.grad = torch.zeros_like(each)
        kept[:] = old

    move()
    with mock.patch.object(gpu, "launch") as launch:
        optimizer.step()
        launch.reset_mock()
        optimizer.step()
        launches = launch.call_count
    with mock.patch.object(gpu, "launch", _no_launch):
        stable = milliseconds(optimizer.step, lambda: None, rounds)
        moved = milliseconds(optimizer.step, move, rounds)
    return {"stable": stable, "moved": moved, "launches": launches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    results = Results("host_overhead", fresh=True, settings={"rounds": rounds})
    with mock.patch.object(backends, "_obstacle", return_value=None):  # a CPU tensor's address is as good as another
        for method, group in GROUPS.items():
            for dense in (False, True):
                name = f"{method}, {len(MATRICES)} matrices" + (f" and {len(DENSE)} dense" if dense else "")
                each = measured(group, dense, rounds)
                results.add(name, **{f"{kind}_ms": round(each[kind], 3) for kind in TARGETS}, launches=each["launches"])
                times = "   ".join(f"{kind} {each[kind]:.2f} ms" for kind in TARGETS)
                print(f"{name:45} {times}   {each['launches']} launches")
    print(f"targets for the matrices: stable {TARGETS['stable']} ms, moved {TARGETS['moved']} ms")
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
