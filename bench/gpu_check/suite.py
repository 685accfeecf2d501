"""Stage (b): the tests that need a GPU, over the cores, with the values of what fails.

    python -m bench.gpu_check.suite

A file of tests has a row with its counts, and each failure one with the end of its text. Tests that passed are left
out at the next call. What pytest needs and is missing here is said in a row, and the tests that need it fail alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..results_file import ROOT, Results, Row, default_device
from .processes import cores

NAME = "gpu_check-tests"
MOST_TEXTS = 60  # failures with a text; of the others the name is kept
LONGEST_TEST = 45  # seconds, compilation included: half of what the stage has, so that a test that hangs has a row
LAST_LINES = 5  # of pytest's output
LONGEST_TEXT = 1200  # characters of them
NO_TESTS_LEFT = 5  # an exit code: all have passed before
MISSING_HERE = ("pytest", "xdist", "hypothesis", "pytest_timeout")
TOY = """
import pytest

def test_passes():
    pass

def test_fails_on_purpose():
    left = 1.5
    assert left == 2.5

@pytest.mark.skip(reason="so that a test is skipped")
def test_skipped():
    pass
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--toy", action="store_true", help="three tests that need nothing")
    parser.add_argument("--fresh", action="store_true", help="run all tests anew")
    options = parser.parse_args(arguments)
    results = Results(NAME, options.device, fresh=options.fresh)
    missing = [name for name in MISSING_HERE if importlib.util.find_spec(name) is None]
    results.add("missing", missing=missing)
    if "pytest" in missing:
        print("pytest is not installed here: no test can run")
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.toy:
            toy = Path(folder) / "test_toy.py"
            toy.write_text(TOY, encoding="utf-8")
        chosen = [str(toy)] if options.toy else ["tests", "-m", "gpu"]
        workers = [] if "xdist" in missing else ["-n", str(1 if options.toy else cores()), "--dist", "worksteal"]
        run([*chosen, *workers], Path(folder), results)
    print(f"written to {results.path}")


def run(arguments: list[str], folder: Path, results: Results) -> None:
    """Run pytest, and keep its outcomes while it runs. ``folder`` is for files that only this run needs."""
    known, outcomes = folder / "passed", folder / "outcomes"
    known.write_text("\n".join(row["passed"] for row in results.rows.values() if "passed" in row), encoding="utf-8")
    outcomes.touch()
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "--tb=short", "-p", "bench.gpu_check.pytest_plugin"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--color=no"]
    if importlib.util.find_spec("pytest_timeout"):  # a test that hangs ends its worker, and the others go on
        command += ["--timeout", str(LONGEST_TEST), "--timeout-method", "thread"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"GPU_CHECK_PASSED": str(known), "GPU_CHECK_OUTCOMES": str(outcomes)}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with open(folder / "output", "w+", encoding="utf-8") as output, open(outcomes, encoding="utf-8") as lines:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            running = True
            while running:
                time.sleep(0.2)
                running = process.poll() is None  # before the last look, which finds what came since
                keep(_new(lines), results)
        finally:
            process.kill()
        output.seek(0)
        said = "".join(output.readlines()[-LAST_LINES:])
        if process.returncode not in (0, 1, NO_TESTS_LEFT):  # it did not get to the tests, or not to their end
            ended = f"pytest ended with exit code {process.returncode}"
            results.add("failed: pytest", skipped=ended, text=said[-LONGEST_TEXT:])
        print(said, end="", flush=True)


def _new(lines: Iterator[str]) -> list[Row]:
    """The outcomes that were added since the last look."""
    return [json.loads(line) for line in lines if line.endswith("\n")]


def keep(outcomes: list[Row], results: Results) -> None:
    """Add outcomes to the rows: to that of their file, and a row for each failure, in place of an earlier one."""
    from .pytest_plugin import fingerprint  # it imports pytest, which may be missing

    for outcome in outcomes:
        name, kind = outcome["name"], outcome["outcome"]
        file, failure = f"file: {name.partition('::')[0]}", f"failed: {name}"
        row = results.rows.setdefault(file, {"id": file, "counts": {}, "passed": ""})
        if results.rows.pop(failure, None):
            row["counts"]["failed"] -= 1
        row["counts"][kind] = row["counts"].get(kind, 0) + 1
        if kind == "failed":
            texts = sum("text" in each for each in results.rows.values())
            text = {"text": outcome["text"]} if texts < MOST_TEXTS else {}
            results.rows[failure] = {"id": failure, "seconds": outcome["seconds"], **text}
            print(failure, flush=True)
        else:
            row["passed"] = f"{row['passed']} {fingerprint(name)}".strip()
    if outcomes:
        results.write()


if __name__ == "__main__":
    main()
