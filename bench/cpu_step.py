"""How long a step takes on a CPU: LLaMA-60M's 56 matrices, against PyTorch's fused optimizers and apollo-torch.

Every contender steps once a round, in an order that rotates, so that another user of the machine slows all alike.
A ratio is the median over rounds of the two times in that round. ``python -m bench.cpu_step``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW, projection_matrix

from .results_file import save

SHAPES = 8 * [(512, 512)] * 4 + 8 * [(1376, 512)] * 2 + 8 * [(512, 1376)]
RANK = 128
GROUPS = {
    "Mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    f"rank {RANK}": {"rank": RANK, "scale_type": "channel", "scale": 1.0},
}
# What the official code insists on in a group; the values are our defaults.
OFFICIAL_KEYS = {"proj": "random", "proj_type": "std", "update_proj_gap": 200}
TARGETS = (  # contender, its peer, the share of the peer's time that it may take, dtype
    ("Mini", "PyTorch fused AdamW", 1.25, torch.float32),
    ("Mini", "apollo-torch Mini", 1 / 2, torch.float32),
    (f"rank {RANK}", f"apollo-torch rank {RANK}", 1 / 1.25, torch.float32),
    (f"rank {RANK}", "matrix products alone", 1.6, torch.float32),
    (f"rank {RANK}", f"apollo-torch rank {RANK}", 1 / 2, torch.bfloat16),
    ("Mini", "apollo-torch Mini", 1 / 1.5, torch.bfloat16),
)


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters with gradients, the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape in SHAPES:
        parameter = nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype))
        parameter.grad = (1e-3 * torch.randn(shape, generator=generator)).to(dtype)
        parameters.append(parameter)
    return parameters


def contenders(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A step of each optimizer, and the sketch's matrix products alone, by name."""
    from apollo_torch import APOLLOAdamW as OfficialAPOLLOAdamW

    steps: dict[str, Callable[[], object]] = {}
    for name, group in GROUPS.items():
        steps[name] = APOLLOAdamW([{"params": weights(dtype), **group}], lr=1e-5).step
        official = OfficialAPOLLOAdamW([{"params": weights(dtype), **group, **OFFICIAL_KEYS}], lr=1e-5)
        steps[f"apollo-torch {name}"] = official.step
    steps["PyTorch fused AdamW"] = torch.optim.AdamW(weights(dtype), lr=1e-5, fused=True).step
    steps["PyTorch fused SGD"] = torch.optim.SGD(weights(dtype), lr=1e-5, fused=True).step
    steps["matrix products alone"] = matrix_products([p.grad for p in weights(dtype) if p.grad is not None])
    return steps


def matrix_products(gradients: list[Tensor]) -> Callable[[], None]:
    """R = G P^T of every matrix at rank 128, into memory that is there already."""
    projection = projection_matrix(0, 0, RANK, 512, dtype=gradients[0].dtype).mT
    results = [torch.empty(max(g.shape), RANK, dtype=g.dtype) for g in gradients]

    def multiply() -> None:
        for gradient, result in zip(gradients, results, strict=True):
            torch.mm(gradient if gradient.shape[0] >= gradient.shape[1] else gradient.mT, projection, out=result)

    return multiply


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round, after two rounds of warm-up."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            steps[name]()
            elapsed = time.perf_counter() - start
            if turn >= 0:
                times[name].append(elapsed * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        times = measure(contenders(dtype), options.rounds)
        print(f"\n{dtype}, {options.threads} threads, {options.rounds} rounds: milliseconds")
        for name, values in times.items():
            quartiles = statistics.quantiles(values, n=4)
            print(f"  {name:24s} median {quartiles[1]:7.1f}   quartiles {quartiles[0]:6.1f} to {quartiles[2]:6.1f}")
            figures.append({"dtype": str(dtype), "contender": name, "ms_quartiles": [round(q, 2) for q in quartiles]})
        for name, peer, target, of in TARGETS:
            if of == dtype:
                ratio = statistics.median(a / b for a, b in zip(times[name], times[peer], strict=True))
                verdict = "reached" if ratio <= target else "missed"
                print(f"  {name} takes {ratio:.2f} of {peer}; target at most {target:.2f}: {verdict}")
                figures.append(
                    {"dtype": str(dtype), "ratio_of": name, "to": peer, "ratio": round(ratio, 3), "target": target}
                )
    print(f"\nwritten to {save('cpu_step', {'figures': figures})}")


if __name__ == "__main__":
    main()
