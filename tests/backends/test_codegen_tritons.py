"""The sketch by other versions of Triton, which pipeline and unroll in other ways (bench/codegen/tritons.py)."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.codegen.tritons import compiled

ROOT = Path(__file__).parents[2]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.2.0", "3.6.0"])
def test_another_triton_compiles_no_race(version):
    """Registers or slots that are written while a product reads them, in code that only this version makes."""
    folder = ROOT / ".venv" / "tools" / f"triton-{version}"
    if not (folder / "triton").is_dir():
        pytest.skip(f"triton is not in {folder}; make test-all installs it where this Python can run it")
    found, rows = compiled(folder)
    assert found == version
    bad = [row for row in rows if row.get("hazards") != 0 or raced(row)]
    assert not bad, "\n".join(map(str, bad))


def raced(row):
    """Whether a tile may be copied over while a product reads it. A tile without slots is slow, and right."""
    return any(0 < slots < row["wanted_slots"][name] for name, slots in row["slots"].items())
