"""The paper's column of memory, cell by cell, and the shapes that it counts."""

from __future__ import annotations

import pytest

from apollo_triton.tools.llama import meta_model, named_sizes, paper_figures
from apollo_triton.tools.memory.count import adamw, apollo_mini
from apollo_triton.tools.memory.paper import pretraining_cells, state_cells


def shapes(size):
    """Rows and columns of the paper's LLaMA, from its five numbers: projected matrices, and everything else."""
    llama = paper_figures()["llama"][size]
    hidden, intermediate, layers = llama["hidden"], llama["intermediate"], llama["layers"]
    projected = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    dense = [(llama["vocab"], hidden)] * 2 + [(1, hidden)] * (2 * layers + 1)
    return projected * layers, dense


def elements(matrices):
    return sum(rows * columns for rows, columns in matrices)


@pytest.mark.parametrize("size", named_sizes())
def test_the_named_sizes_have_the_papers_shapes(size):
    projected, dense = shapes(size)
    model = meta_model(size)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert adamw(model).weights == 2 * (elements(projected) + elements(dense))
    rank_one = sum(max(matrix) for matrix in projected)
    assert apollo_mini(model).moments == 4 * 2 * (rank_one + elements(dense))


# What the paper prints, and how far it is reproduced: the unit in which our count has its digits, or why it has not.
PRINTED = {
    "AdamW": {
        "60M": ("0.36", "60.0M weights (GB), 64.4M (GiB)"),
        "130M": ("0.76", "126.7M weights (GB), 136.0M (GiB)"),
        "350M": ("2.06", "GiB"),
        "1B": ("7.80", "1300.0M weights (GB), 1395.9M (GiB)"),
    },
    "APOLLO svd": {
        "60M": ("0.24", "0.12 of states; exact 0.03 or 0.16"),
        "130M": ("0.52", "0.27 of states; exact 0.11 or 0.31"),
        "350M": ("1.22", "0.53 of states; exact 0.39 or 0.65"),
        "1B": ("4.38", "1.78 of states; exact 1.56 or 2.08"),
    },
    "APOLLO r=1/4": {
        "60M": ("0.24", "0.12 of states; exact 0.03 or 0.16"),
        "130M": ("0.52", "0.27 of states; exact 0.08 or 0.28"),
        "350M": ("1.22", "0.69 + 0.53 GiB, dense moments counted"),
        "1B": ("4.38", "1.78 of states; exact 1.21 or 1.73"),
    },
    "APOLLO r=1/8": {
        "60M": ("0.18", "0.06 of states; exact 0.01 or 0.14"),
        "130M": ("0.39", "0.14 of states; exact 0.04 or 0.24"),
        "350M": ("0.95", "0.26 of states; exact 0.15 or 0.41"),
        "1B": ("3.49", "0.89 of states; exact 0.60 or 1.13"),
    },
    "APOLLO-Mini": {
        "60M": ("0.12", "GB"),
        "130M": ("0.25", "GiB"),
        "350M": ("0.69", "GiB"),
        "1B": ("2.60", "1300.0M weights (GB), 1395.9M (GiB)"),
    },
}
QUARTER = {"60M": 128, "130M": 192, "350M": 256, "1B": 512}


def convention_bytes(method, size):
    """Two bytes for each weight, each moment of AdamW, and of the low-rank methods each entry of the projected
    matrices' two ``[channels, rank]`` moments, of ``update_norm`` and of a stored ``[rank, width]`` projection."""
    projected, dense = shapes(size)
    weights = elements(projected) + elements(dense)
    if method == "AdamW":
        return 2 * 3 * weights
    rank = {"APOLLO r=1/8": QUARTER[size] // 2, "APOLLO-Mini": 1}.get(method, QUARTER[size])
    state = sum(2 * max(matrix) * rank + 1 for matrix in projected)
    if method == "APOLLO svd":
        state += sum(min(matrix) * rank for matrix in projected)
    return 2 * (weights + state)


def test_every_cell_of_the_papers_memory_column():
    cells = {(cell.method, cell.size): cell for cell in pretraining_cells()}
    assert list(cells) == [(method, size) for method, row in PRINTED.items() for size in row]
    for (method, size), cell in cells.items():
        printed, verdict = PRINTED[method][size]
        assert (cell.printed, cell.counted) == (printed, convention_bytes(method, size))
        assert (cell.reproduced or cell.note) == verdict
        units = [
            name for name, unit in (("GB", 1e9), ("GiB", 2**30)) if round(cell.counted / unit, 2) == float(printed)
        ]
        assert ", ".join(units) == cell.reproduced
    paper = paper_figures()["pretrain_c4_perplexity"]
    for method, row in paper.items():  # one cell stands for three rows
        same = "APOLLO svd" if method in ("GaLore", "Fira") else method
        assert {size: f"{gigabytes:.2f}" for size, (_, gigabytes) in row.items()} == {
            size: printed for size, (printed, _) in PRINTED[same].items()
        }


def test_the_states_of_the_7b_table_are_reproduced():
    projected, dense = shapes("7B")
    counted = {
        "8-bit Adam": ("13", 2 * (elements(projected) + elements(dense)), "GB, GiB"),
        "APOLLO r=256": ("1.6", 2 * sum(2 * 256 * max(matrix) + 1 for matrix in projected), "GB"),
        "APOLLO-Mini": ("0.0", 2 * sum(2 * max(matrix) + 1 for matrix in projected), "GB, GiB"),
    }
    assert {c.method: (c.printed, c.counted, c.reproduced) for c in state_cells()} == counted


def test_why_no_single_unit_can_reproduce_the_table():
    """The printed weights alone (the Mini row) bound the bytes of a G at each size, and the bounds do not meet; and
    the r=1/8 states are half the r=1/4 ones, though the dense moments do not depend on the rank (docs/memory.md)."""
    cells = {(cell.method, cell.size): cell for cell in pretraining_cells()}
    least, most = {}, {}
    for size in QUARTER:
        mini = cells["APOLLO-Mini", size]
        least[size], most[size] = (mini.counted / (float(mini.printed) + slack) for slack in (0.005, -0.005))
    assert max(least.values()) > min(most.values())
    assert least["60M"] < 10**9 < most["60M"] < min(2**30, least["1B"])
    assert max(least["130M"], least["350M"]) < 2**30 < min(most["130M"], most["350M"])
    assert 10**9 < least["1B"] < most["1B"] < 2**30  # neither
    for size in QUARTER:
        quarter, eighth, mini = (
            float(cells[method, size].printed) for method in ("APOLLO r=1/4", "APOLLO r=1/8", "APOLLO-Mini")
        )
        assert abs((quarter - mini) / 2 - (eighth - mini)) < 0.0051
