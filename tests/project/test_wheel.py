"""The sdist and the wheel work where they are installed. What they must hold is in test_package.py, file by file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apollo_triton import __version__

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_what_is_built_works_where_it_is_installed():
    """A module, a kernel or a data file that sdist or wheel leaves out, and that every test finds in the checkout."""
    pytest.importorskip("build")
    command = [sys.executable, ROOT / "tests" / "smoke.py"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for built in (f"apollo_triton-{__version__}-py3-none-any.whl", f"apollo_triton-{__version__}.tar.gz"):
        assert f"{built}: trained on reference" in found
