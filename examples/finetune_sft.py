"""Fine-tune a language model with Hugging Face's Trainer: whole weights with APOLLO, Mini or AdamW, or LoRA adapters.

    python finetune_sft.py --model meta-llama/Llama-3.2-1B --data commonsense_170k.json
    python finetune_sft.py --model FOLDER --data second.txt --first-text first.txt --method lora
    torchrun --standalone --nproc-per-node 4 finetune_sft.py --model FOLDER --data FILE.jsonl --method mini --lr 3e-4

This file needs no other, only apollo-triton with the extra ``recipes``. It trains the weights whose names contain one
of TARGETS, or adapters of them, freezes all others, and prints which. A .json or .jsonl file has examples with an
instruction, an output, and perhaps an input. Any other file is one text. At the end it prints the loss, how much of a
first text the model has forgotten, and the memory that training took.
"""

import argparse
import os
from collections.abc import Iterable

import datasets
import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from apollo_triton import APOLLOAdamW

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANK, SCALE = {"apollo": 32, "mini": 1, "lora": 32}, {"apollo": 1.0, "mini": 128.0, "lora": 2.0}  # LoRA's: alpha / rank
BATCH = {"adamw": 16, "apollo": 16, "lora": 16, "mini": 32}  # sequences in a step of all processes
EPOCHS, LENGTH, MICRO_BATCH, HELD_OUT = 3, 256, 4, 120  # LENGTH: most tokens; MICRO_BATCH: sequences in memory at once

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="a model of the Hugging Face hub, or a folder")
parser.add_argument("--data", required=True, help="a .json or .jsonl file, or a text")
parser.add_argument("--first-text", help="what the model learned before, a file likewise: how much is forgotten?")
parser.add_argument("--method", choices=sorted(BATCH), default="apollo", help="(%(default)s)")
parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate (%(default)s)")
parser.add_argument("--folder", default="finetune_sft", help="checkpoints, and the model at the end (%(default)s)")
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of --folder")
options = parser.parse_args()
batch, at_once = BATCH[options.method], MICRO_BATCH * int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
if batch % at_once:
    parser.error(f"BATCH, {batch}, must be a multiple of the {at_once} sequences that all processes take at once")
if options.method == "lora":
    try:
        import peft
    except ModuleNotFoundError as error:
        raise SystemExit(f"--method lora needs peft: pip install 'apollo-triton[recipes]' ({error})") from error
transformers.set_seed(0)
on_cuda = torch.cuda.is_available()
try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)
    model.to(torch.bfloat16 if on_cuda else torch.float32)
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH))
    if options.method == "lora":
        rank, alpha = RANK["lora"], RANK["lora"] * SCALE["lora"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS))
    else:
        for name, weight in model.named_parameters():
            weight.requires_grad_(any(target in name for target in TARGETS))
    if options.method in ("adamw", "lora"):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0)
    else:
        settings = {"rank": RANK[options.method], "scale": SCALE[options.method], "target_modules": TARGETS}
        optimizer = getattr(APOLLOAdamW, options.method)(model, lr=options.lr, stochastic_rounding=on_cuda, **settings)
except Exception as error:  # of many types
    raise SystemExit(f"--model {options.model}: {type(error).__name__}: {' '.join(str(error).split())}") from error
for kind, wanted in ("trained", True), ("frozen", False):
    weights = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad == wanted}
    modules = sorted({name.replace(".default", "").split(".")[-2:][0] for name in weights})  # peft adds it to lora_A
    print(f"{kind}: {sum(weights.values()):,} parameters of {', '.join(modules)}", flush=True)


def encode(example: dict[str, str]) -> dict[str, list[int]]:
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer of --model has no eos_token to end answers with: set one, or give a text")
    asked = f"### Input:\n{example['input']}\n" if example.get("input") else ""
    question = tokenizer("### Instruction:\n" + example["instruction"] + f"\n{asked}### Response:\n")["input_ids"]
    answer = [*tokenizer(example["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labels = [-100] * len(question) + answer  # -100: no loss
    return {"input_ids": (question + answer)[:length], "labels": labels[:length]}


def sequences(path: str) -> datasets.Dataset:
    """The examples of a file, each with its end; or its text, cut into pieces of ``length`` tokens."""
    if path.endswith((".json", ".jsonl")):
        examples = datasets.load_dataset("json", data_files=path, split="train")
        return examples.map(encode, remove_columns=examples.column_names)
    text = datasets.load_dataset("text", data_files=path, split="train", sample_by="document")[0]["text"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return datasets.Dataset.from_dict({"input_ids": pieces, "labels": pieces})


def size(tensors: Iterable[object]) -> str:
    return f"{sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor)):,} bytes"


files = {"--data": options.data} | ({"--first-text": options.first_text} if options.first_text else {})
train, held_out = {}, {}
for option, path in files.items():
    try:
        examples = sequences(path)
        parts = examples.train_test_split(max(1, min(HELD_OUT, len(examples) // 10)), seed=0)
        train[option], held_out[option] = parts["train"], parts["test"]
    except Exception as error:  # no file, no JSON, a key that is not there, an output that is no text, one example
        raise SystemExit(f"{option} {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
steps = {"num_train_epochs": EPOCHS, "warmup_steps": EPOCHS * len(train["--data"]) // batch // 10, "save_steps": 500}
steps |= {"per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": batch // at_once}
arguments = transformers.TrainingArguments(options.folder, **steps, max_grad_norm=0.0, save_total_limit=2, report_to=[])
# It pads labels by -100. The pieces of a text have one length, and their tokenizer may know no token to pad with.
pad = transformers.DataCollatorForSeq2Seq(tokenizer) if tokenizer.pad_token else transformers.default_data_collator
settings = {"train_dataset": train["--data"], "data_collator": pad, "optimizers": (optimizer, None)}
trainer = transformers.Trainer(model, arguments, **settings)  # its schedule is linear
before = {option: trainer.evaluate(part)["eval_loss"] for option, part in held_out.items()}
newest = get_last_checkpoint(options.folder) if options.resume and os.path.isdir(options.folder) else None
print(f"begins after {newest}" if newest else "begins at step 1", flush=True)
trainer.train(resume_from_checkpoint=newest)
for option, part in held_out.items():
    print(f"{option} {files[option]}: held-out loss {before[option]:.4f} -> {trainer.evaluate(part)['eval_loss']:.4f}")
trained = [weight for weight in model.parameters() if weight.requires_grad]  # each has a gradient of its own size
state = [value for state in optimizer.state.values() for value in state.values()]
print(f"memory: weights {size(model.parameters())}, gradients {size(trained)}, optimizer state {size(state)}")
trainer.save_model(options.folder)
tokenizer.save_pretrained(options.folder)
