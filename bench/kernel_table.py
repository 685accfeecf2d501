"""What each launch of a step reads and writes, counted by the recorder of the tests in Triton's interpreter.

``python -m bench.kernel_table`` prints the table of the README, and ``--write`` puts it there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from sanitizer import Launch, Recorder  # noqa: E402

from apollo_triton import APOLLOAdamW  # noqa: E402

METHODS = {
    "APOLLO-Mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "APOLLO, rank 64": {"rank": 64},
}
LAYERS = 4
BEGIN, END = "<!-- kernel table: python -m bench.kernel_table --write -->", "<!-- end of the kernel table -->"


def recorded(group: dict[str, object]) -> tuple[list[Launch], dict[str, list[torch.Tensor]], int]:
    """The launches of a second step, the tensors they go through by name, and the number of low-rank parameters."""
    torch.manual_seed(0)
    shapes = [(512, 384), (384, 512)] * LAYERS
    weights = [torch.nn.Parameter(torch.randn(shape).to(torch.bfloat16)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = APOLLOAdamW([{"params": weights, **group}], backend="triton")
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    recorder.assert_clean()
    assert optimizer._engine._plan is not None
    tensors = {
        "gradient": [weight.grad for weight in weights],
        "weight": list(weights),
        "moments": [optimizer.state[weight][name] for weight in weights for name in ("exp_avg", "exp_avg_sq")],
        "projection": [each.buffer for each in optimizer._engine._plan.projections()],
    }
    return recorder.launches, tensors, sum(weight.numel() for weight in weights)


def table() -> str:
    """The table in Markdown: distinct bytes of a step per low-rank parameter, bfloat16 weights and gradients."""
    lines = [
        "| | launches | gradient read | weight read + written | moments read + written | projection | all else |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, group in METHODS.items():
        launches, tensors, parameters = recorded(group)
        sums: Counter[str] = Counter()
        for kernel in dict.fromkeys(launch.kernel for launch in launches):
            own = [launch for launch in launches if launch.kernel == kernel]
            read, written = Counter[str](), Counter[str]()
            for launch in own:
                for name, group_tensors in tensors.items():
                    for tensor in group_tensors:
                        traffic = launch.traffic(tensor)
                        read[name] += traffic.loaded_once
                        written[name] += traffic.stored_once
            total = sum(launch.loaded_once + launch.stored_once for launch in own)
            rest = total - read.total() - written.total()
            cells = [
                f"{method}: `{kernel}`",
                str(len(own)),
                _figure(read["gradient"], parameters),
                _figures(read["weight"], written["weight"], parameters),
                _figures(read["moments"], written["moments"], parameters),
                _figure(read["projection"], parameters),
                _figure(rest, parameters),
            ]
            lines.append("| " + " | ".join(cells) + " |")
            sums["total"] += total
        lines.append(f"| {method}: a step | {len(launches)} | | | | | **{sums['total'] / parameters:.2f} in all** |")
    return "\n".join(lines)


def _figure(count: int, parameters: int) -> str:
    return f"{count / parameters:.2f}" if count else ""


def _figures(read: int, written: int, parameters: int) -> str:
    return f"{read / parameters:.2f} + {written / parameters:.2f}" if read or written else ""


def in_readme(readme: str) -> str:
    """The table between the marks of the README."""
    return readme.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    made = table()
    print(made)
    if parser.parse_args().write:
        path = ROOT / "README.md"
        before, begin, rest = path.read_text().partition(BEGIN)
        if not begin:
            raise SystemExit(f"{path} has no line {BEGIN}")
        path.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
