"""The picture of docs/quality.md: each method's loss against AdamW's, beside the state that it takes."""

from __future__ import annotations

import math
from pathlib import Path

from apollo_triton.tools.pictures import picture, styles

from .methods import ADAMW
from .plan import TO_THE_END
from .study import Study


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
    """Draw AdamW and what is compared with it, of which there must be something: a line each, by the size of state."""
    looks = styles(TO_THE_END)
    sizes = {name: next(iter(study.runs(name).values()))["state_bytes"] / 1e6 for name in [ADAMW, *compared(study)]}
    names = sorted(sizes, key=lambda name: (-sizes[name], TO_THE_END.index(name)))
    title = "Held-out loss against AdamW's, each method at its best rate"
    about = "Left of 0 is a lower loss than AdamW's. Bars are 95 % intervals; a hollow mark is a single seed."
    height = 1.3 + 0.27 * len(names)
    with picture(path, title, about, height, ncols=2, sharey=True, width_ratios=[3, 2]) as (_, (losses, states)):
        losses.axvline(0, color="#999999", zorder=0)
        for place, name in enumerate(names):
            found = study.difference(name, ADAMW)
            assert found is not None
            bar = [[found.margin]] * 2 if 0 < found.margin < math.inf else None  # AdamW itself and one seed have none
            fill = {"markerfacecolor": "white"} if found.seeds == 1 else {}
            look = looks[name] | {"linestyle": "none", "markersize": 7, "capsize": 3, "elinewidth": 1}
            losses.errorbar([found.mean], [place], xerr=bar, **look, **fill)
            states.barh(place, sizes[name], 0.6, color=looks[name]["color"])
            states.annotate(f"{sizes[name]:.2f}", (sizes[name], place), (4, 0), textcoords="offset points", va="center")
        losses.set_yticks(range(len(names)), [label(name) for name in names])
        losses.invert_yaxis()
        losses.set_title("difference to AdamW's loss, %")
        states.tick_params("y", left=False)
        states.set_title("optimizer state, MB")
        states.set_xlim(0, 1.12 * max(sizes.values()))
