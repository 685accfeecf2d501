"""What docs/quality.md makes of the rows of the study."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
from pictures import check_picture, record_figures
from quality_rows import PEER, changed, row_of

from bench.quality import page
from bench.quality.draw import compared, draw, label
from bench.quality.methods import ADAMW, APOLLO, FAST_MINI, MINI
from bench.quality.plan import TO_THE_END
from bench.quality.run import Job
from bench.quality.study import Study
from bench.quality.tables import TABLES
from bench.quality.variants import OPTIONS


def cells(table: str, name: str) -> list[str]:
    """The cells of a table's row, without its name."""
    line = next(line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_main_table_says_what_the_rows_say(rows):
    """A base of other seeds, bytes or rates of another method, a step time that stands with the wrong one."""
    rows = changed(changed(rows, ADAMW, [2.0, 4.0, 8.0, 16.0, 16.0, 16.0]), PEER, [2.0 * 1.01, 4.0 * 1.02, 8.0 * 1.03])
    rate = Study(rows).rate(PEER)
    times = {ADAMW: {"times AdamW": 1.0}, PEER: {"times AdamW": 2.5}, APOLLO: {"skipped": "it failed"}}
    table = TABLES["main"](Study(rows, times))
    size = next(row["state_bytes"] for row in rows if row["method"] == PEER)
    # Of the seeds that both have. The mean of 2.02, 4.08 and 8.24 is 4.78; 4.303 times their standard deviation over
    # sqrt(3) is 7.872.
    expected = [f"{rate:g}", "4.780 ± 7.872", "+2.00 ± 2.48, no difference seen", "not reached"]
    shown = cells(table, PEER)
    assert shown == [*expected, f"{size:,}", "2.50"]
    assert cells(table, ADAMW)[2:4] == ["", ""]
    assert table.endswith(f"Missing step times: {APOLLO}: it failed.")


def test_a_faster_method_has_its_share_of_tokens(rows):
    """Half-way AdamW has 3.0 and at the end 2.0. A method that ends at 1.5 has 2.5 half-way, and 2.0 at three
    quarters."""
    rows = changed(changed(rows, ADAMW, [2.0] * 6), PEER, [1.5] * 3)
    assert cells(TABLES["main"](Study(rows)), PEER)[2:4] == ["-25.00 ± 0.00, better", "75 %"]


def test_what_is_missing_is_an_empty_cell_and_named(rows):
    """A mean of the seeds that are there, as if they were all; a run at another rate than the best in its place; a best
    rate of an unfinished sweep."""
    rows = changed(rows, ADAMW, [2.0] * 6)
    rows = changed(rows, PEER, [2.2, 2.2, 2.2])
    lacks = [row for row in rows if (row["method"], row["length"]) != (PEER, "full") or row["seed"] == 0]
    table = TABLES["main"](Study([*lacks, row_of(Job(PEER, 0.123, "full", seed=2), 0.1)]))
    assert cells(table, PEER)[1:3] == ["2.200 (1 seed)", "+10.00 (1 seed)"]
    assert f"Missing runs: 2, of {PEER} (2)." in table
    last = next(row for row in lacks if (row["method"], row["length"]) == (PEER, "full"))
    table = TABLES["main"](Study([row for row in lacks if row is not last]))
    assert set(cells(table, PEER)) == {""}
    assert f"Missing: the end of the sweep of {PEER}." in table


def test_a_run_that_diverged_says_so_in_every_table(rows):
    rows = changed(rows, PEER, [2.0, None, 2.0])
    sweep = [row for row in rows if (row["method"], row["length"]) == (PEER, "fifth")]
    rows[rows.index(max(sweep, key=lambda row: row["rate"]))]["held_out_loss"] = None
    study = Study(rows)
    assert cells(TABLES["main"](study), PEER)[1:3] == ["diverged with seed 1", ""]
    assert cells(TABLES["sweeps"](study), PEER)[1].endswith(": diverged")
    assert PEER not in compared(study)


def test_variants_are_compared_with_what_they_vary_on_as_many_tokens(rows):
    """AdamW or the other method as the base; the base's runs of another length."""
    for name, length, base, variant in (
        ("limiter", "fifth", MINI, f"{MINI}, no limiter"),
        ("refresh", "half", APOLLO, f"{APOLLO}, never refreshed"),
    ):
        known = changed(changed(rows, base, [2.0] * 3, length), variant, [2.1] * 3, length)
        assert cells(TABLES[name](Study(known)), variant) == ["2.100 ± 0.000", "+5.00 ± 0.00, worse"]
        known = changed(known, variant, [2.0] * 3, length)
        assert cells(TABLES[name](Study(known)), variant)[1] == "the same losses"


def test_options_of_embeddings_are_compared_at_their_vocabulary(rows):
    """AdamW or plain Mini as the base; a base of another vocabulary or length."""
    (option,) = OPTIONS["by row"]
    size = next(row["state_bytes"] for row in rows if row["method"] == option)
    study = Study(rows)
    for vocabulary, length, factor in ((8192, "tenth", 1.004), (256, "fifth", 1.006)):
        base = study.runs(FAST_MINI, length, vocabulary)
        for row in rows:
            if (row["method"], row["vocabulary"]) == (option, vocabulary):
                row["held_out_loss"] = base[row["seed"]]["held_out_loss"] * factor
    shown = cells(TABLES["embeddings"](Study(rows)), "by row")
    assert (shown[0], shown[2]) == ("+0.60 ± 0.00 (6 seeds), no", "+0.40 ± 0.00 (6 seeds), yes")
    assert shown[4:] == [f"{size:,}"] * 3
    fewer = [row for row in rows if (row["method"], row["vocabulary"]) != (option, 256)]
    assert cells(TABLES["embeddings"](Study(fewer)), "by row")[3] == ""


def test_losses_of_other_text_are_refused(rows):
    other = row_of(Job(PEER, 0.5), 1.0) | {"text": {"fingerprint": "another"}}
    with pytest.raises(SystemExit, match="vocabulary 2048 have different texts, text 2048 and another"):
        Study([*rows, other])


def test_rows_of_another_model_are_another_study(rows):
    assert len(Study([*rows, row_of(Job(PEER, 0.5, model="60M"), 1.0)]).rows) == len(rows)


@pytest.mark.slow
def test_the_picture_has_what_was_compared(rows, tmp_path, monkeypatch):
    """Marks in colours of others, a method left out, labels cut off or on each other."""
    study = Study(rows, machine="a machine")
    figures = record_figures(monkeypatch)
    draw(study, tmp_path / "quality.png")
    (figure,) = figures.values()
    assert {ADAMW, *compared(study)} == {*TO_THE_END}
    names = set(map(label, TO_THE_END))
    assert len(names) == len(TO_THE_END)
    check_picture(figure, names)
    assert {text.get_text() for text in figure.axes[0].get_yticklabels()} == names


def test_the_page_has_the_committed_results():
    """Figures of older rows, or of rows that are gone."""
    study = Study.read(page.folder())
    for name, table in TABLES.items():
        assert page.part(name).read() == table(study).strip(), "run python -m bench.quality.page"
    assert page.part("picture").read() == page.pictured(study)


@pytest.mark.slow
def test_a_page_is_written_between_its_marks(rows, tmp_path):
    copy = tmp_path / "quality.md"
    copy.write_text(page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    page.write(Study([]), copy)
    assert not (tmp_path / "quality.png").exists()
    study = Study(rows)
    page.write(study, copy)
    assert (tmp_path / "quality.png").exists()
    assert page.part("main", copy).read() == TABLES["main"](study)
    outside = [line for line in page.PAGE.read_text().splitlines() if line.startswith("#")]
    assert [line for line in copy.read_text().splitlines() if line.startswith("#")] == outside
