"""Stage (a): are the kernels right here? ``races.py`` in a loop, then ``shapes.py`` over the cores.

    python -m bench.gpu_check.exactness

A wrong result is a row, not an error: the stage goes on.
"""

from __future__ import annotations

import argparse
import re

from ..results_file import Results, Row, default_device
from ..whole_step import reason
from . import races, shapes
from .processes import in_parallel

NAME = "gpu_check-float64"
FIRST = 6  # races before the shapes: float32 at ranks 16 and 32, bfloat16 at 256


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--toy", action="store_true", help="races of small matrices")
    parser.add_argument("--repeat", type=float, default=1.0, help="times as many repetitions (%(default)s)")
    parser.add_argument("--shapes", default=".*", metavar="PATTERN", help="shapes whose whole names match")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args(arguments)
    results = Results(NAME, options.device, fresh=options.fresh, settings={"repeat": options.repeat})
    listed = races.races(not options.toy, options.repeat)
    race(listed[:FIRST], options.device, results)
    chosen = [shape for shape in shapes.SHAPES if re.fullmatch(options.shapes, shape.name)]
    missing = [(shape, options.device) for shape in chosen if f"shape: {shape.name}" not in results]
    for done in in_parallel(shapes.measured, missing):
        add(results, f"shape: {done.job[0].name}", done.result or {"skipped": done.problem}, shape=done.job[0].name)
    race(listed[FIRST:], options.device, results)
    print(f"written to {results.path}")


def race(listed: list[races.Race], device: str, results: Results) -> None:
    """Run the races that have no row yet, one after another."""
    for each in listed:
        if f"race: {each.name}" in results:
            continue
        row: Row = {}
        try:
            row = races.measured(each, device)
        except Exception as error:  # whatever happens in one, the others run
            row = {"skipped": reason(error)}
        add(results, f"race: {each.name}", row, race=each.name)


def add(results: Results, identity: str, row: Row, **about: str) -> None:
    results.add(identity, **about, **row)
    verdict = row.get("skipped") or ("right" if row["right"] else f"WRONG: {row}")
    print(f"{identity:60s} {verdict}", flush=True)


if __name__ == "__main__":
    main()
