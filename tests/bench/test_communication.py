"""The table of docs/distributed.md: what is counted is what is written, and what is written holds."""

from __future__ import annotations

import json
from math import prod

import pytest

pytest.importorskip("transformers")

from bench import communication
from bench.results_file import EVERY_MACHINE, RESULTS


@pytest.fixture(scope="module")
def rows():
    found = json.loads((RESULTS / EVERY_MACHINE / "communication.json").read_text())
    return {row["id"]: {name: value for name, value in row.items() if name != "id"} for row in found["rows"]}


def every_case():
    return [
        (size, gpus, method)
        for size in communication.SIZES
        for gpus in communication.MESHES
        for method in communication.METHODS
    ]


def test_the_document_shows_the_figures_that_were_counted(rows):
    assert communication.TABLE.read() == communication.document(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [("7B", (8, 1), "APOLLO"), pytest.param(("7B", (128, 8), "APOLLO-Mini"), marks=pytest.mark.full)],
    ids=str,
)
def test_counting_again_gives_the_same(rows, case):
    """Figures of code that has changed since; a collective a weight; moments that are whole on a rank."""
    assert communication.counted(*case) == rows[communication.identity_of(*case)]


def test_two_collectives_whatever_the_model_and_the_mesh(rows):
    for case in every_case():
        row = rows[communication.identity_of(*case)]
        assert row["collectives"] == 2, case
        assert row["groups"] == sum(size > 1 for size in case[1]), case


def test_moments_shrink_with_the_ranks(rows):
    """Within what uneven shards cost: a rank's share is rounded up to a whole channel or row."""
    for size in communication.SIZES:
        for method in communication.METHODS:
            few = rows[communication.identity_of(size, (8, 1), method)]["state"]
            for gpus in communication.MESHES[1:]:
                many = rows[communication.identity_of(size, gpus, method)]["state"]
                assert few * 8 / prod(gpus) <= many <= 1.1 * few * 8 / prod(gpus), (size, gpus, method)


def test_sketches_that_arrive_are_those_of_the_matrices_cut_along_their_width(rows):
    """7B under FSDP2 on 8 ranks, by hand: of 32 down_proj [4096, 11008], which keep 11008 columns, sketches
    [11008, 256] and one |G_c|^2 a channel are sent to their owners, and the factors come back; of all 224 matrices one
    number each, in float32. A rank keeps its own eighth."""
    sketches = 32 * 11008 * (256 + 1) * 4
    factors = 32 * 11008 * 4
    sums = (224 + 2 + 65) * 8 * 4  # of the embedding, the head and the norms |G|^2 goes the same way
    expected = (sketches + factors + sums) * 7 // 8
    assert rows["APOLLO, 7B on 8 x 1"]["received"] == expected
