"""Which models train in full on 2, 4 and 8 cards, with which savings: counted, not run.

Each count is the table of ``apollo-triton memory --gpus``. ``python -m bench.cards`` counts what is missing, and
``--write`` puts the table into docs/memory-sharded.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from apollo_triton.tools.memory.many_cards import CARDS, count
from apollo_triton.tools.memory.paper import GB
from apollo_triton.tools.memory.sharded import Setup

from .marked_part import MarkedPart
from .report_tables import table
from .results_file import ROOT, Results, Row

TABLE = MarkedPart(
    ROOT / "docs" / "memory-sharded.md", "<!-- cards: python -m bench.cards --write -->", "<!-- end of cards -->"
)
TOKENS = 2048
SIZES = ("70B", "33B", "13B", "7B")
MACHINES = ((2, 24), (4, 24), (8, 24), (8, 80))  # cards, and GB of each
# Each has the savings before it. The order is that of what they cost: gradient clipping, then a dependency, then a
# third of a percent of perplexity.
SAVINGS = ("plain", "layer-wise", "8-bit moments", "int8 weights")
METHODS = ("Mini", "APOLLO", "AdamW")
RANK = 256


def setup_of(method: str, gpus: int, saving: str) -> tuple[Setup, bool]:
    """How ``method`` trains with the savings up to ``saving``, and whether its weights are int8."""
    level = SAVINGS.index(saving)
    setup = Setup(gpus, layerwise=level >= 1, state_bits=8 if level >= 2 else 32, checkpointing=True)
    if method == "AdamW":
        setup = replace(setup, adamw=True)
    return replace(setup, rank=RANK if method == "APOLLO" else None), level >= 3


def identity_of(method: str, size: str, gpus: int, saving: str) -> str:
    return f"{method}, {size} on {gpus}, {saving}"


def counted(method: str, size: str, gpus: int, saving: str) -> Row:
    setup, int8 = setup_of(method, gpus, saving)
    cards = count(size, setup, TOKENS, int8)
    return {"total": cards.total, "parts": cards.parts, "received": cards.received, "exchanges": cards.exchanges}


def wanted() -> list[tuple[str, str, int, str]]:
    """What the table needs at most, what tells most first."""
    meshes = sorted({gpus for gpus, _ in MACHINES}, reverse=True)
    return [
        (method, size, gpus, saving)
        for method, savings in (("Mini", SAVINGS[::-1]), ("APOLLO", SAVINGS[-1:]), ("AdamW", SAVINGS[:1]))
        for size in SIZES
        for gpus in meshes
        for saving in savings
    ]


def is_needed(rows: dict[str, Row], method: str, size: str, gpus: int, saving: str) -> bool:
    """Not if fewer savings do for the smallest card, or more do not for the largest."""
    totals = {each: rows[key]["total"] for each in SAVINGS if (key := identity_of(method, size, gpus, each)) in rows}
    cards = [CARDS[gigabytes] for number, gigabytes in MACHINES if number == gpus]
    before = [total for each, total in totals.items() if SAVINGS.index(each) < SAVINGS.index(saving)]
    behind = [total for each, total in totals.items() if SAVINGS.index(each) > SAVINGS.index(saving)]
    return not any(total <= min(cards) for total in before) and not any(total > max(cards) for total in behind)


def cell(rows: dict[str, Row], size: str, gpus: int, gigabytes: int) -> str:
    """The least savings with which the model fits these cards, and the peak with them."""
    found = [
        (saving, rows[key]["total"]) for saving in SAVINGS if (key := identity_of("Mini", size, gpus, saving)) in rows
    ]
    for saving, total in found:
        if total <= CARDS[gigabytes]:
            level = SAVINGS.index(saving)
            beyond = [SAVINGS.index(each) for each, size_of in found if size_of > CARDS[gigabytes]]
            known = max(beyond, default=-1) == level - 1
            savings = ", ".join(SAVINGS[1 : level + 1] or ("plain",))
            return f"{'' if known else 'at most '}{savings}: {total / GB:.1f}"
    return f"**no**: {found[-1][1] / GB:.1f}" if found else "not counted"


def document(rows: dict[str, Row]) -> str:
    """The table of docs/memory-sharded.md."""
    lines = []
    for size in reversed(SIZES):
        lines.append([size, *(cell(rows, size, gpus, gigabytes) for gpus, gigabytes in MACHINES)])
    for method, saving in (("APOLLO", SAVINGS[-1]), ("AdamW", SAVINGS[0])):
        for size in reversed(SIZES):
            totals = [rows.get(identity_of(method, size, gpus, saving)) for gpus, _ in MACHINES]
            name = f"{method}, {'all three' if method == 'APOLLO' else 'plain'}, {size}"
            lines.append([name, *(_fit(row, card) for row, (_, card) in zip(totals, MACHINES, strict=True))])
    return table(["Mini", *(f"{gpus} x {gigabytes} GB" for gpus, gigabytes in MACHINES)], lines)


def _fit(row: Row | None, gigabytes: int) -> str:
    if row is None:
        return "not counted"
    return f"{'yes' if row['total'] <= CARDS[gigabytes] else '**no**'}: {row['total'] / GB:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/memory-sharded.md")
    parser.add_argument("--most", type=int, default=1000, metavar="N", help="count no more than N cells now")
    options = parser.parse_args()
    results = Results("cards", None)
    left = options.most
    for each in wanted():
        identity = identity_of(*each)
        if left and identity not in results and is_needed(results.rows, *each):
            results.add(identity, **counted(*each))
            print(identity, results.rows[identity], flush=True)
            left -= 1
    text = document(results.rows)
    print(text)
    if options.write:
        TABLE.write(text)


if __name__ == "__main__":
    main()
