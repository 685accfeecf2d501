"""Run the microbenchmarks of ``test_kernels.py`` and keep the figures: ``python -m bench.kernels [-k EXPRESSION]``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from .clock import rounded
from .results_file import Results, default_device


class Keeper:
    """A pytest plugin that leaves out benchmarks with a row in ``results``, and adds a row when a benchmark ends."""

    def __init__(self, results: Results) -> None:
        self._results = results

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = [item for item in items if _name(item) in self._results]
        config.hook.pytest_deselected(items=known)
        items[:] = [item for item in items if item not in known]

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        benchmark: Any = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is None or benchmark.stats is None or not benchmark.extra_info:
            return
        stats = benchmark.stats.stats
        figures = {name: rounded(v) if isinstance(v, float) else v for name, v in benchmark.extra_info.items()}
        self._results.add(
            _name(item), us=[rounded(1e6 * seconds) for seconds in (stats.q1, stats.median, stats.q3)], **figures
        )


def _name(item: pytest.Item) -> str:
    return item.name.removeprefix("test_verb[").removesuffix("]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which benchmarks, as in pytest -k")
    parser.add_argument("--name", default="kernels", help="name of the results file (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    results = Results(options.name, default_device(), fresh=options.fresh)
    tests = str(Path(__file__).with_name("test_kernels.py"))
    arguments = [
        tests,
        "--benchmark-only",
        "-q",
        "-k",
        options.k,
        "-p",
        "no:cacheprovider",
        "--benchmark-columns=median,iqr",
    ]
    code = pytest.main(arguments, plugins=[Keeper(results)])
    print(f"written to {results.path}")
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)


if __name__ == "__main__":
    raise SystemExit(main())
