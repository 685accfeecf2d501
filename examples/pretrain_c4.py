"""Pre-train the paper's LLaMA models on C4 as the paper does, or on your own text (docs/recipes.md).

Needs the extra ``recipes``, and ``int8`` for 8-bit moments.

    python examples/pretrain_c4.py --config 60m --method apollo
    torchrun --standalone --nproc-per-node 8 examples/pretrain_c4.py --config 1b --method mini --parallel ddp
    python examples/pretrain_c4.py --config 7b_one_card               # on one GPU: 12 GB are enough
    python examples/pretrain_c4.py --config 60m --data notes --tokenizer bytes --layers 1 --shrink 8   # on a CPU

The same command, given again, continues from the newest checkpoint of its folder, with the same results bit for bit.
Ctrl-C and SIGTERM save a checkpoint before the program ends.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from pretraining import checkpoints, data
from pretraining.model import Trained, llama_config
from pretraining.options import parse_options
from pretraining.reports import Reports

from apollo_triton.tools.environment import machine_name
from apollo_triton.tools.memory import single_card

GB = 1e9


class Ranks:
    """The index of this rank, how many ranks there are, and values that they agree on without waiting for the GPU."""

    def __init__(self, parallel: str, on_cuda: bool) -> None:
        self.index, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.group = None
        if parallel != "none":
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
            self.group = dist.new_group(backend="gloo")

    def agree(self, value: float, how: dist.ReduceOp.RedOpType) -> float:
        """The value of all ranks together: their sum, least or greatest, as ``how`` says."""
        if self.group is None:
            return value
        all_values = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(all_values, how, group=self.group)
        return all_values.item()

    def mean(self, value: float) -> float:
        return self.agree(value, dist.ReduceOp.SUM) / self.count


def main() -> None:
    options = parse_options(__doc__)
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if options.cap:
            total = torch.cuda.get_device_properties("cuda").total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * GB / total))
    ranks = Ranks(options.parallel, on_cuda)
    train(options, ranks, torch.device("cuda" if on_cuda else "cpu"))
    if dist.is_initialized():
        dist.destroy_process_group()  # not after an error: it would wait for the other ranks


def train(options: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
    sequences, micro_batch = shares(options, ranks.count)
    training, validation = data.open_data(options, ranks.index, ranks.count)
    if ranks.index == 0:
        checkpoints.begin(options.folder, checkpoints.settings_of(options, ranks.count))
        checkpoints.write_config(options.folder, llama_config(options))
    ranks.agree(0, dist.ReduceOp.MAX)  # waits until rank 0 has written the config
    predicted = predict(options, micro_batch) if ranks.index == 0 else None
    trained = Trained(options, options.folder / "config.json", device)

    first, last = checkpoints.newest(options.folder), min(options.until or options.steps, options.steps)
    reported = checkpoints.load(options.folder, first, trained, training) if first else None
    reports = Reports(options.folder, options.log, ranks.index, first, options.steps)
    if reported is not None:
        reports.load_state_dict(reported)
    reports.say(describe(options, ranks.count, device, first, last))
    held_out = None if validation is None else read_validation(options, ranks, validation)

    def save(step: int) -> None:
        state = {"training": training.state_dict(), "reports": reports.state_dict()}
        checkpoints.save(options.folder, step, trained, state)

    total, since = torch.zeros((), device=device), 0
    with Stop(ranks) as stop:
        for step in range(first + 1, last + 1):
            rate = options.lr * learning_rate_factor(step, options.steps)
            trained.set_learning_rate(rate)
            tokens = training.take(sequences, options.sequence).to(device)
            total += trained.backward(list(tokens.split(micro_batch)))
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            since += 1
            reports.trained(step)
            stopped = stop.asked()
            saves = stopped or step == last or step % options.save_every == 0
            if saves or step % options.report == 0:
                mean = ranks.mean(total.item() / since)
                reports.loss(step, mean, rate, since * options.tokens_per_step)
                total, since = total.zero_(), 0
            if held_out is not None and (step % options.evaluate_every == 0 or step == options.steps):
                loss = evaluate(trained, ranks, held_out, micro_batch, device)
                reports.evaluated(step, loss, held_out.numel() * ranks.count)
            if saves:
                save(step)
            if stopped:
                reports.say(
                    f"stopped: step {step} is saved in {options.folder}, and the same command continues from there"
                )
                break
    if predicted and device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        reports.say(f"peak: {peak / GB:.2f} GB, predicted {predicted / GB:.2f} GB ({peak / predicted - 1:+.1%})")
    reports.end(options.method, about_the_picture(options, ranks.count, device))


def shares(options: argparse.Namespace, ranks: int) -> tuple[int, int]:
    """How many sequences a rank has in a step, and how many of them go through the model at once."""
    sequences, left = divmod(options.tokens_per_step, options.sequence * ranks)
    if left or not sequences:
        raise SystemExit(
            f"--tokens-per-step {options.tokens_per_step} are no whole sequences of {options.sequence} tokens for each "
            f"of {ranks} ranks; use a multiple of {options.sequence * ranks}"
        )
    micro_batch = min(options.micro_batch, sequences)
    if sequences % micro_batch:
        fit = [divisor for divisor in range(1, sequences + 1) if sequences % divisor == 0]
        raise SystemExit(
            f"--micro-batch {micro_batch} does not divide a rank's {sequences} sequences; use one of {fit}"
        )
    return sequences, micro_batch


def learning_rate_factor(step: int, steps: int) -> float:
    """A linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak rate."""
    warmup = max(1, steps // 10)
    if step <= warmup:
        return step / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def read_validation(options: argparse.Namespace, ranks: Ranks, packer: data.Packer) -> torch.Tensor:
    """This rank's share of the tokens to evaluate on. Every rank has equally many, and keeps them in memory."""
    wanted = max(1, options.validation_tokens // (options.sequence * ranks.count))
    found = packer.take_all(wanted, options.sequence)
    count = int(ranks.agree(len(found), dist.ReduceOp.MIN))
    if not count:
        raise SystemExit(
            f"the text to evaluate on has no sequence of {options.sequence} tokens for each rank; give "
            f"--validation FILE with more text, a larger --held-out than {options.held_out}, or --evaluate-every 0"
        )
    return found[:count]


@torch.no_grad()
def evaluate(trained: Trained, ranks: Ranks, held_out: torch.Tensor, micro_batch: int, device: torch.device) -> float:
    """The mean loss over the held-out sequences of all ranks."""
    trained.bare.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tokens in held_out.to(device).split(micro_batch):
        total += trained.bare(input_ids=tokens, labels=tokens).loss.double() * len(tokens)
    trained.bare.train()
    return ranks.mean(total.item() / len(held_out))


class Stop:
    """Whether any rank has received Ctrl-C or SIGTERM. All ranks learn of it after the same step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.received = ranks, False

    def __enter__(self) -> Stop:
        self._before = {name: signal.signal(name, self._received) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _received(self, name: int, frame: Any) -> None:
        self.received = True
        # A second signal ends the program at once. Not under torchrun, which sends two by itself.
        if self.ranks.count == 1:
            signal.signal(name, signal.SIG_DFL)

    def asked(self) -> bool:
        return bool(self.ranks.agree(self.received, dist.ReduceOp.MAX))


def predict(options: argparse.Namespace, micro_batch: int) -> int | None:
    """With ``--cap``: print how much memory each part will take on one GPU, before anything is allocated."""
    if not options.cap:
        return None
    dtype = getattr(torch, options.dtype)
    counted = single_card.count(str(options.folder / "config.json"), micro_batch, options.sequence, dtype)
    for name, _, gigabytes in single_card.rows(counted):
        print(f"{name:32s} {gigabytes:>7s} GB", flush=True)
    return counted.total


def describe(options: argparse.Namespace, ranks: int, device: torch.device, first: int, last: int) -> str:
    todo = f"steps {first + 1} to {last} of {options.steps}" if first < last else f"step {first} is done already"
    return f"LLaMA {options.model}, {options.method}, {options.dtype}, {ranks} x {device.type}: {todo}"


def about_the_picture(options: argparse.Namespace, ranks: int, device: torch.device) -> str:
    rank = f", rank {max(1, options.rank // options.shrink)}" if options.method.endswith("apollo") else ""
    machine = f"{ranks} x {machine_name(device.type)}"
    made_smaller = f", widths / {options.shrink}" if options.shrink > 1 else ""
    made_smaller += f", {options.layers} layers" if options.layers else ""
    return (
        f"{machine}, {options.dtype}, LLaMA {options.model}{made_smaller}{rank}, seed {options.seed}, "
        f"{options.tokens_per_step:,} tokens a step"
    )


if __name__ == "__main__":
    main()
