"""The colours of the methods."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from apollo_triton.tools.pictures import METHODS, styles

np = pytest.importorskip("numpy")

# Machado, Oliveira and Fernandes 2009, table 1: what is seen without red or green cones, of linear RGB.
SEEN = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def lab(colour: str, seen: list[list[float]]):
    """CIE L*a*b* of a colour as it is seen, white D65."""
    rgb = np.array([int(pair, 16) for pair in re.findall("[0-9A-F]{2}", colour)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(np.array(seen) @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_any_two_methods_differ_in_colour_for_colour_blind_readers_too(seen):
    """A colour used twice, or a new one that a reader without red or green cones takes for another's."""
    for one, other in combinations(METHODS, 2):
        distance = np.linalg.norm(lab(METHODS[one][0], seen) - lab(METHODS[other][0], seen))
        assert distance > 17, f"{one} and {other}: {distance:.1f}"


def test_a_variant_has_its_method_s_colour_and_another_line():
    looks = styles(["APOLLO", "APOLLO-Mini", "APOLLO-Mini, layer-wise", "Mini, Rademacher", "apollo-torch, Mini"])
    plain, *variants = (looks[name] for name in ("APOLLO-Mini", "APOLLO-Mini, layer-wise", "Mini, Rademacher"))
    assert {look["color"] for look in variants} == {plain["color"]}
    assert len({(look["linestyle"], look["marker"]) for look in (plain, *variants)}) == 3
    assert len({look["color"] for look in looks.values()}) == 3


def test_a_name_without_a_colour_is_named():
    with pytest.raises(ValueError, match="'APOLLOX' begins like no method"):
        styles(["APOLLO", "APOLLOX"])
