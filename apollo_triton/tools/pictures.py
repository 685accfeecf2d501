"""What all pictures have in common: a colour for each method, a title that says what was measured, ticks, curves."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.extras import require
from ..core.files import replaced

# A colour and a marker for each method, the same in every picture. The first eight colours are Okabe and Ito's, with
# grey for their yellow. For colour-blind readers any two of the sixteen are at least 17 apart in Lab.
METHODS = {
    "AdamW": ("#555555", "^"),
    "SGD": ("#000000", "D"),
    "APOLLO": ("#0072B2", "s"),
    "APOLLO-Mini": ("#D55E00", "o"),
    "Q-APOLLO": ("#56B4E9", "s"),
    "Q-Mini": ("#E69F00", "o"),
    "apollo-torch": ("#009E73", "X"),
    "apollo-torch Mini": ("#CC79A7", "P"),
    "bitsandbytes": ("#332288", "*"),
    "torchao": ("#CCBB66", "<"),
    "GaLore": ("#992200", ">"),
    "optimi": ("#7722EE", "h"),
    "Muon": ("#440044", "p"),
    "flashoptim": ("#660000", "v"),
    "adafactor8bit": ("#AACCAA", "d"),
    "Adafactor": ("#8866EE", "d"),
}
# How a method's name begins in the results; what follows is a variant. The longest that fits counts.
_BEGINNINGS = {name: name for name in METHODS} | {
    "Mini": "APOLLO-Mini",
    "PyTorch AdamW": "AdamW",
    "PyTorch AdamW, fused": "AdamW",
    "PyTorch SGD": "SGD",
    "PyTorch SGD, fused": "SGD",
    "apollo-torch, Mini": "apollo-torch Mini",
    "bitsandbytes AdamW8bit": "bitsandbytes",
    "torchao AdamW8bit": "torchao",
    "optimi AdamW, triton": "optimi",
    "PyTorch Muon": "Muon",
    "flashoptim AdamW": "flashoptim",
}
# Of a method's second name in a picture, its third, and so on.
_VARIANT_LINES = ("--", ":", "-.")
_VARIANT_MARKERS = "vdpH*>"

WIDTH = 9.0  # inches, 900 pixels: a README's width
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def method_of(name: str) -> tuple[str, str]:
    """The method that a name in the results means, and its variant.

    >>> method_of("APOLLO-Mini, layer-wise"), method_of("Mini"), method_of("PyTorch AdamW, foreach")
    (('APOLLO-Mini', 'layer-wise'), ('APOLLO-Mini', ''), ('AdamW', 'foreach'))
    """
    for beginning in sorted(_BEGINNINGS, key=len, reverse=True):
        variant = name.removeprefix(beginning)
        if name.startswith(beginning) and (not variant or variant.startswith(", ")):
            return _BEGINNINGS[beginning], variant.removeprefix(", ")
    raise ValueError(f"{name!r} begins like no method that has a colour (these have one: {', '.join(_BEGINNINGS)})")


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of every name in a picture: a method's variants differ in marker and line."""
    found: dict[str, dict[str, Any]] = {}
    variants: dict[str, int] = {}
    for name in dict.fromkeys(names):
        method, variant = method_of(name)
        colour, marker = METHODS[method]
        line = "-"
        if variant:
            index = variants[method] = variants.get(method, -1) + 1
            line = _VARIANT_LINES[index % len(_VARIANT_LINES)]
            marker = _VARIANT_MARKERS[index % len(_VARIANT_MARKERS)]
        found[name] = {"color": colour, "marker": marker, "linestyle": line}
    return found


@contextmanager
def picture(path: Path, title: str, about: str, height: float, **subplots: Any) -> Iterator[Any]:
    """A figure and its axes, as ``pyplot.subplots`` gives them. ``title`` and the line ``about`` it stand above.

    The file at ``path`` is whole, or is not there.
    """
    require("matplotlib", "demo").use("Agg")
    pyplot = require("matplotlib.pyplot", "demo")
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), dpi=100, layout="constrained", **subplots)
        lines = textwrap.wrap(about, 120)
        figure.get_layout_engine().set(rect=(0, 0, 1, 1 - (0.36 + 0.18 * len(lines)) / height))
        figure.text(0.008, 1 - 0.07 / height, title, weight="bold", size=11, va="top")
        figure.text(0.008, 1 - 0.3 / height, "\n".join(lines), color="#555555", size=9, va="top")
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as unfinished:
            figure.savefig(unfinished, format="png")
        pyplot.close(figure)


def draw_curve(axes: Any, x: Sequence[float], y: Sequence[float], shift: float = 0, **style: Any) -> Any:
    """Plot ``y`` over ``x``, ``shift`` points to the right of it. Fewer than three points get markers and no line."""
    if len(x) < 3:
        style |= {"linestyle": "none", "marker": style.get("marker", "o")}
    (line,) = axes.plot(x, y, **style)
    move(line, shift)
    return line


def move(artist: Any, shift: float) -> None:
    """Draw what has been added to its axes, and has had its say in their limits, ``shift`` points to the right."""
    transforms = require("matplotlib.transforms", "demo")
    axes = artist.axes
    artist.set_transform(transforms.offset_copy(axes.transData, axes.figure, shift, 0, units="points"))


def shifts(count: int, width: float) -> list[float]:
    """How many points to the right of its place each of ``count`` curves is drawn, so that none hides another.

    >>> shifts(3, 10.0)
    [-5.0, 0.0, 5.0]
    """
    return [width * (index / (count - 1) - 0.5) if count > 1 else 0.0 for index in range(count)]


def log_ticks(axis: Any) -> None:
    """Ticks between the powers of ten too, as plain numbers: 1, 2 and 5, or all nine where there is room."""
    ticker = require("matplotlib.ticker", "demo")
    least, most = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if most > 15 * least else range(1, 10)))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_locator(ticker.NullLocator())
