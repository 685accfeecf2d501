"""How Triton pipelines the tiles of a matrix product, read off its intermediate code (TTGIR).

With n stages a tile is copied n - 1 turns ahead into slots of shared memory. An asynchronous product (sm_90, sm_100)
still reads its tile when the copies of the next turn start, so such a tile needs n slots. Triton forgets the last of
them for a tile that something else uses as well: the copy then overwrites what the product reads, and results are
wrong. A tile that goes from its slot to registers is no longer needed by then, and has n - 1 slots.
"""

from __future__ import annotations

import linecache
import re
from typing import NamedTuple

# What the products of each kernel stream, by the names of the variables.
STREAMED = {
    **dict.fromkeys(("sketch_kernel", "project_kernel"), ("G", "P")),
    **dict.fromkeys(("collect_kernel", "gram_norms_kernel"), ("S", "kept")),
    **dict.fromkeys(("tile_norms_kernel", "apply_operands_kernel", "apply_int8_operands_kernel"), ("X", "dY")),
    "gram_kernel": ("X", "Z"),
    "forward_kernel": ("x", "q"),
    "input_gradient_kernel": ("G", "q"),
}


class Tile(NamedTuple):
    """The slots of a tile, and whether a product reads them while the next copies run."""

    slots: int = 0
    read_by_product: bool = False

    def wanted(self, stages: int) -> int:
        """The slots that so many stages ask for."""
        return stages if self.read_by_product else stages - 1


_ALLOCATION = re.compile(r"\s*(%\w+) = \S+\.local_alloc\s*: \(\) -> \S+memdesc<(\d+)x\d+x\d+x.*loc\((#\w+)\)")
_VIEW = re.compile(r"\s*(%\w+) = \S+ (%\w+)\b.* -> \S+memdesc<")
_PRODUCT = re.compile(r".*\b(?:warp_group_dot|tc_gen5_mma) (%\w+), (%\w+),")


def tiles(ttgir: str) -> dict[str, Tile]:
    """Each pipelined tile by the name of the variable that it was loaded to."""
    found = dict[str, Tile]()
    slots, names, buffer = dict[str, int](), dict[str, str](), dict[str, str]()  # buffer: of each view of one
    lines = ttgir.splitlines()
    locations = dict(match.groups() for line in lines if (match := re.match(r"(#loc\w*) = loc\((.*)\)$", line)))
    in_products = set[str]()
    for line in lines:
        if match := _ALLOCATION.match(line):
            slots[match[1]], names[match[1]] = int(match[2]), _variable(match[3], locations)
            buffer[match[1]] = match[1]
        elif (match := _VIEW.match(line)) and match[2] in buffer:
            buffer[match[1]] = buffer[match[2]]
        elif match := _PRODUCT.match(line):
            in_products |= {buffer[view] for view in match.groups() if view in buffer}
    for one, count in slots.items():
        tile, other = Tile(count, one in in_products), found.get(names[one])
        found[names[one]] = tile if other is None else Tile(min(count, other.slots), max(tile[1], other[1]))
    return found


def _variable(location: str, locations: dict[str, str]) -> str:
    """The variable set at a location, or by the line that called the function with that location."""
    text = locations[location]
    if match := re.match(r'"(\w+)"\(#', text):
        return match[1]
    if match := re.match(r'"(.+)":(\d+):\d+', text):  # triton before 3.4 names no variables
        assignment = re.match(r"\s*(\w+) = ", linecache.getline(match[1], int(match[2])))
        return assignment[1] if assignment else ""
    return next(filter(None, (_variable(each, locations) for each in re.findall(r"#loc\w*", text))), "")  # callsite
