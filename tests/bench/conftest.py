"""Results in a folder of their own, rows of a whole study, and a disk that fails."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest

from bench.results_file import Results


@pytest.fixture
def results(tmp_path):
    return lambda **options: Results("figures", folder=tmp_path, **options)


@pytest.fixture
def interrupted_writes():
    """A block in which a write stops half-way."""

    def interrupted(self, text, **options):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    return lambda: mock.patch.object(Path, "write_text", interrupted)


@pytest.fixture(scope="package")
def _whole_study():
    pytest.importorskip("matplotlib")
    from quality_rows import whole_study

    return whole_study()


@pytest.fixture
def rows(_whole_study):
    """Those of a whole study of quality, which a test may change."""
    return copy.deepcopy(_whole_study)
