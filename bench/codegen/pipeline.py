"""How Triton pipelines the tiles of a matrix product, read off its intermediate code (TTGIR).

With n stages a tile is copied n - 1 turns ahead into slots of shared memory. An asynchronous product (sm_90, sm_100)
may still read its tile when the copies of the next turn start, so such a tile needs n slots. Triton forgets the last
of them for a tile that something else uses as well: the copy then overwrites what the product reads, and results are
wrong. A tile that goes from its slot to registers, or whose products have been waited for, needs n - 1 slots.
"""

from __future__ import annotations

import linecache
import re
from typing import NamedTuple


class Tile(NamedTuple):
    """The slots of a tile, and whether a product reads them while copies run."""

    slots: int = 0
    read_by_product: bool = False

    def wanted(self, stages: int) -> int:
        """The slots that so many stages ask for."""
        return stages if self.read_by_product else stages - 1


class _Product(NamedTuple):
    """A product in flight: the buffers that it reads, and on sm_100 what is waited at."""

    buffers: set[str]
    barrier: str = ""


_ALLOCATION = re.compile(r"\s*(%\w+) = \S+\.local_alloc\s*: \(\) -> \S+memdesc<(\d+)x\d+x\d+x.*loc\((#\w+)\)")
_VIEW = re.compile(r"\s*(%\w+) = \S+ (%\w+)\b.* -> \S+memdesc<")
_PRODUCT = re.compile(r".*\b(warp_group_dot|tc_gen5_mma) (%.*?) [:{]")
_WAIT = re.compile(r".*\bwarp_group_dot_wait .*pendings = (\d+)|.*\bwait_barrier (%\w+)")
_COPY = re.compile(r".*\basync_copy_global_to_local |\s*scf\.yield")  # the next turn begins with copies


def tiles(ttgir: str) -> dict[str, Tile]:
    """Each pipelined tile by the name of the variable that it was loaded to."""
    lines = ttgir.splitlines()
    locations = dict(match.groups() for line in lines if (match := re.match(r"(#loc\w*) = loc\((.*)\)$", line)))
    slots, names, buffer = dict[str, int](), dict[str, str](), dict[str, str]()  # buffer: of each view of one
    in_flight, read = list[_Product](), set[str]()
    for line in lines:
        if match := _ALLOCATION.match(line):
            slots[match[1]], names[match[1]] = int(match[2]), _variable(match[3], locations)
            buffer[match[1]] = match[1]
        elif (match := _VIEW.match(line)) and match[2] in buffer:
            buffer[match[1]] = buffer[match[2]]
        elif match := _PRODUCT.match(line):
            operands = match[2].split(", ")
            barrier = operands[5].partition("[")[0] if len(operands) > 5 else ""
            if barrier or "isAsync = true" in line:
                in_flight.append(_Product({buffer[view] for view in operands[:2] if view in buffer}, barrier))
        elif match := _WAIT.match(line):
            oldest = max(0, len(in_flight) - int(match[1])) if match[1] else 0
            in_flight = [product for product in in_flight[oldest:] if product.barrier != match[2]]
        elif _COPY.match(line):
            read.update(*(product.buffers for product in in_flight))
    found = dict[str, Tile]()
    for one, count in slots.items():
        other = found.get(names[one], Tile(count))
        found[names[one]] = Tile(min(count, other.slots), one in read or other.read_by_product)
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
