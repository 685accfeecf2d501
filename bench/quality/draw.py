"""The picture of docs/quality.md: what state buys, and that each best rate has a worse one on both sides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from apollo_triton.tools.pictures import log_ticks, picture, styles

from .methods import ADAMW, TUNED
from .plan import FULL_VARIANTS, SEEDS
from .run import body_weights
from .study import Study

MOST_ABOVE = 8.0  # percent: the sweeps' panel ends there


def draw(study: Study, path: Path) -> bool:
    """Draw what has been run. Returns whether there is anything to draw; nothing is written if not."""
    names = [ADAMW, *(name for name in (*TUNED, *FULL_VARIANTS) if study.difference(name, ADAMW) and name != ADAMW)]
    if len(names) == 1:
        return False
    looks = styles([*TUNED, *FULL_VARIANTS])
    run = study.runs(ADAMW)[SEEDS[0]]
    about = (
        f"LLaMA of {body_weights(study.model) / 1e6:.2f} M weights beside embeddings and head, vocabulary "
        f"{run['vocabulary']}, {run['tokens'] / 1e6:.1f} M tokens of Python; bars: 95 % intervals of the difference to "
        f"AdamW with the same seed, {len(SEEDS)} seeds; sweeps: a fifth of the tokens, one seed; {study.machine}"
    )
    title = "Held-out loss against AdamW, each method at its own best rate"
    with picture(path, title, about, 5.2, ncols=2, width_ratios=[3, 2]) as (figure, (panel, sweeps)):
        for name in names:
            _draw_method(panel, study, name, looks[name])
        panel.axhline(0, color="#999999", zorder=0)
        panel.set_xscale("log")
        log_ticks(panel.xaxis)
        panel.set_xlabel("optimizer state, MB")
        panel.set_title("difference to AdamW, %")
        for method in TUNED:
            _draw_sweep(sweeps, study, method, looks[method])
        sweeps.set_ylim(-0.25, MOST_ABOVE)
        sweeps.set_xscale("log", base=2)
        sweeps.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        sweeps.set_xlabel("learning rate, times the best one")
        sweeps.set_title("sweeps: loss above the best, %")
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return True


def _draw_method(panel: Any, study: Study, name: str, look: dict[str, Any]) -> None:
    size = next(iter(study.runs(name).values()))["state_bytes"] / 1e6
    found = study.difference(name, ADAMW)
    assert found is not None
    bar = [[found.margin]] * 2 if 0 < found.margin < math.inf else None
    look = look | {"linestyle": "none", "markersize": 7, "capsize": 3, "elinewidth": 1}
    panel.errorbar([size], [found.mean], bar, label=name, **look)


def _draw_sweep(panel: Any, study: Study, method: str, look: dict[str, Any]) -> None:
    found = {rate: loss for rate, loss in study.sweep(method).items() if math.isfinite(loss)}
    best = study.rate(method)
    if best in found:
        rates, above = [rate / best for rate in found], [100 * (loss / found[best] - 1) for loss in found.values()]
        panel.plot(rates, above, **look | {"markersize": 4, "linewidth": 1, "alpha": 0.8})
