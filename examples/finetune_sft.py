"""Fine-tune a language model on instructions with Hugging Face's Trainer: whole weights, no adapters.

    python finetune_sft.py --model meta-llama/Llama-3.2-1B --data commonsense_170k.json
    python finetune_sft.py --model FOLDER --data FILE.jsonl --method mini --lr 3e-4
    torchrun --standalone --nproc-per-node 4 finetune_sft.py --model FOLDER --data FILE.jsonl --resume

This file needs no other, only apollo-triton with the extra ``recipes``. It trains the weights whose names contain one
of TARGETS, freezes all others, and prints which. Each example has an instruction, an output, and perhaps an input.
"""

import argparse
import os
from typing import Any

import datasets
import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from apollo_triton import APOLLOAdamW

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
BATCH, MICRO_BATCH = {"apollo": 16, "mini": 32}, 4  # sequences: in a step of all processes, in memory at once
EPOCHS, LENGTH, HELD_OUT = 3, 256, 120  # LENGTH: most tokens of an example; HELD_OUT: most examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model of the Hugging Face hub, or a folder")
    parser.add_argument("--data", required=True, help="a .json or .jsonl file")
    parser.add_argument("--method", choices=sorted(BATCH), default="apollo", help="(%(default)s)")
    parser.add_argument("--rank", type=int, help="APOLLO's rank (32); Mini has rank 1")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--folder", default="finetune_sft", help="checkpoints, and the model at the end (%(default)s)")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of --folder")
    options = parser.parse_args()
    batch, at_once = BATCH[options.method], MICRO_BATCH * int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if batch % at_once or options.save_every < 1:
        parser.error(f"--save-every {options.save_every} must be at least 1, and BATCH {batch} a multiple of {at_once}")
    if options.method == "mini" and options.rank not in (None, 1):
        parser.error(f"--rank {options.rank} is for --method apollo; Mini has rank 1")
    transformers.set_seed(0)
    on_cuda = torch.cuda.is_available()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
        model = model.to(torch.bfloat16 if on_cuda else torch.float32)
        data, optimizer = read(options.data, tokenizer), make_optimizer(model, options)
        os.makedirs(options.folder, exist_ok=True)
        newest = get_last_checkpoint(options.folder) if options.resume else None
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model {options.model}, --data {options.data}: {' '.join(str(error).split())}") from error
    if options.resume and newest is None:
        print(f"--resume: --folder {options.folder} holds no checkpoint, so this begins at step 1", flush=True)
    steps = {"eval_strategy": "steps", "eval_steps": options.save_every, "save_steps": options.save_every}
    steps |= {"gradient_accumulation_steps": batch // at_once, "per_device_train_batch_size": MICRO_BATCH}
    steps |= {"num_train_epochs": EPOCHS, "warmup_steps": EPOCHS * -(-len(data["train"]) // batch) // 10}
    steps |= {"save_total_limit": 2, "logging_steps": 10, "report_to": []}
    other = {"max_grad_norm": 0.0, "bf16": on_cuda, "use_cpu": not on_cuda, "ddp_find_unused_parameters": False}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(options.folder, **steps, **other),
        transformers.DataCollatorForSeq2Seq(tokenizer),  # pads labels by -100, where there is no loss
        train_dataset=data["train"],
        eval_dataset=data["test"],
        optimizers=(optimizer, None),  # the schedule is the Trainer's: linear
    )
    trainer.train(resume_from_checkpoint=newest)
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model(options.folder)
    tokenizer.save_pretrained(options.folder)


def make_optimizer(model: torch.nn.Module, options: argparse.Namespace) -> APOLLOAdamW:
    """The optimizer of the weights whose names contain a target. All other weights are frozen."""
    count = dict.fromkeys([True, False], 0)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(target in name for target in TARGETS))
        count[weight.requires_grad] += weight.numel()
    print(f"trained: {count[True]:,} parameters of {', '.join(TARGETS)}", flush=True)
    frozen = {name.split(".")[-2] for name, weight in model.named_parameters() if not weight.requires_grad}
    print(f"frozen: {count[False]:,} parameters of {', '.join(sorted(frozen))}", flush=True)
    settings = {"lr": options.lr, "target_modules": TARGETS, "stochastic_rounding": torch.cuda.is_available()}
    if options.method == "mini":
        return APOLLOAdamW.mini(model, **settings)
    return APOLLOAdamW.apollo(model, rank=options.rank or 32, **settings)


def read(path: str, tokenizer: Any) -> datasets.DatasetDict:
    """The data as tokens, split into training and held-out examples. Only the answers count in the loss."""
    if not os.path.isfile(path):
        raise ValueError("--data is no file")
    try:
        loaded = datasets.load_dataset("json", data_files=path, split="train")
    except (StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError("--data cannot be read as json, or has no examples") from error
    if len(loaded) < 2 or not {"instruction", "output"} <= set(loaded.column_names):
        raise ValueError("2 examples are needed at least, since one is held out, with an instruction and an output")

    def encode(example: dict[str, str], index: int) -> dict[str, list[int]]:
        if not isinstance(example["instruction"], str) or not isinstance(example["output"], str):
            raise ValueError(f"instruction or output of example {index + 1} is not a text")
        asked = f"### Input:\n{example['input']}\n" if example.get("input") else ""
        question = tokenizer(f"### Instruction:\n{example['instruction']}\n{asked}### Response:\n")["input_ids"]
        answer = tokenizer(example["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = [-100] * len(question) + answer  # -100: no loss
        return {"input_ids": (question + answer)[:LENGTH], "labels": labels[:LENGTH]}

    encoded = loaded.map(encode, with_indices=True, remove_columns=loaded.column_names, desc="tokens")
    return encoded.train_test_split(test_size=max(1, min(HELD_OUT, len(encoded) // 10)), seed=0)


if __name__ == "__main__":
    main()
