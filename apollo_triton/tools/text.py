"""Tables and paragraphs that fit the terminal, 79 columns or fewer where it is narrower, and sizes in words."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence

WIDEST = 79  # of a terminal of 80 columns
GAP = "  "  # between columns


def terminal_columns() -> int:
    """The columns of the terminal, or of the environment's COLUMNS: 80 where there is neither, and 20 at least."""
    return max(20, shutil.get_terminal_size().columns)


def fill(text: str) -> str:
    """The text as lines that fit. A word that is longer than a line stays whole."""
    return textwrap.fill(text, min(WIDEST, terminal_columns()), break_long_words=False, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,), keys: int = 1) -> str:
    """The rows as aligned columns, two spaces apart: flush right, except the columns whose indices are in ``left``.

    Where they do not fit, columns come in several tables, one below the other. Each begins with the first ``keys``
    columns. Text is broken between words if it must be, and a figure never.
    """
    columns = min(WIDEST, terminal_columns())
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    tables: list[list[int]] = []
    for index in range(keys, len(widths)):
        if tables and _total([widths[i] for i in (*range(keys), *tables[-1], index)]) <= columns:
            tables[-1].append(index)
        else:
            tables.append([index])
    parts = [[*range(keys), *part] for part in tables]
    return "\n\n".join("\n".join(_lines(rows, part, widths, left, columns)) for part in parts)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _lines(
    rows: Sequence[Sequence[str]], part: Sequence[int], widths: Sequence[int], left: Sequence[int], columns: int
) -> Iterator[str]:
    """The lines of one table. Where it is too wide, its widest column of text is broken between words."""
    fitted = {index: widths[index] for index in part}
    over = _total(list(fitted.values())) - columns
    if over > 0:
        widest = max((index for index in part if index in left), key=lambda index: fitted[index])
        fitted[widest] = max(fitted[widest] - over, 8)
    for row in rows:
        cells = [textwrap.wrap(row[index], max(fitted[index], 1), break_long_words=False) or [""] for index in part]
        for line in range(max(map(len, cells))):
            texts = [cell[line] if line < len(cell) else "" for cell in cells]
            aligned = (
                text.ljust(fitted[index]) if index in left else text.rjust(fitted[index])
                for text, index in zip(texts, part, strict=True)
            )
            yield GAP.join(aligned).rstrip()


def as_bytes(count: float) -> str:
    """``count`` bytes as text, for people.

    >>> as_bytes(7_340_032)
    '7.34 MB'
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
