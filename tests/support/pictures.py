"""What holds for every picture that the project draws."""

from __future__ import annotations

from itertools import pairwise

import pytest

from apollo_triton.tools.pictures import METHODS, method_of

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

# Of what belongs to no method: the line of a copy and of no difference, the mark that explains seeds in a legend.
NEUTRAL = {"#000000", "#999999"}


def record_figures(monkeypatch) -> dict[str, Figure]:
    """From here on every figure that is saved, by its file's name without the ending."""
    figures: dict[str, Figure] = {}
    save = Figure.savefig

    def saved(figure, path, **options):
        save(figure, path, **options)
        figures[path.stem.partition("-")[2]] = figure  # before it stands what makes the name a temporary one

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def check_picture(figure: Figure, names: set[str]) -> None:
    """Colours that are not the methods' own, labels cut off or on each other, a legend over data, a line through two
    points."""
    _check_colours(figure, {METHODS[method_of(name)[0]][0].lower() for name in names})
    _check_texts(figure)
    for axes in figure.axes:
        for line in axes.lines:
            is_rule = line.get_transform() in (axes.get_xaxis_transform("grid"), axes.get_yaxis_transform("grid"))
            points = len(line.get_xdata())
            assert is_rule or line.get_linestyle() == "None" or points >= 3, f"a line through {points} points"
            box = axes.get_legend() and axes.get_legend().get_window_extent()
            if box and not is_rule:
                pixels = line.get_transform().transform(line.get_xydata())
                assert not box.count_contains(pixels), f"the legend {box} is over {line.get_label()}"


def _check_colours(figure: Figure, expected: set[str]) -> None:
    found = set()
    for axes in figure.axes:
        found |= {to_hex(line.get_color()) for line in axes.lines}
        found |= {to_hex(colour) for each in axes.collections for colour in each.get_edgecolor()}
        found |= {to_hex(patch.get_facecolor()) for patch in axes.patches}
    assert expected <= found <= expected | NEUTRAL, f"colours {found}, and the methods' are {expected}"
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    for legend in legends:
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True):
            name = text.get_text().partition(":")[0]
            try:
                method, _ = method_of(name)
            except ValueError:
                continue  # of a size or of a copy
            assert to_hex(handle.get_color()) == METHODS[method][0].lower(), name


def _check_texts(figure: Figure) -> None:
    not_drawn = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            least, most = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            not_drawn |= {tick.label1 for tick in ticks if not least <= tick.get_loc() <= most}
            drawn = sorted((tick for tick in ticks if least <= tick.get_loc() <= most), key=lambda tick: tick.get_loc())
            for one, other in pairwise(tick.label1 for tick in drawn if tick.label1.get_text()):
                overlap = one.get_window_extent().overlaps(other.get_window_extent())
                assert not overlap, f"two labels of ticks overlap, {one.get_text()!r} and {other.get_text()!r}"
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text not in not_drawn:
            box = text.get_window_extent()
            inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert inside, f"{text.get_text()!r} ends outside of the figure, {box}"
