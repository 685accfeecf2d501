"""The table and the picture of ``bench/rates.py``'s results, for docs/options.md.

python -m bench.rates_report            # prints the table and writes docs/rates.png
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apollo_triton.tools.pictures import METHODS, picture

from . import report_tables
from .rates import BATCH, SEQUENCE, STEPS, WIDTHS, Losses, Method, best, losses_of, means, methods, rate_at, vertex
from .results_file import RESULTS, ROOT

PICTURE = ROOT / "docs" / "rates.png"
_STYLES = {
    "AdamW": METHODS["AdamW"],
    "rank width/4": METHODS["APOLLO"],
    "rank 8": ("#009E73", "v"),
    "Mini": METHODS["APOLLO-Mini"],
}


def read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The machine's name and the rows."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["machine"]["name"], found["rows"]


def behind(losses: Losses, method: Method) -> float:
    """How much higher the loss is than AdamW's, as a share of it, at AdamW's best rate."""
    adamw = means(losses, Method(method.width))
    at = best(adamw)
    assert at is not None, "AdamW's sweep is not finished"
    return means(losses, method)[at] / adamw[at] - 1


def table(losses: Losses) -> str:
    """A row for each method and a column for each width: the best rate, and at AdamW's best rate how far behind AdamW.

    AdamW's own cells have its best rate and its loss there."""
    widths = _finished(losses)
    names = dict.fromkeys(method.name for width in widths for method in methods(width))
    lines = []
    for name in names:
        cells = []
        for width in widths:
            method = next(method for method in methods(width) if method.name == name)
            found = means(losses, method)
            if best(found) is None:
                cells.append("")
            elif method.rank is None:
                cells.append(f"{_rate(vertex(found))}; {min(found.values()):.3f}")
            else:
                cells.append(f"{_rate(vertex(found))}; {100 * behind(losses, method):+.1f} %")
        lines.append([name, *cells])
    return report_tables.table(["", *(f"width {width}" for width in widths)], lines)


def _finished(losses: Losses) -> list[int]:
    """The widths at which AdamW's sweep is finished."""
    return [width for width in WIDTHS if best(means(losses, Method(width))) is not None]


def norms(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """For each method, the root mean square of its updates over AdamW's at the same width, rate and seed: the mean over
    widths, rates and seeds in the logarithm, without runs that did not train."""
    rms = {(row["width"], row["rank"], row["variant"], row["rate"], row["seed"]): row["update_rms"] for row in rows}
    logarithms: dict[str, list[float]] = {}
    for (width, rank, variant, rate, seed), value in rms.items():
        adamw = rms.get((width, None, "", rate, seed))
        if rank is not None and adamw is not None and math.isfinite(value):
            logarithms.setdefault(Method(width, rank, variant).name, []).append(math.log(value / adamw))
    return {name: math.exp(sum(values) / len(values)) for name, values in logarithms.items()}


def draw(losses: Losses, machine: str, path: Path) -> None:
    """A panel for each width: the loss over the rate, of AdamW and of APOLLO with the limiter."""
    widths = _finished(losses)
    about = (
        f"held-out loss (nats a byte) over the learning rate, after {STEPS} steps of {BATCH} x {SEQUENCE} bytes; LLaMA "
        f"of 2 layers, three seeds, dense weights at the same rate; {machine}, one thread; vertical line: AdamW's best"
    )
    title = 'With scale="auto", APOLLO takes AdamW\'s learning rate'
    with picture(path, title, about, 3.6, ncols=len(widths)) as (figure, axes):
        for width, panel in zip(widths, axes, strict=True):
            shown: set[float] = set()
            for method in methods(width):
                if method.variant:
                    continue
                found = dict(sorted(means(losses, method).items()))
                colour, marker = _STYLES[method.name]
                rates = [rate_at(index) for index in found]
                shown.update(rates)
                panel.plot(rates, list(found.values()), color=colour, marker=marker, markersize=5, label=method.name)
            adamw = means(losses, Method(width))
            panel.axvline(rate_at(best(adamw) or 0), color="#bbbbbb", zorder=0)
            lowest = min(min(means(losses, method).values()) for method in methods(width) if not method.variant)
            panel.set_ylim(lowest - 0.03, min(adamw.values()) + 0.25)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted(shown), [f"{rate:.3g}" for rate in sorted(shown)], rotation=45)
            panel.minorticks_off()
            panel.set_title(f"width {width}")
        axes[0].set_ylabel("nats a byte")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _rate(rate: float) -> str:
    return f"{rate:.1e}".replace("e-0", "e-")


def main() -> None:
    machine, rows = read(next(RESULTS.glob("*/rates.json")))
    losses = losses_of(rows)
    print(table(losses))
    for name, ratio in norms(rows).items():
        print(f"{name}: a step has {ratio:.2f} times the norm of AdamW's")
    draw(losses, machine, PICTURE)


if __name__ == "__main__":
    main()
