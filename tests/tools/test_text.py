"""Tables and paragraphs in terminals of any width."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_triton.cli import main
from apollo_triton.tools import text

ROWS = [
    ["bytes", "AdamW", "AdamW-8bit", "APOLLO r=256", "APOLLO-Mini"],
    ["weights", *["13,476,831,232"] * 4],
    ["total, GB", "53.907", "40.641", "32.291", "29.066"],
]


def test_a_table_that_fits_is_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert text.table(ROWS).splitlines() == [
        "bytes               AdamW      AdamW-8bit    APOLLO r=256     APOLLO-Mini",
        "weights    13,476,831,232  13,476,831,232  13,476,831,232  13,476,831,232",
        "total, GB          53.907          40.641          32.291          29.066",
    ]


def test_one_that_does_not_fit_goes_on_below(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert text.table(ROWS).splitlines() == [
        "bytes               AdamW      AdamW-8bit    APOLLO r=256",
        "weights    13,476,831,232  13,476,831,232  13,476,831,232",
        "total, GB          53.907          40.641          32.291",
        "",
        "bytes         APOLLO-Mini",
        "weights    13,476,831,232",
        "total, GB          29.066",
    ]


FIGURES = st.integers(0, 10**12).map("{:,}".format)
TABLES = st.integers(1, 5).flatmap(
    lambda columns: st.lists(
        st.tuples(st.text("abc ", max_size=30).map(str.strip), *[FIGURES] * columns), min_size=1, max_size=4
    )
)


@given(TABLES, st.integers(1, 200))
def test_no_figure_is_broken_or_lost(rows, columns):
    """A terminal of 60 columns, in which a line breaks within a number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        lines = text.table(rows).splitlines()
        fitting = min(text.terminal_columns(), 79)
    longest = max((len(word) for name, *_ in rows for word in name.split()), default=0)  # a word stays whole
    assert max(map(len, lines)) <= max(fitting, max(8, longest) + 2 + 17)
    figures = re.findall(r"\d[\d,]*", " ".join(lines))
    assert sorted(figures) == sorted(figure for row in rows for figure in row[1:])


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, pytest.param(40, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "arguments", [["7B"], pytest.param([], marks=pytest.mark.full), ["--paper"], ["--single-card", "60M"]], ids=str
)
def test_the_commands_fit(arguments, columns, monkeypatch, capsys):
    """``memory`` in a narrow terminal: every line fits, and no figure of the wide table is missing."""
    shown = {}
    for width in (80, columns):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["memory", *arguments]) == 0
        shown[width] = capsys.readouterr().out
        assert max(map(len, shown[width].splitlines())) < max(width, columns + 1)
    figures = re.findall(r"\d[\d,.]*\d", shown[80])
    assert sorted(set(figures)) == sorted(set(re.findall(r"\d[\d,.]*\d", shown[columns])))
