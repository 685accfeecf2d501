"""The names that the documentation's Python blocks may use without defining them, because a reader has them already.

Each section (``##``) starts again with a new small model. Pages that are not in ``PRELUDES`` define all their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from apollo_triton import APOLLOAdamW, apollo_param_groups, attach_layerwise, quantize_model

Names = dict[str, Any]
# Wider than rank 256, which the pages use.
CONFIG = {"hidden_size": 320, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
          "vocab_size": 64, "max_position_embeddings": 32}  # fmt: skip


class Text(Dataset):
    """Sequences of consecutive numbers, each from another start."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index) % 50
        return {"input_ids": tokens, "labels": tokens}


def make_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**CONFIG))


def make_files(folder: Path) -> None:
    """Make the files that commands name."""
    (folder / "train.py").touch()
    (folder / "notes").mkdir()
    (folder / "path" / "to").mkdir(parents=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **CONFIG}
    (folder / "path" / "to" / "config.json").write_text(json.dumps(config))


def training(folder: Path) -> Names:
    """A model, its batches, and the arguments of Hugging Face's Trainer."""
    from transformers import Trainer, TrainingArguments

    options = {"output_dir": str(folder / "run"), "max_steps": 2, "use_cpu": True, "report_to": []}
    data = Text()
    batches = [{name: tokens[None] for name, tokens in data[index].items()} for index in range(2)]
    return {
        "APOLLOAdamW": APOLLOAdamW,
        "Trainer": Trainer,
        "args": TrainingArguments(**options),
        "batches": batches,
        "data": data,
        "model": make_model(),
    }


def readme(folder: Path) -> Names:
    """The names of ``training``, and an optimizer."""
    names = training(folder)
    return names | {"optimizer": APOLLOAdamW.mini(names["model"], lr=1e-2), "torch": torch}


def migration(folder: Path) -> Names:
    """No names, but a checkpoint that apollo-torch saved, of the model that the page makes."""
    if not (folder / "checkpoint-500").exists():
        shapes = {"embed": nn.Embedding(100, 256), "attn": nn.Linear(256, 256), "mlp": nn.Linear(256, 1024)}
        model = nn.ModuleDict(shapes)
        low_rank = apollo_param_groups(model, rank=64)[0]
        others = [p for name, p in model.named_parameters() if name not in low_rank["param_names"]]
        _save_official(folder / "checkpoint-500", [{"params": others}, low_rank])
    return {}


def _save_official(folder: Path, groups: list[Names]) -> None:
    import apollo_torch

    keys = {"proj": "random", "proj_type": "std", "scale_type": "channel", "scale": 1, "update_proj_gap": 200}
    official_groups = [
        {"params": group["params"]} | ({"rank": group["rank"]} | keys if "rank" in group else {}) for group in groups
    ]
    official = apollo_torch.APOLLOAdamW(official_groups, lr=1e-2)
    for parameter in [parameter for group in groups for parameter in group["params"]]:
        parameter.grad = torch.full_like(parameter, 1e-3)
    official.step()
    folder.mkdir()
    torch.save(official.state_dict(), folder / "optimizer.pt")


def int8(folder: Path) -> Names:
    """The names of ``training``, a checkpoint of the float model in ``folder``, and its config."""
    names = training(folder)
    names["model"].save_pretrained(folder / "weights")
    functions = {"attach_layerwise": attach_layerwise, "quantize_model": quantize_model}
    return names | functions | {"config": names["model"].config, "folder": folder / "weights"}


def distributed(folder: Path) -> Names:
    """The names of ``training``, an optimizer, folders for its checkpoint and with float weights, and their config."""
    names = training(folder)
    model = names["model"]
    model.save_pretrained(folder / "weights")
    files = {"folder": folder / "checkpoint", "weights": folder / "weights"}
    more = {"config": model.config, "make_model": make_model, "optimizer": APOLLOAdamW.mini(model, lr=1e-2)}
    return names | files | more


def tools(folder: Path) -> Names:
    """The arguments of TRL's trainer."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

    words = Tokenizer(models.WordLevel({str(token): token for token in range(50)}, unk_token="0"))
    names = training(folder)
    data = [{"input_ids": names["data"][index]["input_ids"].tolist()} for index in range(len(names["data"]))]
    args = SFTConfig(output_dir=str(folder / "run"), max_steps=2, use_cpu=True, report_to=[], bf16=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", pad_token="0")
    return names | {"args": args, "data": datasets.Dataset.from_list(data), "tokenizer": tokenizer}


def compiling(folder: Path) -> Names:
    """Graphs are counted from here on. Other tests of the process have compiled some."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return {}


def recipes(folder: Path) -> Names:
    """The folder of a run."""
    model = make_model()
    model.config.save_pretrained(folder / "runs")
    (folder / "runs" / "step-10").mkdir()
    torch.save({"model": model.state_dict()}, folder / "runs" / "step-10" / "model.pt")
    return {"folder": folder / "runs"}


PRELUDES: dict[str, Callable[[Path], Names]] = {
    "compile.md": compiling,
    "README.md": readme,
    "distributed.md": distributed,
    "int8.md": int8,
    "layerwise.md": training,
    "migration.md": migration,
    "recipes.md": recipes,
    "no-gradient.md": training,
    "tools.md": tools,
    "trainer.md": training,
}
