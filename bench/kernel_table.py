"""What each launch of a step reads and writes, counted in Triton's interpreter by the tests' recorder.

``python -m bench.kernel_table`` prints the table of docs/kernels.md, and ``--write`` puts it into the page.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

import torch  # noqa: E402
from sanitizer import Launch, Recorder  # noqa: E402

from apollo_triton import APOLLOAdamW  # noqa: E402

from .contenders import MINI  # noqa: E402
from .report_text import launches  # noqa: E402
from .results_file import Results, Row  # noqa: E402

METHODS: dict[str, dict[str, object]] = {
    "APOLLO-Mini": MINI,
    "APOLLO-Mini, clipped": {**MINI, "max_grad_norm": 1.0},
    "APOLLO, rank 64": {"rank": 64},
}
LAYERS = 4
# Parts of LLaMA-60M's embedding and of LLaMA-7B's. Whole, they have 32,000 rows, each of which moves as much. The parts
# of a norm and the table of 8-bit codes, which are read once a parameter, add 0.01 bytes here, and less there.
EMBEDDINGS = [(512, 512), (64, 4096)]
_ROWS: dict[str, object] = {"second_moment": "row"}
DENSE: dict[str, dict[str, object]] = {
    "Dense AdamW": {},
    "Dense, V by row": _ROWS,
    "Dense, V by row, M bfloat16": {**_ROWS, "state_dtype": torch.bfloat16},
    "Dense, V by row, M 8-bit": {**_ROWS, "state_bits": 8},
}
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- kernel table: python -m bench.kernel_table --write -->", "<!-- end of the kernel table -->"


def recorded(
    method: dict[str, object], shapes: Sequence[tuple[int, int]]
) -> tuple[list[Launch], dict[str, list[torch.Tensor]], int]:
    """The launches of a second step, the tensors that they read and write by name, and the count of parameters."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape).to(torch.bfloat16)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    options = {name: value for name, value in method.items() if name == "max_grad_norm"}  # of the constructor alone
    group = {name: value for name, value in method.items() if name not in options}
    optimizer = APOLLOAdamW([{"params": weights, **group}], backend="triton", **options)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    recorder.assert_clean()
    plan = optimizer._engine._plan
    assert plan is not None
    tensors = {
        "gradient": [weight.grad for weight in weights],
        "weight": list(weights),
        "moments": [
            value for weight in weights for name, value in optimizer.state[weight].items() if name.startswith("exp_avg")
        ],
        "projection": [*{id(P): P.buffer for table in plan.tables for P in table.projections}.values()],
    }
    return recorder.launches, tensors, sum(weight.numel() for weight in weights)


def measured() -> list[Row]:
    """A row for each kernel and one for the step: launches, and distinct bytes per parameter by tensor."""
    rows = []
    low_rank = [(512, 384), (384, 512)] * LAYERS
    for method, group, shapes in [
        *((*method, low_rank) for method in METHODS.items()),
        *((*method, EMBEDDINGS) for method in DENSE.items()),
    ]:
        all_launches, tensors, parameters = recorded(group, shapes)
        for kernel in [*dict.fromkeys(launch.kernel for launch in all_launches), "a step"]:
            launches_of_kernel = [launch for launch in all_launches if kernel in (launch.kernel, "a step")]
            counts: Counter[str] = Counter()
            for launch in launches_of_kernel:
                for name, group_tensors in tensors.items():
                    for tensor in group_tensors:
                        traffic = launch.traffic(tensor)
                        counts[f"{name} read"] += traffic.loaded_once
                        counts[f"{name} written"] += traffic.stored_once
            moved = sum(launch.loaded_once + launch.stored_once for launch in launches_of_kernel)
            counts["all else"] = moved - counts.total()
            row: Row = {"method": method, "kernel": kernel, "launches": len(launches_of_kernel)}
            row |= {name: round(count / parameters, 4) for name, count in counts.items() if count}
            rows.append(row | {"all": round(counts.total() / parameters, 4)})
    return rows


def written(page: str) -> str:
    """The table that stands between the marks of docs/kernels.md."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into docs/kernels.md")
    options = parser.parse_args()
    results = Results("launches", device=None, fresh=True)
    rows = measured()
    for row in rows:
        results.add(f"{row['method']}: {row['kernel']}", **row)
    made = launches(rows)
    print(made)
    if options.write:
        before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        if not begin:
            raise SystemExit(f"{PAGE} has no line {BEGIN}")
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
