"""Fine-tune a language model on instructions with Hugging Face's Trainer: whole weights, no adapters.

APOLLO updates the attention and MLP weights with a fraction of AdamW's optimizer state. Needs the extra ``recipes``.

    python examples/finetune_sft.py --model meta-llama/Llama-3.2-1B --data commonsense_170k.json
    python examples/finetune_sft.py --model meta-llama/Llama-3.2-1B --data commonsense_170k.json --method mini --lr 3e-4
    torchrun --standalone --nproc-per-node 4 examples/finetune_sft.py --model FOLDER --data FILE.jsonl

Each example of the data has an instruction, an output, and perhaps an input. --resume continues from the newest
checkpoint. docs/recipes.md says where the defaults come from.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from pretraining.hub import hub_answers
from pretraining.options import LOGS, above_0, at_least_2, installed, not_negative, positive, seed
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from apollo_triton import APOLLOAdamW

# For Llama-3.2-1B on Commonsense-170K: rank and scale of each method, and sequences per step.
DEFAULTS = {"apollo": {"rank": 32, "scale": 1.0, "batch": 16}, "mini": {"rank": 1, "scale": 128.0, "batch": 32}}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
NOT_A_TARGET = -100  # label of tokens that the loss ignores: those of the question and the padding


def main() -> None:
    options = parse_options()
    set_seed(options.seed)
    tokenizer, model = load(options.model)
    data = read(options, tokenizer)
    optimizer = make_optimizer(model, options)
    steps = options.epochs * -(-len(data["train"]) // options.batch)
    trainer = Trainer(
        model,
        arguments(options, steps),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, label_pad_token_id=NOT_A_TARGET),
        optimizers=(optimizer, None),  # the schedule is the Trainer's
    )
    trainer.train(resume_from_checkpoint=newest(options.folder) if options.resume else None)
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model(options.folder)
    tokenizer.save_pretrained(options.folder)


def newest(folder: str) -> str | None:
    """The newest checkpoint. Prints a line and returns None if there is none."""
    found = get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if found is None and int(os.environ.get("RANK", 0)) == 0:
        print(f"--resume: --folder {folder} holds no checkpoint, so this begins at step 1", flush=True)
    return found


def load(name: str) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer and the model. With a GPU the model is in bfloat16."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    local = not hub_answers()
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
        except (OSError, ValueError) as error:
            if not Path(name).is_dir():
                raise
            raise SystemExit(
                f"--model {name}: this folder holds no tokenizer that can be loaded; tokenizer.save_pretrained saves "
                "the model's there"
            ) from error
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=local).to(dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SystemExit(f"--model {name}: {reason}\nWithout a network, give a folder that holds the model") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False
    return tokenizer, model


def make_optimizer(model: torch.nn.Module, options: argparse.Namespace) -> APOLLOAdamW:
    """The optimizer of the weights whose names contain a target. All other weights are frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(target in name for target in options.target_modules))
    settings = {
        "scale": options.scale,
        "lr": options.lr,
        "weight_decay": 0.0,
        "target_modules": options.target_modules,
        "stochastic_rounding": options.stochastic_rounding,
    }
    try:
        if options.method == "mini":
            return APOLLOAdamW.mini(model, **settings)
        return APOLLOAdamW.apollo(model, rank=options.rank, **settings)
    except ValueError as error:
        raise SystemExit(f"--rank {options.rank}, --target-modules: {error}") from error


def read(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> datasets.DatasetDict:
    """The data as tokens, split into training and held-out examples. Only the answers count in the loss."""
    path = Path(options.data)
    if path.exists():
        kind = "parquet" if path.suffix == ".parquet" else "json"
        try:
            loaded = datasets.load_dataset(kind, data_files=str(path), split="train")
        except (ValueError, StopIteration, datasets.exceptions.DatasetGenerationError) as error:
            raise SystemExit(f"--data {path} cannot be read as {kind}, or has no examples") from error
    else:
        if not hub_answers():
            raise SystemExit(f"--data {options.data}: no such file, and the Hugging Face hub does not answer")
        try:
            loaded = datasets.load_dataset(options.data, split="train")
        except (OSError, RuntimeError, datasets.exceptions.DatasetNotFoundError) as error:
            raise SystemExit(f"--data {options.data}: {error}\nWithout a network, give a file") from error
    missing = {"instruction", "output"} - set(loaded.column_names)
    if missing:
        raise SystemExit(f"--data {options.data} has no {' and no '.join(sorted(missing))}, but {loaded.column_names}")

    if len(loaded) < 2:
        raise SystemExit(
            f"--data {options.data} has too few examples, {len(loaded)}; 2 are needed at least, since one is held out"
        )

    def encode(example: dict[str, str], index: int) -> dict[str, list[int]]:
        for name in ("instruction", "output", "input"):
            value = example.get(name, "")
            if not isinstance(value, str) and (name != "input" or value is not None):
                raise SystemExit(f"--data {options.data}: the {name} of example {index + 1} is {value!r}, not a text")
        question = tokenizer(prompt(example))["input_ids"]
        answer = tokenizer(example["output"], add_special_tokens=False)["input_ids"]
        tokens = [*question, *answer, tokenizer.eos_token_id][: options.length]
        labels = [*[NOT_A_TARGET] * len(question), *answer, tokenizer.eos_token_id][: options.length]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    encoded = loaded.map(encode, with_indices=True, remove_columns=loaded.column_names, desc="tokens")
    held_out = max(1, min(options.held_out, len(encoded) // 10))
    return encoded.train_test_split(test_size=held_out, seed=options.seed)


def prompt(example: dict[str, str]) -> str:
    """The question as the model sees it, up to where its answer begins."""
    parts = ["### Instruction:", example["instruction"]]
    if example.get("input"):
        parts += ["### Input:", example["input"]]
    return "\n".join([*parts, "### Response:", ""])


def arguments(options: argparse.Namespace, steps: int) -> TrainingArguments:
    on_cuda = torch.cuda.is_available()
    ranks = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if options.batch % (options.micro_batch * ranks):
        raise SystemExit(
            f"--batch {options.batch} is no multiple of --micro-batch {options.micro_batch} on {ranks} processes"
        )
    return TrainingArguments(
        output_dir=options.folder,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch // (options.micro_batch * ranks),
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        max_grad_norm=0.0,
        bf16=on_cuda,
        use_cpu=not on_cuda,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=options.save_every,
        save_steps=options.save_every,
        save_total_limit=2,
        seed=options.seed,
        report_to=[] if options.log is None else [options.log],
        ddp_find_unused_parameters=False,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a model of the Hugging Face hub, or a folder")
    add("--data", required=True, help=".json, .jsonl or .parquet, or a data set of the hub")
    add("--method", choices=sorted(DEFAULTS), default="apollo", help="(%(default)s)")
    add("--rank", type=positive, help="APOLLO's rank (32)")
    add("--scale", type=above_0, help="(1 for APOLLO, 128 for Mini)")
    add("--lr", type=not_negative, default=1e-4, help="peak learning rate (%(default)s)")
    add("--target-modules", nargs="+", default=TARGETS, help=f"what is trained ({' '.join(TARGETS)})")
    add("--epochs", type=positive, default=3, help="(%(default)s)")
    add("--batch", type=positive, help="sequences per step, over all processes (16 for APOLLO, 32 for Mini)")
    add("--micro-batch", type=positive, default=4, help="sequences through the model at once (%(default)s)")
    add("--length", type=at_least_2, default=256, help="most tokens of an example (%(default)s)")
    add("--held-out", type=positive, default=120, help="examples to evaluate on (%(default)s)")
    add("--stochastic-rounding", action="store_true", help="of bfloat16 weights")
    add("--folder", default="finetune_sft", help="checkpoints, and the model at the end (%(default)s)")
    add("--save-every", type=positive, default=500, help="steps between checkpoints (%(default)s)")
    add("--resume", action="store_true", help="continue from the newest checkpoint")
    add("--log", type=installed, choices=LOGS, help="where else to log")
    add("--seed", type=seed, default=0, help="of the split and the order of the data (%(default)s)")
    options = parser.parse_args()
    if options.method == "mini" and options.rank not in (None, 1):
        parser.error(f"--rank {options.rank} is for --method apollo; Mini has rank 1")
    for name, default in DEFAULTS[options.method].items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


if __name__ == "__main__":
    main()
