"""Every saving of memory on every sharding: a test for each cell of the table of docs/distributed.md.

A cell that says yes trains as one process with the same savings does (savings_cases.py). One that says no names the
reason and the way out, on every rank.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import assert_ranks_agree, needs_fsdp_on_a_cpu
from distributed_harness import run
from savings_cases import ROWS, Cell, beside_one_process

pytestmark = needs_fsdp_on_a_cpu
COLUMNS = ("DDP", "FSDP2", "HSDP", "TP", "FSDP2 x TP")

BEFORE_THE_SUM = r"before DistributedDataParallel has averaged them.*fully_shard"
NEEDS_A_GRADIENT = r'gradients="none".*sum.*(ranks|data).*gradients="freed"'
# What the cells say that do not say yes.
REFUSED = {
    **{(row, "DDP"): BEFORE_THE_SUM for row in ROWS if ROWS[row].gradients != "kept"},
    **{
        (row, column): NEEDS_A_GRADIENT
        for row in ROWS
        if ROWS[row].gradients == "none"
        for column in ("FSDP2", "HSDP", "FSDP2 x TP")
    },
}
HELD = [(row, column) for row in ROWS for column in COLUMNS if (row, column) not in REFUSED]
# In ``make test``: all at once on both kinds of shards. All else repeats parts, or is in other files too.
IN_TEST = {("all of them", "FSDP2 x TP")}


def table(cells: list[tuple[str, str]]) -> list[Any]:
    marks = [[pytest.mark.slow] if cell in IN_TEST else [pytest.mark.full] for cell in cells]
    return [pytest.param(*cell, marks=mark, id=" on ".join(cell)) for cell, mark in zip(cells, marks, strict=True)]


def trained(row: str, column: str, steps: int) -> dict[str, Any]:
    return beside_one_process(column, ROWS[row], steps)


@pytest.mark.parametrize(("row", "column"), table(HELD))
def test_a_cell_that_says_yes(row: str, column: str, request: pytest.FixtureRequest) -> None:
    """A gradient that is not the mean over all ranks, or is used before the sum; moments, groups or blocks of a shard
    that are not those of the whole weight; another projection; a weight that no hook moves, or two move."""
    saving = ROWS[row]
    if saving.state_bits == 8:
        request.getfixturevalue("bitsandbytes")  # skips without it
    results = run(trained, 4, row=row, column=column, steps=4)
    assert_ranks_agree([result["ours"] for result in results])
    for result in results:
        assert result["sharded"] == (column != "DDP"), "the cell shards nothing, or not all"
        compare(result, saving.int8 or saving.state_bits == 8, same_gradients=saving.gradients != "none")
        if saving.gradients != "kept":
            assert result["kept"] == 0, f"{result['kept']} gradients are left after backward"


def compare(result: dict[str, Any], has_codes: bool, same_gradients: bool) -> None:
    """What the ranks hold against one process. Float32 sums in another order differ by some 1e-7, of gradients, whose
    terms cancel, by 1e-6. Where each makes a gradient of its own, they are what the weights differ by too.

    A value that lies that near to the middle between two codes may get the other one: at most the next, and at most one
    value of a thousand. Weights then differ by a step of the grid there, and gradients and losses with them. Where each
    makes a gradient of its own, a moment's flipped code moves a whole channel by some thousandths more or less, and
    flips codes in it: what is apart then is less than a tenth of the way that was gone.
    """
    ours, theirs, start = result["ours"], result["theirs"], result["start"]
    tolerance, flipped = 1e-6 if same_gradients else 1e-5, 0
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            assert value.shape == theirs[name].shape, name
            apart = (value.int() - theirs[name].int()).abs()
            flips = int((apart > 0).sum())
            if same_gradients:
                assert apart.max() <= 1, f"{name} is {apart.max()} codes off"
                assert flips <= 1 + value.numel() / 1000, f"{flips} codes of {name} are off"
            elif name.endswith("weight_q"):
                assert apart.double().norm() < 0.1 * (theirs[name].double() - start[name]).norm(), name
            flipped += flips
    assert has_codes or not flipped
    if flipped:
        tolerance = 1e-4 if same_gradients else 1e-2
    for name, value in ours.items():
        if not isinstance(value, torch.Tensor):
            assert value == theirs[name], name
        elif value.is_floating_point():
            assert (error := difference(value, theirs[name])) <= tolerance, f"{name} is off by {error:.1e}"
    off, name = result["gradients"]
    assert off <= (1e-3 if flipped else 1e-5), f"the gradient of {name} is off by {off:.1e}"
    for found, expected in result["losses"]:
        assert found == pytest.approx(expected, rel=1e-5 if flipped else 1e-6), "another loss"
    for name, before in start.items():
        if not name.endswith(("_scale", "_zero")):
            assert difference(ours[name], before) > 1e-3, f"{name} did not move"


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def refused(cells: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The error of each cell, and "" for one that was made."""
    found = {}
    for row, column in cells:
        print(row, column, flush=True)  # the harness shows it should the ranks hang here
        try:
            Cell(column, ROWS[row])
        except (ValueError, NotImplementedError) as error:
            found[row, column] = str(error)
        else:
            found[row, column] = ""
    return found


@pytest.mark.slow
def test_a_cell_that_says_no_names_the_reason_and_the_way_out() -> None:
    """A cell that trains something else than one process does, and says nothing."""
    for texts in run(refused, 4, cells=[*REFUSED]):
        for cell, text in texts.items():
            assert re.search(REFUSED[cell], text, re.DOTALL), f"{cell}: {text or 'it was accepted'}"


PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_table_of_the_docs_says_what_is_tested() -> None:
    """A cell that says yes without a test, or one that was mended and still says no."""
    rows = re.search(r"<!-- savings -->\n+(.*?)\n+<!-- end of savings -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert rows is not None
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[1].splitlines()]
    assert header[2:] == [*COLUMNS]
    assert [line[0].strip("*") for line in lines] == [*ROWS]
    for row, one_process, *cells in lines:
        assert one_process == "yes", row
        for column, cell in zip(COLUMNS, cells, strict=True):
            yes = cell.startswith("yes")
            assert yes == ((row.strip("*"), column) in HELD), f"{row} on {column} says {cell!r}"
            assert yes or cell.startswith("no"), f"{row} on {column} says {cell!r}"
