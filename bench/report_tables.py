"""The report's tables of one machine. Each function returns Markdown, or "" if the machine has no such results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apollo_triton.tools.demo.corpus import VOCABULARY
from apollo_triton.tools.text import as_bytes

from .report_data import (
    Machine,
    baseline,
    by_variant,
    cases,
    curve,
    differences,
    mean_and_margin,
    of_tallest_matrices,
    pretrainings,
    share_of_roofline,
)
from .report_targets import MISSING
from .results_file import Row


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def milliseconds(value: float) -> str:
    """A time in milliseconds, with three digits.

    >>> milliseconds(0.01234), milliseconds(1234.5)
    ('0.0123', '1234')
    """
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def training_of(file: Row) -> str:
    settings = file["settings"]
    tokens = settings["steps"] * settings["batch"] * settings["sequence"]
    return f"LLaMA {settings['model']}, {tokens / 1e6:.2g} M tokens"


def difference(runs: dict[str, dict[int, Row]], variant: str) -> str:
    """The mean over seeds of a variant's loss minus its baseline's with the same seed, and its margin."""
    gaps = differences(runs, variant)
    if not gaps:
        return ""
    mean, margin = mean_and_margin(gaps)
    return f"{mean:+.3f}" + (f" ± {margin:.3f}" if margin is not None else " (one seed)")


def provenance(machine: Machine) -> str:
    """The memory of a machine, and the versions and commits of its figures. Files of docs/quality.md are left out: each
    of their rows has its own."""
    files = {name: file for name, file in machine.files.items() if "versions" in file}
    commits: dict[str, list[str]] = {}
    for name, file in files.items():
        commits.setdefault(f"{file.get('commit', 'unknown')} (source {file.get('source', 'unknown')})", []).append(name)
    file = next(iter(files.values()))
    versions = ", ".join(f"{name} {value}" for name, value in file["versions"].items() if value)
    memory = file["machine"].get("memory_GiB")
    parts = [f"{', '.join(names)} at {commit}" for commit, names in commits.items()]
    return f"{memory} GiB of memory; {versions}. Measured: {'; '.join(parts)}."


def whole_step(machine: Machine) -> str:
    """A table for each parameter set, with a row for each optimizer. Below it are those that could not run, and why."""
    parts = []
    for case, rows in cases(machine).items():
        if rows[0].get("curve"):
            continue
        measured = [row for row in rows if "ms" in row]
        columns = STEP_COLUMNS | (GPU_COLUMNS if machine.is_gpu else {})
        lines = [[row["contender"], *(cell(row) for cell in columns.values())] for row in measured]
        text = f"**{case}**"
        if measured:
            known = measured[0]
            text += (
                f": {known['parameters'] / 1e6:,.1f} M parameters, rank {known['rank']}, {known['rounds']} rounds; "
                f"a copy moves {known['copy_bandwidth'] / 1e9:,.3g} GB/s\n\n" + table(["optimizer", *columns], lines)
            )
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if "skipped" in row:
                reasons.setdefault(row["skipped"], []).append(row["contender"])
        parts += [text, *(f"{MISSING.capitalize()}: {'; '.join(names)}: {why}." for why, names in reasons.items())]
    if not parts:
        return f"### A whole step\n\n{MISSING}"
    return "\n\n".join(["### A whole step against its peers, one run, interleaved", *parts])


STEP_COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms (quartiles)": lambda row: "{1} ({0} to {2})".format(*map(milliseconds, row["ms"])),
    "times Mini": lambda row: ratio(row.get("times APOLLO-Mini")),
    "times APOLLO": lambda row: ratio(row.get("times APOLLO")),
    "extra memory": lambda row: as_bytes(max(0, row["extra_bytes"])),
    "state": lambda row: as_bytes(row["state_bytes"]),
    "bytes a parameter": lambda row: f"{row['bytes'] / row['parameters']:.1f}",
    "of the roofline": lambda row: f"{100 * share_of_roofline(row):.0f} %",
    "ms at a refresh": lambda row: milliseconds(row["refresh_ms"]) if row["refresh_ms"] else "",
}
GPU_COLUMNS: dict[str, Callable[[Row], str]] = {
    "launches": lambda row: str(row["launches"]),
    "ms on the host": lambda row: milliseconds(row["host_ms"]),
}


def growth(machine: Machine) -> str:
    """Milliseconds by parameters, rank and layers."""
    parts = []
    for name in ("parameters", "rank", "layers"):
        points = curve(machine, name)
        if points:
            along = sorted({x for measured in points.values() for x, _ in measured})
            labels = [f"{x / 1e6:.0f} M" if name == "parameters" else f"{x:g}" for x in along]
            rows = [[who, *(_at(measured, x) for x in along)] for who, measured in points.items()]
            parts.append(table([f"ms by {name}", *labels], rows))
    return "\n\n".join(parts)


def _at(points: list[tuple[float, float]], x: float) -> str:
    return next((milliseconds(ms) for at, ms in points if at == x), "")


def kernels(machine: Machine) -> str:
    """The verbs on one matrix of each size: microseconds, and the share of a copy's bandwidth."""
    rows = of_tallest_matrices(machine)
    if not rows:
        return ""
    ranks = sorted({row["rank"] for row in rows})
    parts = []
    for size, shape, dtype in dict.fromkeys((row["size"], tuple(row["shape"]), row["dtype"]) for row in rows):
        by_verb = {(row["verb"], row["rank"]): row for row in rows if (row["size"], row["dtype"]) == (size, dtype)}
        verbs = dict.fromkeys(verb for verb, _ in by_verb)
        lines = [[verb, *(_kernel_cell(by_verb.get((verb, rank))) for rank in ranks)] for verb in verbs]
        heads = [f"{size}, {shape[0]} x {shape[1]}, {dtype}", *(f"rank {rank}" for rank in ranks)]
        parts.append(table(heads, lines))
    about = "Median µs, and the share of a copy's bandwidth. Rank 1 is Mini. The results files have all shapes."
    return "\n\n".join(["### The verbs, one matrix", about, *parts])


def _kernel_cell(row: Row | None) -> str:
    return f"{milliseconds(row['us'][1])}, {100 * row['share_of_copy']:.0f} %" if row else MISSING


def training(machine: Machine) -> str:
    """Peak memory and speed of whole training steps."""
    rows = machine.rows("training")
    if not rows:
        return ""
    lines = []
    for row in rows:
        cells = [f"{row['size']} {row['method']}", as_bytes(row["counted_bytes"]) if "counted_bytes" in row else ""]
        if "skipped" in row:
            cells += [f"{MISSING}: {row['skipped']}", "", "", "", ""]
        else:
            times = f"{milliseconds(row['backward_ms'])} + {milliseconds(row['optimizer_ms'])}"
            cells += [as_bytes(row["peak_bytes"]), f"{row['tokens_per_second']:,.0f}", times]
            largest = "largest_batch" in row
            cells += [str(row["largest_batch"]), f"{row['largest_tokens_per_second']:,.0f}"] if largest else ["", ""]
        lines.append(cells)
    batches = {f"{file['settings']['batch']} x {file['settings']['sequence']}" for file in machine.of("training")}
    heads = ["", "weights, gradients, state (counted)", "peak", "tokens/s", "backward + optimizer, ms"]
    heads += ["largest batch under 80 GB", "tokens/s there"]
    about = f"Batch {' and '.join(sorted(batches))} tokens, no activation checkpointing."
    return "\n\n".join(["### Training steps from end to end", about, table(heads, lines)])


def no_gradient(machine: Machine) -> str:
    """A step of the linear weights of a decoder layer, by tokens: milliseconds, and peak above weights and state."""
    rows = machine.rows("no_gradient")
    measured = [row for row in rows if "ms" in row]
    if not measured:
        return ""
    parts = []
    for size, dtype in dict.fromkeys((row["size"], row["dtype"]) for row in measured):
        chosen = [row for row in measured if (row["size"], row["dtype"]) == (size, dtype)]
        by_tokens = {(row["contender"], row["tokens"]): row for row in chosen}
        tokens = sorted({count for _, count in by_tokens})
        names = dict.fromkeys(name for name, _ in by_tokens)
        # Files from before the host was measured have no such figure.
        has_host = machine.is_gpu and any("host_ms" in row for row in chosen)
        for head, cell in (NO_GRADIENT_CELLS | (NO_GRADIENT_HOST if has_host else {})).items():
            lines = [
                [name, *(cell(by_tokens[name, count]) if (name, count) in by_tokens else "" for count in tokens)]
                for name in names
            ]
            parts.append(table([f"{size}, {dtype}: {head}", *(f"T = {count:,}" for count in tokens)], lines))
    about = (
        "Forward, backward and update of the seven linear layers of one decoder layer, without attention and norms. "
        "Contenders take turns. The peak is that of activations, gradients and temporaries. APOLLO's rank is a quarter "
        "of the hidden size."
    )
    failed = dict.fromkeys(
        f"{row['size']} at {row['tokens']:,} tokens: {row['skipped']}" for row in rows if "ms" not in row
    )
    return "\n\n".join(
        ["### A step without gradients", about, *parts, *(f"{MISSING.capitalize()}: {reason}." for reason in failed)]
    )


NO_GRADIENT_CELLS: dict[str, Callable[[Row], str]] = {
    "ms (times AdamW's)": lambda row: f"{milliseconds(row['ms'][1])} ({row['times AdamW']:.2f})",
    "peak": lambda row: as_bytes(row["peak_bytes"]),
}
NO_GRADIENT_HOST: dict[str, Callable[[Row], str]] = {
    "ms on the host": lambda row: milliseconds(row["host_ms"]) if "host_ms" in row else "",
}


def pretraining(machine: Machine) -> str:
    """The losses of all variants, and their differences to AdamW's, seed by seed."""
    parts = []
    for file in pretrainings(machine):
        runs = by_variant(file["rows"])
        lines = []
        for variant, by_seed in runs.items():
            mean, margin = mean_and_margin([row["held_out_loss"] for row in by_seed.values()])
            row = next(iter(by_seed.values()))
            loss = f"{mean:.3f}" + (f" ± {margin:.3f}" if margin is not None else "")
            against = "" if baseline(variant) is None else difference(runs, variant) or MISSING
            cells = [
                variant,
                f"{row['learning_rate']:g}",
                str(len(by_seed)),
                loss,
                against,
                as_bytes(row["state_bytes"]),
            ]
            lines.append(cells)
        for row in file["rows"]:
            if "skipped" in row:
                lines.append([f"{row['variant']}, seed {row['seed']}", "", "", f"{MISSING}: {row['skipped']}", "", ""])
        settings = file["settings"]
        about = (
            f"{training_of(file)} of {settings['text']} ({settings['steps']} steps of {settings['batch']} x "
            f"{settings['sequence']}, {_tokens(settings)}, {settings['dtype']}). "
            "A seed decides weights, batches and projections, in the same way for all variants. ± is a 95 % confidence "
            "interval over seeds. The learning rates are those of a sweep with one seed for the small model, and the "
            "paper's for larger ones. The runs end far from convergence: they tell whether the variants train alike "
            "and which choices matter, not which variant is best."
        )
        heads = ["", "learning rate", "seeds", "held-out loss, nats a token"]
        heads += ["against AdamW (Q-: float weights), same seed", "state"]
        parts += [about, table(heads, lines)]
    return "\n\n".join(["### Quality", *parts]) if parts else ""


def _tokens(settings: Row) -> str:
    bytes_alone = settings["vocabulary"] == VOCABULARY
    return "a token a byte" if bytes_alone else f"byte-level BPE of {settings['vocabulary']}"


def host(machine: Machine) -> str:
    """What a step and one layer's update cost on the host, without the driver's launches, and what the import adds."""
    rows = machine.rows("host_overhead")
    if not rows:
        return ""
    parts = ["### Host"]
    for about, figures in HOST_FIGURES.items():
        chosen = [row for row in rows if next(iter(figures)) in row]
        known = [kind for kind in figures if any(kind in row for row in chosen)]
        lines = [[row["id"], *(_host_figure(row, kind) for kind in known)] for row in chosen]
        if lines:
            parts.append(table([about, *(figures[kind] for kind in known)], lines))
    found = machine.find("import_time", "import")
    if found:
        parts.append(f"`import apollo_triton` takes {found['ratio']:.2f} times as long as `import torch`.")
    return "\n\n".join(parts)


# Figures with their heads. Files from before launches were counted in lack some.
HOST_FIGURES = {
    "ms of a step on the host": {
        "stable_ms": "gradients stay",
        "moved_ms": "all move",
        "stable_launched_ms": "they stay, launches counted in",
        "moved_launched_ms": "all move, launches counted in",
        "launches": "launches",
    },
    "µs of a layer-wise update on the host": {
        "us": "without launches",
        "launched_us": "launches counted in",
        "launches": "launches",
    },
}


def _host_figure(row: Row, kind: str) -> str:
    return f"{row[kind]:.2f}" if kind.endswith("ms") else f"{row[kind]:.0f}"
