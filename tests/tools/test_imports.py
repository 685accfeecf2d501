"""What the programs import before they run: torch alone, so that ``--help`` and errors need no optional library."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_no_program_imports_an_optional_library_before_it_runs() -> None:
    """A command that cannot say what it takes where transformers, triton, rich or matplotlib is missing."""
    programs = (
        "cli",
        "tools.demo.command",
        "tools.memory.command",
        "tools.memory.single_card",
        "tools.validate.command",
    )
    code = "import sys\n" + "".join(f"import apollo_triton.{name}\n" for name in programs) + "print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "apollo_triton.tools.demo.command" in found
    optional = {"transformers", "triton", "rich", "matplotlib", "apollo_triton.backends.triton.verbs"}
    assert optional & set(found) == set()
