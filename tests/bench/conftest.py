"""A results file in a folder of its own."""

from __future__ import annotations

import pytest

from bench.results_file import Results


@pytest.fixture
def results(tmp_path):
    return lambda **options: Results("figures", folder=tmp_path, **options)
