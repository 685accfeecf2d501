"""The tables of docs/quality.md. A figure whose runs are missing is an empty cell, and a line below says what is."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from ..report_tables import table
from ..results_file import Row, folder_name
from .fine_tuning import table as tuned
from .methods import ADAMW, APOLLO, FAST_ADAMW, FAST_MINI, MINI, TUNED
from .plan import FAST_METHODS, SEEDS, TO_THE_END, VOCABULARIES, VOCABULARY
from .statistics import Difference, mean_and_margin, share_to_loss, together
from .study import Study
from .text import PACKAGES as TEXT
from .variants import FULL_VARIANTS, LIMITERS, OPTIONS, REFRESHES, VARIANTS

LIMIT = 0.5  # percent of a loss: what an option for embeddings and head may cost

Runs = tuple[str, str, int]  # method, length, vocabulary


def main(study: Study) -> str:
    """Methods and variants on all tokens, each at its best rate there."""
    lines = []
    for method in TO_THE_END:
        runs = study.runs(method)
        against = "" if method == ADAMW else _compared(study.difference(method, ADAMW))
        cells = [_rate(study.rate(method)), _losses(runs), against]
        cells += ["" if method == ADAMW else _tokens(study, method), _bytes(runs), _time(study, method)]
        lines.append([method, *cells])
    heads = ["best rate", "held-out loss", "against AdamW, %", "tokens to AdamW's loss", "state, bytes", "step time"]
    shown = _with_missing(study, heads, lines, [(method, "full", VOCABULARY) for method in TO_THE_END])
    without = [f"{name}: {row['skipped']}" for name, row in study.times.items() if "skipped" in row]
    if not study.times:
        without = ["`python -m bench.quality.step_time` measures them"]
    return "\n\n".join([shown, *([wrapped(f"Missing step times: {'; '.join(without)}.")] if without else [])])


def sweeps(study: Study) -> str:
    """All losses of each sweep, on a fifth and on all of the tokens; the lowest is bold."""
    heads = ["a worse rate on both sides", "rate: held-out loss"]
    made = [table(["", *heads], _sweeps(study, "fifth")), "On all tokens:", table(["", *heads], _sweeps(study, "full"))]
    return "\n\n".join(made)


def _sweeps(study: Study, length: str) -> list[list[str]]:
    lines = []
    for method in TUNED:
        found = study.sweep(method, length)
        if length == "full" and not found and method not in TO_THE_END:
            continue
        lowest = min(found.values(), default=math.inf)
        shown = [
            f"{rate:g}: {f'**{loss:.3f}**' if loss == lowest else f'{loss:.3f}' if math.isfinite(loss) else 'diverged'}"
            for rate, loss in found.items()
        ]
        end = study.sweep_end(method, length) if length == "fifth" or method in TO_THE_END else "not asked for"
        lines.append([method, end, ", ".join(shown)])
    return lines


def embeddings(study: Study) -> str:
    """Mini with other state of embeddings and head against Mini with AdamW's, at each vocabulary."""
    columns = [(length, vocabulary) for vocabulary, length in VOCABULARIES.items()]
    lines = [["AdamW's: held-out loss", *(_losses(study.runs(FAST_MINI, *column)) for column in columns)]]
    lines[0] += ["", *(_bytes(study.runs(FAST_MINI, *column)) for column in columns)]
    wanted = [(FAST_MINI, *column) for column in columns]
    for option in OPTIONS:
        method = study.best_of(option)
        found = [study.difference(method, FAST_MINI, *column) if method else None for column in columns]
        cells = [_within(each) for each in (*found, together(found))]
        cells += [_bytes(study.runs(method, *column)) if method else "" for column in columns]
        wanted += [(method, *column) for column in columns] if method else []
        lines.append([option, *cells])
    heads = [*(f"vocabulary {vocabulary}" for vocabulary in VOCABULARIES), "all together"]
    heads += [f"state at {vocabulary}, bytes" for vocabulary in VOCABULARIES]
    return _with_missing(study, heads, lines, wanted) + "\n\n" + _choices(study)


def _choices(study: Study) -> str:
    """How the variants were chosen that stand for an option."""
    lines = []
    for option, variants in OPTIONS.items():
        if len(variants) > 1:
            runs = {name: study.runs(name, "fifth").get(SEEDS[0]) for name in variants}
            shown = [f"{_short(name)} {_loss(row) if row else 'missing'}" for name, row in runs.items()]
            lines.append(wrapped(f"- {option}: {', '.join(shown)}."))
    return "\n".join([f"Chosen by the held-out loss with seed {SEEDS[0]} at vocabulary {VOCABULARY}:", "", *lines])


def _short(variant: str) -> str:
    return variant.removeprefix(f"{FAST_MINI}, ")


def rates(study: Study) -> str:
    """AdamW, APOLLO and Mini with one rate and with four times it for embeddings and head, each against AdamW with the
    same."""
    lines = []
    for plain, fast in zip((ADAMW, APOLLO, MINI), FAST_METHODS, strict=True):
        found = [study.difference(plain, ADAMW), study.difference(fast, FAST_ADAMW)]
        against = [""] * 3 if plain == ADAMW else [_compared(each) for each in (*found, together(found))]
        losses = [_losses(study.runs(method)) for method in (plain, fast)]
        lines.append([plain, losses[0], against[0], losses[1], *against[1:], _compared(study.difference(fast, plain))])
    heads = ["one rate: loss", "against AdamW, %", "embeddings x4: loss", "against AdamW with it, %"]
    heads += ["both together, %", "x4 against one rate, %"]
    wanted = (ADAMW, APOLLO, MINI, *FAST_METHODS)
    return _with_missing(study, heads, lines, [(each, "full", VOCABULARY) for each in wanted])


def variants(study: Study) -> str:
    """Variants on all tokens against what they vary."""
    return _variants(study, FULL_VARIANTS, "full")


def limiter(study: Study) -> str:
    """Other limiters against the default one, a fifth of the tokens."""
    return _variants(study, LIMITERS, "fifth")


def refresh(study: Study) -> str:
    """Other refreshes of the projection against one every 200 steps, half of the tokens."""
    return _variants(study, REFRESHES, "half")


def _variants(study: Study, variants: Iterable[str], length: str) -> str:
    lines: list[list[str]] = []
    wanted: list[Runs] = []
    for variant in variants:
        base = VARIANTS[variant].base
        if (base, length, VOCABULARY) not in wanted:
            wanted.append((base, length, VOCABULARY))
            lines.append([base, _losses(study.runs(base, length)), ""])
        wanted.append((variant, length, VOCABULARY))
        runs = study.runs(variant, length)
        lines.append([variant, _losses(runs), _compared(study.difference(variant, base, length))])
    return _with_missing(study, ["held-out loss", "against what it varies, %"], lines, wanted)


def fine_tuning(study: Study) -> str:
    """Fine-tuning of the study's model on C++."""
    rows = [row for row in study.tunings if row["model"] == study.template.model]
    return tuned(rows) if rows else "Missing: `python -m bench.quality.fine_tuning` measures it."


def measured(study: Study) -> str:
    """What the rows were measured with."""
    if not study.rows:
        return "No run has ended yet."
    versions = {f"{name} {version}" for row in study.rows for name, version in row["versions"].items() if version}
    texts = {f"{row['text']['fingerprint']} at {row['vocabulary']}" for row in study.rows}
    packages = {f"{name} {row['text'][name]}" for row in study.rows for name in TEXT if row["text"].get(name)}
    lines = {
        "Versions": versions,
        "Packages that are the text": packages,
        "Fingerprints of the text, by vocabulary": texts,
        "Commits": {row["commit"] for row in study.rows},
        "Fingerprints of the package's source": {row["source"] for row in study.rows},
    }
    listed = [wrapped(f"- {name}: {', '.join(sorted(found))}.") for name, found in lines.items()]
    path = f"../bench/results/{folder_name({'name': study.machine})}/quality.json"
    ran = f"{len(study.rows):,} runs ([rows]({path})), on {study.machine}."
    return "\n".join([wrapped(ran), "", *listed])


TABLES: dict[str, Callable[[Study], str]] = {
    "rates": rates,
    "main": main,
    "variants": variants,
    "sweeps": sweeps,
    "embeddings": embeddings,
    "limiter": limiter,
    "refresh": refresh,
    "fine-tuning": fine_tuning,
    "measured": measured,
}


def _with_missing(study: Study, heads: Sequence[str], lines: Sequence[Sequence[str]], wanted: Iterable[Runs]) -> str:
    """The table, and below it whose runs it lacks, and how many of each."""
    unfinished: dict[str, None] = {}
    lacking: dict[str, int] = {}
    for method, length, vocabulary in wanted:
        if study.rate(method, length) is None:
            unfinished[VARIANTS[method].base] = None
        elif missing := study.missing(method, length, vocabulary):
            lacking[method] = lacking.get(method, 0) + missing
    notes = [f"Missing: the end of the sweep of {'; '.join(unfinished)}."] if unfinished else []
    if lacking:
        listed = "; ".join(f"{method} ({count})" for method, count in lacking.items())
        notes.append(f"Missing runs: {sum(lacking.values())}, of {listed}.")
    return "\n\n".join([table(["", *heads], lines), *map(wrapped, notes)])


def wrapped(text: str) -> str:
    """Lines as the page's others are, which are read as text too."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _loss(row: Row) -> str:
    return "diverged" if row["held_out_loss"] is None else f"{row['held_out_loss']:.3f}"


def _losses(runs: dict[int, Row]) -> str:
    """The mean loss and the half-width of its interval."""
    losses = [row["held_out_loss"] for row in runs.values()]
    if not losses:
        return ""
    if diverged := [seed for seed, row in runs.items() if row["held_out_loss"] is None]:
        return f"diverged with seed {', '.join(map(str, diverged))}"
    mean, margin = mean_and_margin(losses)
    return f"{mean:.3f}{'' if margin is None else f' ± {margin:.3f}'}{_of_seeds(len(losses))}"


def _compared(found: Difference | None) -> str:
    """A difference and its verdict. One seed has no interval, and so no verdict."""
    if found is None:
        return ""
    if not any(found.percents):
        return f"the same losses{_of_seeds(found.seeds)}"
    return _percent(found) + ("" if found.seeds == 1 else f", {found.verdict}")


def _within(found: Difference | None) -> str:
    """A difference, and whether it is within the limit."""
    if found is None:
        return ""
    return _percent(found) + ("" if found.seeds == 1 else f", {found.at_most(LIMIT)}")


def _percent(found: Difference) -> str:
    margin = "" if math.isinf(found.margin) else f" ± {found.margin:.2f}"
    return f"{found.mean:+.2f}{margin}{_of_seeds(found.seeds)}"


def _of_seeds(count: int) -> str:
    return "" if count == len(SEEDS) else f" ({count} seed{'s' if count > 1 else ''})"


def _tokens(study: Study, method: str) -> str:
    """The share of its tokens after which a method had AdamW's last loss of the same seed, the mean over seeds."""
    runs, targets = study.runs(method), study.runs(ADAMW)
    seeds = [seed for seed in runs if seed in targets and targets[seed]["held_out_loss"] is not None]
    shares = [share_to_loss(runs[seed], targets[seed]) for seed in seeds]
    reached = [share for share in shares if share is not None]
    if not seeds:
        return ""
    if not reached:
        return f"not reached{_of_seeds(len(seeds))}"
    if len(reached) < len(seeds):
        return f"not reached by {len(seeds) - len(reached)} of {len(seeds)} seeds"
    return f"{100 * sum(reached) / len(reached):.0f} %{_of_seeds(len(seeds))}"


def _bytes(runs: dict[int, Row]) -> str:
    """The exact size of the state, which no seed changes."""
    sizes = {row["state_bytes"] for row in runs.values()}
    return " or ".join(f"{size:,}" for size in sorted(sizes))


def _time(study: Study, method: str) -> str:
    row = study.times.get(method, {})
    return f"{row['times AdamW']:.2f}" if "times AdamW" in row else ""


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:g}"
