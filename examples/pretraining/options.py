"""The options of ``pretrain_c4.py``: those of a config, those of the command line, and which go together."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from apollo_triton.core.messages import shown
from apollo_triton.tools.llama import named_sizes, paper_figures

CONFIGS = Path(__file__).parent / "configs"
METHODS = ("apollo", "mini", "q-apollo", "q-mini", "adamw")
ADAMW_LEARNING_RATE = 1e-3  # a usual rate: the paper's tables do not say theirs
C4 = "allenai/c4"
LOGS = ("tensorboard", "wandb")


def parse_options(description: str | None) -> argparse.Namespace:
    """The config's options, overridden by those of the command line. Wrong options end the program with an error."""
    parser = make_parser(description)
    typed = make_parser(description)
    typed.set_defaults(**dict.fromkeys(vars(typed.parse_args())))
    given = typed.parse_args()  # None for what is not on the command line
    options = parser.parse_args([*config_as_arguments(parser, given.config), *sys.argv[1:]])
    if options.method == "adamw" and given.lr is None:
        options.lr = ADAMW_LEARNING_RATE
    options.folder = options.folder or Path("runs") / f"{Path(given.config).stem}-{options.method}"
    options.dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if options.data == C4 and options.data_config is None:
        options.data_config = "en"
    check(parser, options)
    check_effects(parser, options, given)
    return options


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--config", required=True, help=f"{', '.join(known_configs())}; or a JSON file of these options")
    add("--method", choices=METHODS, default="apollo", help="q- has int8 weights (%(default)s)")
    add("--parallel", choices=("none", "ddp", "fsdp"), default="none", help="under torchrun (%(default)s)")
    add("--folder", type=Path, help="the run's folder, with its checkpoint (runs/CONFIG-METHOD)")
    add("--data", default=C4, help="a data set of the Hugging Face hub, a file or a folder (%(default)s)")
    add("--data-config", help="config of a data set of the hub (en for allenai/c4)")
    add("--text-column", default="text", help="column of the data that holds the text (%(default)s)")
    add("--validation", help="data to evaluate on (the data's validation split, else documents that are held out)")
    add("--held-out", type=share, default=0.05, help="share of documents that are held out (%(default)s)")
    add("--tokenizer", default="t5-base", help="of the hub, a folder, or bytes: each byte a token (%(default)s)")
    add("--vocabulary", type=positive, default=32000, help="how many tokens the model knows (%(default)s)")
    add("--model", choices=named_sizes(), required=False, help="size of the paper's LLaMA")
    add("--layers", type=positive, help="fewer layers, for a trial")
    add("--shrink", type=positive, default=1, help="divide widths, heads and rank by this, for a trial (%(default)s)")
    add("--rank", type=positive, default=256, help="APOLLO's rank (%(default)s)")
    add("--lr", type=not_negative, help=f"peak learning rate (the config's; {ADAMW_LEARNING_RATE:g} for adamw)")
    add("--update-proj-gap", type=positive, default=200, help="steps between new projections (%(default)s)")
    add("--steps", type=positive, help="of the whole schedule")
    add("--until", type=positive, help="stop after this step of the schedule")
    add("--sequence", type=at_least_2, default=256, help="tokens in a sequence (%(default)s)")
    add("--tokens-per-step", type=positive, default=131072, help="tokens per step over all ranks (%(default)s)")
    add("--micro-batch", type=positive, default=16, help="sequences through the model at once (%(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the weights (bfloat16 on CUDA, float32 on a CPU)")
    add("--stochastic-rounding", action=switch, default=False, help="of bfloat16 weights")
    add("--state-bits", type=int, choices=(8, 32), default=32, help="of the moments (%(default)s)")
    add(
        "--gradients",
        choices=("kept", "freed", "none"),
        default="kept",
        help="freed: each weight is updated during the backward pass, and its gradient is freed; "
        "none: besides, gradients of linear layers are never made",
    )
    add("--checkpoint-activations", action=switch, default=False, help="less memory, more work")
    add("--cap", type=not_negative, help="GB that a CUDA device may use; prints the predicted and the measured peak")
    add("--evaluate-every", type=at_least_0, default=1000, help="steps between evaluations; 0: never (%(default)s)")
    add("--validation-tokens", type=positive, default=10_000_000, help="most tokens to evaluate on (%(default)s)")
    add("--save-every", type=positive, default=1000, help="steps between checkpoints (%(default)s)")
    add("--report", type=positive, default=10, help="steps between printed lines (%(default)s)")
    add("--log", type=installed, choices=LOGS, help="where else to log")
    add("--seed", type=seed, default=0, help="of weights and projections (%(default)s)")
    return parser


def number(kind: type, allowed: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """A parser for ``type=`` of an option. It refuses a number for which ``holds`` is false."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{allowed} is needed, not {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse: "invalid int value"
    return parse


at_least_0 = number(int, "at least 0", lambda value: value >= 0)
positive = number(int, "at least 1", lambda value: value >= 1)
at_least_2 = number(int, "at least 2", lambda value: value >= 2)  # a sequence of one token has no next token to predict
seed = number(int, "0 to 2**32 - 1", lambda value: 0 <= value < 2**32)
not_negative = number(float, "a finite number, 0 or more,", lambda value: 0 <= value < math.inf)
above_0 = number(float, "a finite number above 0", lambda value: 0 < value < math.inf)
share = number(float, "a number above 0 and below 1", lambda value: 0 < value < 1)


def installed(log: str) -> str:
    """A parser for ``type=`` of ``--log``, which refuses a logger that is not installed."""
    if log in LOGS and importlib.util.find_spec(log) is None:
        raise argparse.ArgumentTypeError(f"{log} is not installed; pip install {log}, or leave --log out")
    return log


def known_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def config_as_arguments(parser: argparse.ArgumentParser, name: str) -> list[str]:
    """The options of a config, written as on a command line, so that they are checked in the same way."""
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        parser.error(f"--config {name}: there is no such config (known: {', '.join(known_configs())}; or FILE.json)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        parser.error(f"--config {name}: not JSON: {error}")
    if not isinstance(config, dict):
        parser.error(f"--config {name}: it must be a JSON object of options, not {shown(config)}")
    arguments = []
    for key, value in config.items():
        option = f"--{key.replace('_', '-')}"
        if value is True or value is False:
            option = option if value else f"--no-{option[2:]}"
        if option not in parser._option_string_actions:
            parser.error(f"--config {name}: there is no option {shown(key)}")
        arguments += [option] if isinstance(value, bool) else [option, str(value)]
    return arguments


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with an error if an option is missing, or if two do not go together."""
    if options.model is None or options.lr is None:
        parser.error("--model and --lr are needed, here or in the config")
    if options.steps is None:
        parser.error(f"--steps is needed: the paper gives no number of steps for {options.model}")
    ranks = int(os.environ.get("WORLD_SIZE", 0))  # torchrun's
    if options.parallel != "none" and not ranks:
        parser.error(
            f"--parallel {options.parallel} runs under torchrun: torchrun --nproc-per-node 2 {sys.argv[0]} ..."
        )
    if options.parallel == "none" and ranks > 1:
        parser.error(f"torchrun has started {ranks} processes; use --parallel ddp or --parallel fsdp")
    plain, in_backward = options.method == "adamw", options.gradients != "kept"
    accumulates = options.tokens_per_step != options.micro_batch * options.sequence
    shape = paper_figures()["llama"][options.model]
    hidden, heads = shape["hidden"] // options.shrink, max(1, shape["heads"] // options.shrink)
    one_card = options.method == "q-mini" and options.gradients == "none" and options.state_bits == 8
    refused = {
        f"--shrink {options.shrink} does not leave {options.model} heads of one even width; use one of "
        f"{[divisor for divisor in range(1, shape['heads'] + 1) if shape['heads'] % divisor == 0]}": (
            not hidden or hidden % (2 * heads) != 0
        ),
        f"--rank {options.rank} is above the width of {options.model}, {shape['hidden']}; use at most that": (
            options.method.endswith("apollo") and options.rank > shape["hidden"]
        ),
        f"--gradients {options.gradients} with --parallel ddp: weights would move before the ranks' gradients are "
        "averaged; use --parallel fsdp --gradients freed": in_backward and options.parallel == "ddp",
        "--gradients none with --parallel fsdp: the sum over the ranks needs a gradient; use --gradients freed": (
            options.gradients == "none" and options.parallel == "fsdp"
        ),
        "--gradients none updates in every backward pass: --tokens-per-step must be --micro-batch x --sequence": (
            options.gradients == "none" and accumulates
        ),
        "--method adamw is torch.optim.AdamW, without --gradients, --state-bits 8 and --stochastic-rounding": (
            plain and (in_backward or options.state_bits == 8 or options.stochastic_rounding)
        ),
        "--cap counts one recipe, --method q-mini --gradients none --state-bits 8 --checkpoint-activations": bool(
            options.cap and not (one_card and options.checkpoint_activations)
        ),
    }
    for reason, holds in refused.items():
        if holds:
            parser.error(reason)


def check_effects(parser: argparse.ArgumentParser, options: argparse.Namespace, given: argparse.Namespace) -> None:
    """Ends the program with an error if an option of the command line would be ignored."""
    is_plain, is_low_rank = options.method == "adamw", options.method.endswith("apollo")
    ignored = {
        "rank": (not is_low_rank, f"--method {options.method}" + ("" if is_plain else ", whose rank is 1")),
        "update_proj_gap": (is_plain, "--method adamw, which projects nothing"),
        "data_config": (Path(options.data).exists(), "a file or a folder, which has no config"),
        "held_out": (options.validation is not None, "--validation, which is evaluated on instead"),
        "stochastic_rounding": (
            given.dtype == "float32" and not is_plain,
            "--dtype float32, whose weights are not rounded",
        ),
    }
    for name, (has_no_effect, beside) in ignored.items():
        if has_no_effect and (typed := getattr(given, name)):
            value = "" if typed is True else f" {typed}"
            parser.error(f"--{name.replace('_', '-')}{value} has no effect with {beside}; leave it out")
