"""The table of docs/memory-sharded.md: what is counted is what is written, and what is written holds."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from distributed_cases import needs_fsdp_on_a_cpu

from bench import cards
from bench.results_file import EVERY_MACHINE, RESULTS


@pytest.fixture(scope="module")
def rows():
    found = json.loads((RESULTS / EVERY_MACHINE / "cards.json").read_text())
    return {row["id"]: {name: value for name, value in row.items() if name != "id"} for row in found["rows"]}


def test_the_page_shows_the_figures_that_were_counted(rows):
    assert cards.TABLE.read() == cards.document(rows)


def test_a_cell_has_the_least_savings_that_do():
    """Not the first that was counted, nor one that is a byte too large."""
    totals = {"plain": 30, "layer-wise": cards.CARDS[24] + 1, "8-bit moments": cards.CARDS[24], "int8 weights": 1}
    totals["plain"] = cards.CARDS[80]
    rows = {cards.identity_of("Mini", "7B", 8, saving): {"total": total} for saving, total in totals.items()}
    assert cards.cell(rows, "7B", 8, 24) == f"layer-wise, 8-bit moments: {cards.CARDS[24] / 1e9:.1f}"
    assert cards.cell(rows, "7B", 8, 80) == f"plain: {cards.CARDS[80] / 1e9:.1f}"
    assert cards.cell(rows, "13B", 8, 80) == "not counted"


@pytest.mark.slow
@pytest.mark.full
@needs_fsdp_on_a_cpu
def test_70b_on_8_cards_is_what_is_written(rows):
    case = ("Mini", "70B", 8, "int8 weights")
    assert cards.counted(*case) == rows[cards.identity_of(*case)]
