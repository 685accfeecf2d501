"""Tables for a small terminal."""

from __future__ import annotations

from collections.abc import Sequence

COLUMNS = 79  # of a small terminal


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """The rows as aligned columns, two spaces apart: flush right, except the columns whose indices are in ``left``."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)
