"""A pytest plugin, ``-p bench.gpu_check.pytest_plugin``: each test's outcome at once, and no test that passed before.

It imports neither torch nor the package, so that the workers of pytest-xdist, which load it too, start no later.

GPU_CHECK_OUTCOMES: a file to which a line of JSON is added when a test ends. GPU_CHECK_PASSED: a file that has the
fingerprints of tests to leave out, one a line.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

LONGEST_TEXT = 1200  # characters of a failure: its end, which has the values

_noted = False


def fingerprint(name: str) -> str:
    """Eight hex digits of a test's name. Of a thousand tests two share one once in 8,000 runs."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def pytest_configure(config: Any) -> None:
    global _noted
    _noted = not hasattr(config, "workerinput")  # a worker's outcomes reach the main process


@pytest.hookimpl(trylast=True)  # the suite's conftest looks at all tests first
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    passed = set(Path(os.environ["GPU_CHECK_PASSED"]).read_text(encoding="utf-8").split())
    known = [item for item in items if fingerprint(item.nodeid) in passed]
    config.hook.pytest_deselected(items=known)
    items[:] = [item for item in items if item not in known]


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _note(report.nodeid, "failed", 0.0, _text(report))


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _note(report.nodeid, "failed", report.duration, _text(report))
    elif report.when == "call" or report.skipped:
        _note(report.nodeid, "skipped" if report.skipped else "passed", report.duration, "")


def _text(report: Any) -> str:
    """The lines of the test and its error, without their colours; the values are at the end."""
    return str(report.longrepr)[-LONGEST_TEXT:]


def _note(name: str, outcome: str, seconds: float, text: str) -> None:
    if not _noted:
        return
    line = {"name": name, "outcome": outcome, "seconds": round(seconds, 1), "text": text, "at": round(time.time(), 1)}
    with open(os.environ["GPU_CHECK_OUTCOMES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
