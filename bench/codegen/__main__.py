"""``python -m bench.codegen``: every variant for every target, as a table. It takes three minutes on two cores."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

from ..results_file import RESULTS, Results
from .figures import Row, measure
from .launches import launches
from .targets import TARGETS
from .variants import SETS


def measured(chosen: dict[str, Iterable[str]], workers: int = 2) -> list[Row]:
    """A row for each kernel of each target. ``chosen``: for a name of SETS the targets that get its variants."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, under which nothing is compiled")
    pairs = [
        (kernel, target)
        for name, targets in chosen.items()
        for target in targets
        for variant in SETS[name](target)
        for kernel in launches(target, **variant)
    ]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(measure, *zip(*dict.fromkeys(pairs), strict=True)))


_FIGURES = (
    "warps",
    "registers",
    "stack",
    "shared",
    "instructions",
    "loop",
    "per_element",
    "hazards",
    "tensor_core",
    "float64",
)


def table(rows: list[Row]) -> str:
    """The rows as text, one target after the other."""
    lines: list[str] = []
    for target, group in itertools.groupby(rows, lambda row: row["target"]):
        lines += [
            "",
            f"{target:<75}" + "".join(f"  {name}" for name in _FIGURES) + "  slots/wanted, instructions x bits",
        ]
        for row in group:
            cells = [f"{row['kernel']:<19}{row['what']:<56}", row.get("error", "")]
            for name in _FIGURES * ("error" not in row):
                figure = ("-", "yes")[row[name]] if isinstance(row[name], bool) else row[name]
                cells.append(f"{figure:>{len(name) + 2}}")
            slots = [f"{name} {count}/{row['wanted_slots'][name]}" for name, count in row.get("slots", {}).items()]
            cells += ["  ", ", ".join(slots + [f"{name} {what}" for name, what in row.get("widths", {}).items()])]
            lines.append("".join(cells).rstrip())
    return "\n".join(lines[1:]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, variants in SETS.items():
        parser.add_argument(
            f"--{name}", nargs="*", choices=TARGETS, default=[], metavar="TARGET", help=variants.__doc__
        )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in SETS}
    chosen = given if any(given.values()) else {"all": list(TARGETS)}
    # Triton's cache may hold code compiled from other sources, whose line numbers would be wrong here.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        rows = measured(chosen)
    results = Results("codegen", device=None, fresh=True, folder=arguments.out)
    for row in rows:
        results.add(f"{row['target']}: {row['kernel']} {row['what']}", **row)
    assert len(results.rows) == len(rows), "two kernels are described alike: see Kernel.what"
    text = results.path.with_suffix(".txt")
    text.write_text(table(rows))
    failed = [f"{row['target']} {row['kernel']} {row['what']}: {row['error']}" for row in rows if "error" in row]
    print("\n".join([*failed, f"{len(rows) - len(failed)} of {len(rows)} kernels compiled; written to {text}"]))


if __name__ == "__main__":
    main()
