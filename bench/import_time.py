"""What the import of the optimizer adds to ``import torch``: medians over fresh interpreters that alternate."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from .results_file import Results


def seconds(statement: str) -> float:
    """The wall time of a fresh interpreter that runs an import and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    ours = "from apollo_triton import *"  # import apollo_triton alone does not import torch
    seconds(ours)  # fills the file cache
    pairs = [(seconds("import torch"), seconds(ours)) for _ in range(rounds)]
    torch_time, our_time = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    print(f"import torch {torch_time:.2f} s, import apollo_triton {our_time:.2f} s, ratio {ratio:.3f} (target 1.2)")
    results = Results("import_time", fresh=True)
    results.add("import", torch_s=round(torch_time, 3), apollo_triton_s=round(our_time, 3), ratio=round(ratio, 3))


if __name__ == "__main__":
    main()
