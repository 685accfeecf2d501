"""What the report says about all machines together: summary, counted figures, the paper's figures, and the method."""

from __future__ import annotations

from collections.abc import Sequence

from apollo_triton.tools.llama import paper_figures
from apollo_triton.tools.text import as_bytes

from .contenders import OURS
from .report_data import Machine, by_variant, cases, paper, pretrainings
from .report_tables import difference, milliseconds, table, training_of
from .report_targets import LARGE, MISSING, SMALL
from .results_file import Row

WHETHER = """Switch from AdamW if its memory limits you. Your learning rate may stay
([Options](../docs/options.md#learning-rate)); the losses above are at the paper's scales, each with its own rate.
Whether they hold for your model is quickly tried: it takes one line. Do not switch for speed if the table has no figure
of a machine like yours."""

METHOD = """## How

- **A step**: each contender runs once a round. The order rotates, and caches are emptied before each run. Times are
  medians over rounds, and ratios are medians of the ratio within a round. All contenders update the same weights with
  the same gradients. A GPU is timed by CUDA events.
- **Extra memory**: the peak of a step above weights, gradients and state. It has temporaries, and buffers that are kept
  beside the state.
- **Bytes a parameter**: the least that a step must move. Weights and state are read and written, gradients are read
  (twice by APOLLO, whose factors depend on the whole gradient), and a stored projection is read.
- **Of the roofline**: the time that these bytes take at the bandwidth of a copy, measured in the same run, divided by
  the time of the step. A CPU's copy also reads what it overwrites. That is not counted, so that a step that updates in
  place can pass 100 %.
- **A refresh** is a step that makes a new projection, once in 200 steps.
- **A peer** is the latest release of its own package, with its default settings. If it could not run, the report says
  why."""


def summary(counted: Machine, machines: Sequence[Machine]) -> str:
    """The main figures: memory, speed, loss."""
    rows = []
    trained = [row for machine in machines for row in machine.rows("training") if "counted_bytes" in row]
    seven = {row["method"]: row["counted_bytes"] for row in trained if row["size"] == "7B"}
    if seven:
        figures = [f"{method} {as_bytes(count)}" for method, count in seven.items()]
        rows.append(["Memory of LLaMA-7B, bfloat16: weights, gradients, state", ", ".join(figures), "counted"])
    step = counted.find("launches", "APOLLO-Mini: a step")
    if step:
        text = f"Mini {step['all']:.2f} bytes a parameter in {step['launches']} launches; by arithmetic AdamW 14, SGD 6"
        rows.append(["Traffic of a step, all in bfloat16 (AdamW's moments too)", text, "counted"])
    for machine in machines:
        case = LARGE if machine.is_gpu else SMALL
        timed = {row["contender"]: row for row in cases(machine).get(case, []) if "ms" in row}
        peers = [name for name in ("PyTorch SGD, fused", "PyTorch AdamW, fused", "apollo-torch, Mini") if name in timed]
        if OURS[0] in timed and peers:
            figures = [f"{name} {milliseconds(timed[name]['ms'][1])}" for name in (OURS[0], *peers)]
            rows.append([f"Milliseconds of a step, {case}", ", ".join(figures), machine.name])
    if not any(machine.is_gpu for machine in machines):
        rows.append(["Speed on a GPU", MISSING, "no GPU has run this yet"])
    for machine in machines:
        for file in pretrainings(machine):
            for what, variants in (
                ("against AdamW", ("APOLLO", "Mini", "apollo-torch")),
                ("of int8 weights against float ones", ("Q-APOLLO", "Q-Mini", "Q-Mini, to the nearest")),
            ):
                if found := _verdict(file, variants):
                    rows.append([f"Held-out loss {what}, {training_of(file)}", found, machine.name])
    return "\n\n".join(["## In a minute", table(["", "", "on"], rows), WHETHER])


def _verdict(file: Row, variants: Sequence[str]) -> str:
    runs = by_variant(file["rows"])
    return "; ".join(f"{variant} {figure}" for variant in variants if (figure := difference(runs, variant)))


def launches(rows: Sequence[Row]) -> str:
    """The launches of a step, each with the bytes per parameter that it loads and stores."""
    heads = [
        "",
        "launches",
        "gradient read",
        "weight read + written",
        "moments read + written",
        "projection",
        "all else",
    ]
    lines = []
    for row in rows:
        if row["kernel"] == "a step":
            cells = [f"{row['method']}: a step", str(row["launches"]), "", "", "", "", f"**{row['all']:.2f} in all**"]
        else:
            cells = [
                f"{row['method']}: `{row['kernel']}`",
                str(row["launches"]),
                _bytes(row, "gradient read"),
                _bytes(row, "weight read", "weight written"),
                _bytes(row, "moments read", "moments written"),
                _bytes(row, "projection read"),
                _bytes(row, "all else"),
            ]
        lines.append(cells)
    return table(heads, lines)


def _bytes(row: Row, *names: str) -> str:
    return " + ".join(f"{row[name]:.2f}" for name in names if name in row)


def counted(machine: Machine) -> str:
    """The figures that are counted, not timed."""
    parts = ["## Counted, the same everywhere"]
    if rows := machine.rows("launches"):
        about = (
            "Distinct bytes per parameter, by the tests' recorder: bfloat16, matrices of 512 x 384 and 384 x 512; "
            "dense ones, parts of embeddings, of 512 x 512 and 64 x 4096."
        )
        parts += [about, launches(rows)]
    if rows := machine.rows("codegen"):
        lines = []
        for target in dict.fromkeys(row["target"] for row in rows):
            compiled = [row for row in rows if row["target"] == target and "error" not in row]
            failed = sum(row["target"] == target for row in rows) - len(compiled)
            stack = max(compiled, key=lambda row: row["stack"], default={"stack": 0})
            largest = f"{stack['stack']} ({stack['kernel']} {stack['what']})" if stack["stack"] else "0"
            written = sum(row.get("hazards", 0) for row in compiled)
            cells = [target, f"{len(compiled)} of {len(compiled) + failed}", largest, str(written)]
            lines.append([*cells, ", ".join(sorted({row["kernel"] for row in compiled if row["float64"]})) or "none"])
        heads = ["compiled for", "kernels", "largest stack, bytes a thread"]
        heads += ["writes under a product in flight", "float64 in"]
        parts += [
            table(heads, lines),
            "[Every kernel](results/every-machine/codegen.txt): instructions, registers, widths.",
        ]
    if rows := machine.rows("tritons"):
        lines = [[row["triton"], row["target"], *(str(len(row[name])) for name in _OF_TRITONS)] for row in rows]
        heads = ["triton", "compiled for", *_OF_TRITONS.values()]
        parts += ["Every sketch by a product, compiled by each Triton:", table(heads, lines)]
    return "\n\n".join(parts if len(parts) > 1 else [*parts, MISSING])


_OF_TRITONS = {"compiled": "sketches", "failed": "not compiled"}
_OF_TRITONS |= {
    "hazards": "that write under a product in flight",
    "slots": "with fewer slots than their stages ask for",
}


def published() -> str:
    """The paper's tables, for comparison."""
    tables = paper()
    steps = tables["optimizer_step_seconds_one_A100"]
    parts = ["## Published (arXiv 2412.05270), not measured here"]
    heads = ["seconds of an optimizer step, one A100", *steps["7B"]]
    parts.append(table(heads, [[size, *(f"{seconds:.3f}" for seconds in row.values())] for size, row in steps.items()]))
    c4 = paper_figures()["pretrain_c4_perplexity"]
    heads = ["perplexity on C4 (GB of weights and states)", *c4["AdamW"]]
    parts.append(table(heads, [[name, *(f"{p:.2f} ({g:.2f})" for p, g in row.values())] for name, row in c4.items()]))
    int8 = tables["int8_weights_group128_perplexity"]
    heads = ["perplexity with int8 weights, groups of 128 (GB)", *int8["Q-APOLLO"]]
    cells = [(name, [f"{p:.2f}" + (f" ({g:.2f})" if g else "") for p, g in row.values()]) for name, row in int8.items()]
    parts.append(table(heads, [[name, *figures] for name, figures in cells]))
    seven = tables["pretrain_7b_perplexity_at_steps"]
    heads = ["perplexity of 7B after steps", *(f"{step:,}" for step in seven["steps"])]
    rows = [[name, *map(str, values)] for name, values in seven.items() if name != "steps"]
    parts.append(table(heads, rows))
    parts.append("\n".join(f"- {name.replace('_', ' ')}: {claim}" for name, claim in tables["system_claims"].items()))
    return "\n\n".join(parts)
