"""What each subcommand of ``apollo-triton`` takes. Nothing here imports torch, so ``--help`` and errors come at once.

A function's docstring is the subcommand's summary.
"""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

# Of ``demo``: what every method is trained with.
STEPS, BATCH, SEQUENCE, LEARNING_RATE = 600, 8, 128, 3e-3
# Names that modules which import torch define. A test compares them.
LLAMA_SIZES = "60M", "130M", "350M", "1B", "7B", "13B"
LARGER_SIZES = "33B", "70B", "405B"
DEMO_SIZES = ("tiny", "0.3M", "1M", *LLAMA_SIZES)
DEMO_METHODS = "adamw", "apollo", "mini"
EMBEDDINGS = "8bit", "rows", "rows-8bit"


def convert(parser: ArgumentParser) -> None:
    """Rewrite a checkpoint of apollo-torch, a file or a Trainer's folder, as one that this package loads."""
    add = parser.add_argument
    add("old", type=Path, metavar="OLD", help="the file of optimizer.state_dict(), or the Trainer's checkpoint-N")
    add("new", type=Path, metavar="NEW", help="the path to write to, where nothing is yet; OLD stays as it is")


def demo(parser: ArgumentParser) -> None:
    """Train a small LLaMA with AdamW, APOLLO and APOLLO-Mini and compare them: three minutes on two free CPU cores."""
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="a file, or a folder of text files, to train on")
    add("--model", default="1M", metavar="SIZE", help=f"{', '.join(DEMO_SIZES)} (1M)")
    add("--methods", default=",".join(DEMO_METHODS), metavar="NAMES", help="which, and in what order (all)")
    add("--lr", type=float, default=LEARNING_RATE, metavar="X", help="peak learning rate of every method (%(default)g)")
    add("--scale", default="auto", metavar="X", help="of APOLLO and Mini: a number, or auto (%(default)s)")
    add("--steps", type=int, default=STEPS, metavar="N", help="of each method (%(default)s)")
    add("--batch", type=int, default=BATCH, metavar="N", help="sequences a step (%(default)s)")
    add("--sequence", type=int, default=SEQUENCE, metavar="N", help="bytes in each (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, batches and projections")
    add(
        "--gradients",
        default="stored",
        metavar="KIND",
        help="of APOLLO and Mini: stored, freed or none, in backward (%(default)s)",
    )
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda or auto (%(default)s)")
    add("--out", type=Path, default="runs/demo", metavar="FOLDER", help="for results (%(default)s)")
    add("--resume", action="store_true", help="continue the run that --out holds")


def env(parser: ArgumentParser) -> None:
    """The versions, devices and settings that a report of a bug needs, in Markdown."""
    parser.add_argument("--json", action="store_true", help="the same as a JSON object")


def memory(parser: ArgumentParser) -> None:
    """Count the exact bytes of weights, gradients and optimizer state, with AdamW, AdamW-8bit and APOLLO."""
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        metavar="MODEL",
        help=f"{', '.join(LLAMA_SIZES)} (the paper's LLaMA), {', '.join(LARGER_SIZES)}, "
        "a config.json, a directory that holds one, or a Hugging "
        "Face hub id: exact bytes of each (default: the totals of the named sizes). The word --model may be left out.",
    )
    add("--paper", action="store_true", help="the paper's memory column beside exact counts")
    add(
        "--rank",
        type=int,
        help="of APOLLO (default: of the named sizes the paper's; else a quarter of the width, at most 256)",
    )
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights (default: bfloat16)")
    add("--state-dtype", choices=["float32", "bfloat16"], help="of APOLLO's moments (default: float32)")
    add(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="which modules are low-rank: substrings or regular expressions, all-linear, or auto (the default)",
    )
    add(
        "--embeddings",
        choices=EMBEDDINGS,
        help="how APOLLO keeps the state of embeddings and head, as APOLLOAdamW(embeddings=...) (default: AdamW's)",
    )
    add(
        "--single-card",
        action="store_true",
        help="activations included, part by part, what the recipe 7b_one_card takes (default model: 7B)",
    )
    add(
        "--gpus",
        type=int,
        metavar="N",
        help="activations included, part by part, what each of N cards takes, and what a step sends (default model: "
        "7B). APOLLO-Mini, or APOLLO with --rank. Takes 10 to 30 seconds a model",
    )
    add("--json", action="store_true", help="print JSON, all sizes in bytes")
    add = parser.add_argument_group("options of --gpus").add_argument
    add("--shard", choices=["fsdp2", "hsdp", "tp"], help="how (default: fsdp2; hsdp has two replicas)")
    add("--layerwise", action="store_true", help="attach_layerwise: each module's gradients are used and freed")
    add("--int8", action="store_true", help="quantize_model: int8 weights")
    add("--group-size", type=int, metavar="N", help="of int8 weights (default: 128)")
    add("--state-bits", type=int, choices=[8, 32], help="of the moments (default: 32)")
    add("--tokens", type=int, metavar="N", help="of each card's sequence (default: 2048)")
    add("--checkpointing", action="store_true", help="activation checkpointing of the decoder layers")
    add = parser.add_argument_group("options of --single-card").add_argument
    add("--batch", type=int, help="sequences a step (default: 1)")
    add("--sequence", type=int, help="tokens a sequence (default: 256)")


def validate(parser: ArgumentParser) -> None:
    """Check the Triton kernels and the reference backend against float64, on a GPU or in Triton's interpreter."""
    add = parser.add_argument
    add(
        "--full", action="store_true", help="the product of shapes, dtypes, ranks and options: hours in the interpreter"
    )
    add("--device", help="cuda, cuda:1, xpu, ..., or cpu for Triton's interpreter (default: a GPU if there is one)")
    add("--seed", type=int, default=0, help="of the weights, gradients and projections (default: 0)")
