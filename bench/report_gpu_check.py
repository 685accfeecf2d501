"""The report's tables of ``bench.gpu_check``: what was right, which tests ran, and each change before and after.

Its whole steps, trainings and pre-trainings are rows of those benchmarks, and stand in their tables.
"""

from __future__ import annotations

from collections import Counter

from .report_data import Machine
from .report_tables import milliseconds, ratio, table
from .report_targets import MISSING
from .results_file import Row

MOST_SHOWN = 20  # failures and misses in a table; the results file has all


def gpu_check(machine: Machine) -> str:
    """All tables, or "" if the check never ran on this machine."""
    parts = [races(machine), shapes(machine), tests(machine), cases(machine), changes(machine)]
    return "\n\n".join(["### GPU check", *filter(None, parts)]) if any(parts) else ""


def races(machine: Machine) -> str:
    """The projected gradient against float64, in a loop."""
    rows = [row for row in machine.rows("gpu_check") if "race" in row]
    lines = [[row["race"], *_race(row)] for row in rows]
    heads = ["R = G P^T and norms, again and again", "times", "wrong", "other bits the second time"]
    return table([*heads, "largest error, of its limit"], lines) if rows else ""


def _race(row: Row) -> list[str]:
    if "skipped" in row:
        return [f"{MISSING}: {row['skipped']}", "", "", ""]
    wrong = f"{row['wrong']:,} of {row['elements']:,}"
    if not row["right"]:
        wrong = f"**{wrong}**, norm off by {row['norm_error']:.1e}"
    return [str(row["repetitions"]), wrong, f"{row['other_bits']:,}", f"{100 * row['worst']:.0f} %"]


def shapes(machine: Machine) -> str:
    """Every kernel once, on odd shapes: how many were right, and a line for each that was not."""
    rows = [row for row in machine.rows("gpu_check") if "shape" in row]
    right = sum(bool(row.get("right")) for row in rows)
    text = f"Odd shapes against the reference path: {right} of {len(rows)} right."
    lines = [
        [row["shape"], row.get("skipped") or f"{row['difference']:.1e}, limit {row['limit']:.0e}"]
        for row in rows
        if not row.get("right")
    ]
    return "\n\n".join(
        [text, *([table(["not right", "difference, of the way"], lines)] if lines else [])] if rows else []
    )


def tests(machine: Machine) -> str:
    """`pytest -m gpu`: the counts, and the last line of each failure."""
    rows = machine.rows("gpu_check")
    counts = sum((Counter(row["counts"]) for row in rows if "counts" in row), Counter())
    failed = [row for row in rows if row["id"].startswith("failed: ")]
    absent = [name for row in rows for name in row.get("missing", ())]
    if not counts and not absent:
        return ""
    said = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped")) if counts else MISSING
    text = f"`pytest -m gpu`: {said}." + (f" Missing there: {', '.join(absent)}." if absent else "")
    lines = [[f"`{_cell(row['id'].removeprefix('failed: '))}`", _last_line(row)] for row in failed[:MOST_SHOWN]]
    if len(failed) > MOST_SHOWN:
        lines.append([f"and {len(failed) - MOST_SHOWN} more", ""])
    return "\n\n".join([text, *([table(["failed", ""], lines)] if lines else [])])


def _last_line(row: Row) -> str:
    """The last line of pytest's that says what went wrong."""
    lines = [line[1:].strip() for line in row.get("text", "").splitlines() if line.startswith("E ")]
    return f"`{_cell(lines[-1])}`" if lines else ""


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")[:160]


def cases(machine: Machine) -> str:
    """`apollo-triton validate`: the count, and each measure that missed its limit."""
    rows = [row for file in machine.of("gpu_check-validate") for row in file["rows"]]
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["id"], f"{MISSING}: {_cell(row['skipped'])}", "", ""])
        for measure in row.get("missed", ()):
            kernels, reference, limit = row["kernels, reference, limit"][measure]
            lines.append([f"{row['id']}: {measure}", f"{kernels:.1e}", f"{reference:.1e}", f"{limit:.1e}"])
    within = sum(row.get("missed") == [] for row in rows)
    text = f"`apollo-triton validate`: {within} of {len(rows)} cases within their limits."
    heads = ["missed", "kernels", "reference", "limit"]
    return "\n\n".join([text, *([table(heads, lines[:MOST_SHOWN])] if lines else [])] if rows else [])


def changes(machine: Machine) -> str:
    """Each change that waited for a clock, before and after, in one run and in turns."""
    rows = [row for row in machine.rows("gpu_check") if "change" in row]
    lines = []
    for row in rows:
        where = f"{row['contender']}, rank {row['rank']}, {row['dtype']}"
        if "skipped" in row:
            lines.append([row["change"], where, f"{MISSING}: {_cell(row['skipped'])}", "", "", ""])
            continue
        before = milliseconds(row["before_ms"][1]) if "before_ms" in row else "not kept"
        after, hosts = milliseconds(row["after_ms"][1]), [row.get("before_host_ms"), row["after_host_ms"]]
        host = " -> ".join(milliseconds(value) for value in hosts if value is not None)
        lines.append(
            [
                row["change"],
                where,
                before,
                after,
                ratio(row.get("after over before")) if "before_ms" in row else "",
                host,
            ]
        )
    heads = ["change", "a step of", "ms before", "ms after", "after over before", "ms on the host"]
    return table(heads, lines) if rows else ""
