"""Fine-tune a language model on instructions with Hugging Face's Trainer: whole weights, no adapters.

    python finetune_sft.py --model meta-llama/Llama-3.2-1B --data commonsense_170k.json
    torchrun --standalone --nproc-per-node 4 finetune_sft.py --model FOLDER --data FILE.jsonl --method mini --lr 3e-4

This file needs no other, only apollo-triton with the extra ``recipes``. It trains the weights whose names contain one
of TARGETS, freezes all others, and prints which. Each example has an instruction, an output, and perhaps an input.
"""

import argparse
import os

import datasets
import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from apollo_triton import APOLLOAdamW

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANK, SCALE = {"apollo": 32, "mini": 1}, {"apollo": 1.0, "mini": 128.0}
BATCH = {"apollo": 16, "mini": 32}  # sequences in a step of all processes
EPOCHS, LENGTH, MICRO_BATCH, HELD_OUT = 3, 256, 4, 120  # LENGTH: most tokens; MICRO_BATCH: sequences in memory at once

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a model of the Hugging Face hub, or a folder")
parser.add_argument("--data", required=True, help="a .json or .jsonl file")
parser.add_argument("--method", choices=sorted(BATCH), default="apollo", help="(%(default)s)")
parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (%(default)s)")
parser.add_argument("--folder", default="finetune_sft", help="checkpoints, and the model at the end (%(default)s)")
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of --folder")
options = parser.parse_args()
batch, at_once = BATCH[options.method], MICRO_BATCH * int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
if batch % at_once:
    parser.error(f"BATCH, {batch}, must be a multiple of the {at_once} sequences that all processes take at once")
transformers.set_seed(0)
on_cuda = torch.cuda.is_available()
try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)
    model.to(torch.bfloat16 if on_cuda else torch.float32)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(target in name for target in TARGETS))
    settings = {"rank": RANK[options.method], "scale": SCALE[options.method], "target_modules": TARGETS}
    optimizer = getattr(APOLLOAdamW, options.method)(model, lr=options.lr, stochastic_rounding=on_cuda, **settings)
except Exception as error:  # of many types
    raise SystemExit(f"--model {options.model}: {type(error).__name__}: {' '.join(str(error).split())}") from error
for kind, wanted in ("trained", True), ("frozen", False):
    weights = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad == wanted}
    modules = sorted({name.split(".")[-2:][0] for name in weights})
    print(f"{kind}: {sum(weights.values()):,} parameters of {', '.join(modules)}", flush=True)


def encode(example: dict[str, str]) -> dict[str, list[int]]:
    asked = f"### Input:\n{example['input']}\n" if example.get("input") else ""
    question = tokenizer("### Instruction:\n" + example["instruction"] + f"\n{asked}### Response:\n")["input_ids"]
    answer = [*tokenizer(example["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labels = [-100] * len(question) + answer  # -100: no loss
    return {"input_ids": (question + answer)[:LENGTH], "labels": labels[:LENGTH]}


try:
    examples = datasets.load_dataset("json", data_files=options.data, split="train")
    held_out = max(1, min(HELD_OUT, len(examples) // 10))
    data = examples.map(encode, remove_columns=examples.column_names).train_test_split(held_out, seed=0)
except Exception as error:  # no file, no JSON, a key that is not there, an output that is no text, one example
    raise SystemExit(f"--data {options.data}: {type(error).__name__}: {' '.join(str(error).split())}") from error
steps = {"num_train_epochs": EPOCHS, "warmup_steps": EPOCHS * len(data["train"]) // batch // 10, "save_steps": 500}
steps |= {"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": batch // at_once}
arguments = transformers.TrainingArguments(options.folder, **steps, max_grad_norm=0.0, save_total_limit=2, report_to=[])
pad = transformers.DataCollatorForSeq2Seq(tokenizer)  # labels by -100
parts = {"train_dataset": data["train"], "eval_dataset": data["test"], "optimizers": (optimizer, None)}
trainer = transformers.Trainer(model, arguments, pad, **parts)  # its schedule is linear
newest = get_last_checkpoint(options.folder) if options.resume and os.path.isdir(options.folder) else None
print(f"begins after {newest}" if newest else "begins at step 1", flush=True)
trainer.train(resume_from_checkpoint=newest)
print(f"held-out loss {trainer.evaluate()['eval_loss']:.4f}")
trainer.save_model(options.folder)
tokenizer.save_pretrained(options.folder)
