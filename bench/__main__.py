"""Run all benchmarks, stage after stage, and write the report.

    python -m bench                # what suits this machine
    python -m bench --gpu          # everything that needs a CUDA device: first the stages of bench.gpu_check
    python -m bench --only NAME    # stages whose names match a regular expression; --list names them

If a stage fails or takes too long, its error is printed, its rows so far are kept, and the next stage starts. A stage
that is started again measures only the missing rows. Rows of another version, machine or source do not count.
"""

from __future__ import annotations

import argparse
import re

import torch

from apollo_triton.tools.llama import named_sizes

from .gpu_check.stages import CHECKS
from .stage import DONE, GPU_SECONDS, Stage, run

COUNTED = [
    Stage("launches and bytes", "kernel_table", resumes=False),
    Stage("machine code", "codegen", resumes=False),
    Stage("communication", "communication", resumes=False),
    Stage("host", "host_overhead", resumes=False),
    Stage("import", "import_time", resumes=False),
]
CPU = [
    *COUNTED,
    Stage("whole step", "whole_step"),
    Stage("kernels", "kernels", ("-k", "60M or 350M")),
    Stage("training", "training"),
    Stage("no gradient", "no_gradient"),
    Stage("pre-training", "pretrain"),
]


def _gpu(name: str, module: str, *arguments: str) -> Stage:
    """A stage for a GPU, with a separate results file, so that no stage overwrites the rows of another."""
    file = f"{module}-{re.sub('[^A-Za-z0-9]+', '-', name.partition(', ')[2])}"
    return Stage(name, module, ("--name", file, *arguments), GPU_SECONDS)


def _quality(model: str, tokens_a_weight: float) -> Stage:
    """The study at a larger size. It goes on where it was; no run starts in a stage's last two minutes."""
    arguments = ("--model", model, "--batch", "512", "--tokens-a-weight", f"{tokens_a_weight:g}", "--seconds", "360")
    return Stage(f"quality, {model}", "quality", arguments, GPU_SECONDS, resumes=False)


# The paper's learning rate for APOLLO, and a usual one for AdamW. 33 million tokens.
PRETRAINING = (
    *("--model", "60M", "--sequence", "256", "--batch", "128", "--steps", "1000", "--dtype", "bfloat16"),
    *("--vocabulary", "32000", "--megabytes", "400", "--seeds", "2"),
    *("--lr", "AdamW=2e-3", "APOLLO=1e-2", "Mini=1e-2", "--variants"),
)
SHORT_GPU = [
    *(check for check in CHECKS if check.module == "whole_step"),
    _gpu("kernels, 7B", "kernels", "-k", "7B-"),
]
GPU = [
    *CHECKS,
    _gpu("kernels, 7B", "kernels", "-k", "7B-"),
    _gpu("whole step, small", "whole_step", "--cases", "(130M|350M) bfloat16|60M float32"),
    _gpu("whole step, 7B", "whole_step", "--cases", "7B bfloat16"),
    _gpu("whole step, by rank", "whole_step", "--cases", "7B .* rank .*"),
    _gpu("whole step, by layers", "whole_step", "--cases", "350M .* layers .*"),
    _gpu("no gradient, 7B", "no_gradient"),
    *(_gpu(f"training, {size}", "training", "--sizes", size) for size in ("1B", "13B")),
    *(_gpu(f"kernels, {size}", "kernels", "-k", f"{size}-") for size in named_sizes() if size != "7B"),
    _gpu("pre-training, AdamW and APOLLO", "pretrain", *PRETRAINING, "AdamW", "APOLLO"),
    _gpu("pre-training, Mini and apollo-torch", "pretrain", *PRETRAINING, "Mini", "apollo-torch"),
    _gpu("pre-training, variants", "pretrain", *PRETRAINING, "APOLLO, Rademacher", "Mini, a seed per matrix"),
    *(_quality(model, tokens) for model, tokens in {"60M": 1.0, "130M": 0.25, "350M": 0.05}.items()),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="everything that needs a CUDA device")
    parser.add_argument("--only", default=".*", metavar="PATTERN", help="stages whose names match")
    parser.add_argument("--list", action="store_true", help="the stages' names, and nothing else")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    suited = CPU
    if options.gpu:
        suited = GPU
    elif on_gpu:
        suited = COUNTED + SHORT_GPU
    stages = [stage for stage in suited if re.search(options.only, stage.name)]
    if not stages:
        raise SystemExit(f"--only {options.only!r}: no stage matches; see --list")
    if options.list:
        print("\n".join(stage.name for stage in stages))
        return 0
    if options.gpu and not on_gpu:
        raise SystemExit("--gpu: PyTorch sees no CUDA device here; python -m bench measures what a CPU can measure")
    failed = []
    try:
        failed = [stage.name for stage in stages if run(stage, options.fresh) != DONE]
    except KeyboardInterrupt:
        print("\nInterrupted. The rows so far are kept, and the same command continues from there.")
        failed = ["interrupted"]
    if run(Stage("report", "report", resumes=False), fresh=False) != DONE:
        failed.append("report")
    print(f"\nNot all went well: {', '.join(failed)}" if failed else "\nSee bench/REPORT.md")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
