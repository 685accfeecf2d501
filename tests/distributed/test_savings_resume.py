"""Each saving's checkpoint, saved on N ranks by torch.distributed.checkpoint and loaded on M."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import assert_ranks_agree, assert_same_bits, needs_fsdp_on_a_cpu
from distributed_harness import run
from savings_cases import ONE_PROCESS, ROWS, Cell, load, save

pytestmark = [needs_fsdp_on_a_cpu, pytest.mark.usefixtures("bitsandbytes")]
SAVED, END = 2, 4
full, slow = pytest.mark.full, pytest.mark.slow
JOURNEYS = [
    pytest.param("all of them", ("FSDP2", 2), [(ONE_PROCESS, 1), ("FSDP2", 4)], marks=slow),
    pytest.param("all, no gradients", ("TP", 2), [("TP", 4)], marks=full),
    pytest.param("all of them", ("FSDP2 x TP", 4), [("HSDP", 4), ("TP", 2), (ONE_PROCESS, 1)], marks=full),
    pytest.param("all of them", (ONE_PROCESS, 1), [("FSDP2", 3)], marks=full),
    *(
        pytest.param(row, ("FSDP2", 4), [("FSDP2", 3), ("FSDP2 x TP", 4), (ONE_PROCESS, 1)], marks=full)
        for row in ("plain", "layer-wise", "int8 weights", "8-bit moments", "all of them")
    ),
    *(
        pytest.param(row, ("DDP", 2), [("FSDP2", 2), (ONE_PROCESS, 1)], marks=full)
        for row in ("plain", "int8 weights", "8-bit moments")
    ),
]


def saving(row: str, column: str, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was saved, and what came of it at the end."""
    cell = Cell(column, ROWS[row]).train(range(SAVED))
    saved = cell.held()
    save(cell, folder)
    return saved, cell.train(range(SAVED, END)).held()


def loading(row: str, column: str, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was loaded into another model, and what came of it at the end."""
    cell = Cell(column, ROWS[row])
    with torch.no_grad():
        for parameter in cell.bare.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
    load(cell, folder)
    loaded = cell.held()
    return loaded, cell.train(range(SAVED, END)).held()


@pytest.mark.parametrize(("row", "origin", "destinations"), JOURNEYS, ids=str)
def test_saved_on_some_ranks_and_loaded_on_others(
    row: str, origin: tuple[str, int], destinations: list[tuple[str, int]], tmp_path: Path
) -> None:
    """Codes with other groups' scales, moments with other blocks' absmax, 8-bit codes read as floats; shards of one
    number of ranks that another takes for its own."""
    folder = str(tmp_path / "saved")
    saved, end = run(saving, origin[1], row=row, column=origin[0], folder=folder)[0]
    for column, world in destinations:
        results = run(loading, world, row=row, column=column, folder=folder)
        assert_ranks_agree([loaded for loaded, _ in results])
        assert_ranks_agree([resumed for _, resumed in results])
        loaded, resumed = results[0]
        assert_same_bits(loaded, saved, f"loaded by {column} on {world}")
        if (column, world) == origin:
            assert_same_bits(resumed, end, f"resumed by {column} on {world}")
        # Gradients are summed in another order. What is near 0 in a moment, or near the middle between two codes, may
        # come out otherwise; that is less than a 50th of the way that was gone.
        for name, value in end.items():
            if name.endswith(".weight"):
                way, error = (value - saved[name]).norm(), (resumed[name] - value).norm()
                assert error <= way / 50, f"{name} on {column}, {world} ranks: {error:.1e} of {way:.1e}"
