"""How long is a step of each tuned optimizer on the study's model? Less than a minute on a quiet machine:

    python -m bench.quality.step_time

Each has a model of its own with the gradients of one batch, which stay as they are. In every round each makes one step,
with cold caches and, on a CPU, the one thread of the study; the ratio to fused AdamW's step is that of the same round.
A step that makes a new projection counts by its share, one in ``update_proj_gap``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch

from apollo_triton.tools.demo.training import SIZES, make_model

from ..clock import Times, interleaved, median_ratio, quartiles, rounded
from ..results_file import Results, Row, default_device
from ..whole_step import reason
from .methods import ADAMW
from .plan import TO_THE_END, VOCABULARY
from .run import SEQUENCE, SMALL
from .variants import VARIANTS

RATE = 1e-5  # small, so that weights keep an ordinary size with the same gradients over many steps
ROUNDS = 20
NAME = "quality_step_time"


def stepper(method: str, model: str, device: str, gap: int | None = None) -> tuple[Callable[[], Any], int | None]:
    """An optimizer's ``step`` after two steps, and how many steps it makes with one projection; None if it has none.
    ``gap`` replaces that number."""
    made = make_model(model, SEQUENCE, 0, VOCABULARY).to(device)
    optimizer = VARIANTS[method].build(made, RATE, 0)
    groups = [group for group in optimizer.param_groups if group.get("update_proj_gap")]
    if gap is not None:
        for group in groups:
            group["update_proj_gap"] = gap
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(0)).to(device)
    made(input_ids=tokens, labels=tokens).loss.backward()
    for _ in range(2):  # the first makes the state
        optimizer.step()
    return optimizer.step, groups[0]["update_proj_gap"] if groups else None


def measure(methods: Iterable[str], model: str, device: str, rounds: int) -> dict[str, Row]:
    """A row for each method: quartiles of its milliseconds, of a step that makes a projection their median, and the
    ratio of a mean step to AdamW's. A method that cannot run has a row that says why."""
    rows: dict[str, Row] = {}
    plain, fresh, gaps = {}, {}, {}
    for method in methods:
        try:
            plain[method], gap = stepper(method, model, device)
            if gap is not None:
                fresh[method], gaps[method] = stepper(method, model, device, gap=1)[0], gap
        except (ImportError, AttributeError) as error:  # a peer, or torch.optim.Muon, is not installed
            rows[method] = {"skipped": reason(error)}
            plain.pop(method, None)
    times = interleaved(plain, rounds, device)
    refreshes = interleaved(fresh, max(3, rounds // 3), device) if fresh else Times({}, {})
    for method, seconds in times.device.items():
        row: Row = {"ms": [rounded(1e3 * value) for value in quartiles(seconds)]}
        ratio = median_ratio(seconds, times.device[ADAMW])
        if method in refreshes.device:
            _, refresh, _ = quartiles(refreshes.device[method])
            _, usual, _ = quartiles(seconds)
            row |= {"refresh_ms": rounded(1e3 * refresh), "steps_a_projection": gaps[method]}
            ratio *= 1 + max(0.0, refresh / usual - 1) / gaps[method]
        rows[method] = row | {"times AdamW": rounded(ratio)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.quality.step_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--model", choices=SIZES, default=SMALL, help="a LLaMA's size (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="steps of each that are timed (%(default)s)")
    options = parser.parse_args()
    if not options.device.startswith("cuda"):
        torch.set_num_threads(1)
    settings = {"model": options.model, "rounds": options.rounds, "threads": torch.get_num_threads()}
    results = Results(NAME, options.device, fresh=True, settings=settings)
    for method, row in measure(TO_THE_END, options.model, options.device, options.rounds).items():
        results.add(method, **row)
        print(f"{method}: {row}", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
