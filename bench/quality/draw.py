"""The picture of docs/quality.md: what state buys, and that each best rate has a worse one on both sides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apollo_triton.tools.pictures import log_ticks, move, picture, shifts, styles

from .methods import ADAMW, TUNED
from .plan import MORE_SEEDS, SEEDS, TO_THE_END
from .study import Study

MOST_ABOVE = 8.0  # percent: the sweeps' panel ends there
SIDE_BY_SIDE = 1.04  # marks whose states differ by less than this factor would hide each other
DISTANCE = 7.0  # points between them


def label(method: str) -> str:
    """What the picture calls a method: without the rank that is the paper's.

    >>> label("APOLLO, rank width/4, embeddings x4")
    'APOLLO, embeddings x4'
    """
    return method.replace(", rank width/4", "")


def compared(study: Study) -> list[str]:
    """The methods that have a difference to AdamW."""
    return [method for method in TO_THE_END if method != ADAMW and study.difference(method, ADAMW)]


def draw(study: Study, path: Path) -> None:
    """Draw AdamW and what is compared with it, of which there must be something."""
    looks = styles(TO_THE_END)
    row = next(iter(study.runs(ADAMW).values()))
    about = (
        f"LLaMA of {row['tokens'] / row['tokens_a_weight'] / 1e6:.2f} M weights beside embeddings and head, vocabulary "
        f"{row['vocabulary']}, {row['tokens'] / 1e6:.1f} M tokens of Python; bars: 95 % intervals of the difference to "
        f"AdamW with the same seed, {len(SEEDS)} or {len((*SEEDS, *MORE_SEEDS))} seeds; marks of about equal state "
        f"side by side; sweeps: one seed, faint on a fifth of the tokens; {study.machine}"
    )
    title = "Held-out loss against AdamW, each method at its own best rate"
    with picture(path, title, about, 5.2, ncols=2, width_ratios=[3, 2]) as (figure, (panel, sweeps)):
        for cluster in _clusters(study, [ADAMW, *compared(study)]):
            for name, shift in zip(cluster, shifts(len(cluster), DISTANCE * (len(cluster) - 1)), strict=True):
                _draw_method(panel, study, name, shift, looks[name])
        panel.axhline(0, color="#999999", zorder=0)
        panel.set_xscale("log")
        log_ticks(panel.xaxis)
        panel.set_xlabel("optimizer state, MB")
        panel.set_title("difference to AdamW, %")
        for method in [method for method in TO_THE_END if method in TUNED]:
            _draw_sweep(sweeps, study, method, looks[method])
        sweeps.set_ylim(-0.25, MOST_ABOVE)
        sweeps.set_xscale("log", base=2)
        sweeps.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        sweeps.set_xlabel("learning rate, times the best of short runs")
        sweeps.set_title("sweeps: loss above the best, %")
        handles = dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
        names = [name for name in map(label, TO_THE_END) if name in handles]
        figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=3)


def _clusters(study: Study, names: list[str]) -> Iterator[list[str]]:
    """Names by the size of their state, ascending; together those that are side by side."""
    cluster: list[str] = []
    for name in sorted(names, key=lambda name: _megabytes(study, name)):
        if cluster and _megabytes(study, name) > SIDE_BY_SIDE * _megabytes(study, cluster[0]):
            yield cluster
            cluster = []
        cluster.append(name)
    yield cluster


def _megabytes(study: Study, name: str) -> float:
    return next(iter(study.runs(name).values()))["state_bytes"] / 1e6


def _draw_method(panel: Any, study: Study, name: str, shift: float, look: dict[str, Any]) -> None:
    found = study.difference(name, ADAMW)
    assert found is not None
    bar = [[found.margin]] * 2 if 0 < found.margin < math.inf else None  # AdamW itself and one seed have none
    look = look | {"linestyle": "none", "markersize": 7, "capsize": 3, "elinewidth": 1}
    drawn = panel.errorbar([_megabytes(study, name)], [found.mean], bar, label=label(name), **look)
    for artist in drawn.get_children():
        move(artist, shift)


def _draw_sweep(panel: Any, study: Study, method: str, look: dict[str, Any]) -> None:
    """The short sweep, faint, and the one on all tokens, both over the best rate of the short one."""
    best = study.rate(method, "fifth")
    if best is None:
        return
    for length, style in (("fifth", {"alpha": 0.3}), ("full", {})):
        found = {rate: loss for rate, loss in study.sweep(method, length).items() if math.isfinite(loss)}
        lowest = min(found.values(), default=0.0)
        rates, above = [rate / best for rate in found], [100 * (loss / lowest - 1) for loss in found.values()]
        if len(found) > 2:
            panel.plot(rates, above, **look | {"markersize": 4, "linewidth": 1, "linestyle": "-", **style})
