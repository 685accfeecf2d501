"""The programs that test_trainer.py runs with ``python -m apollo_triton.compat``: Hugging Face's Trainer, not patched.

Each function of ``PROGRAMS`` is a program, and fails by an assertion.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_states import shard_on_cpus
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from apollo_triton import APOLLOAdamW, quantize_model
from apollo_triton.trainer import LayerwiseCallback, optimizer_for_trainer

NAMED = {"optim": "apollo_adamw", "optim_target_modules": ["attn", "mlp"], "optim_args": "rank=4,scale=2.0"}


class Text(torch.utils.data.Dataset):
    """Sequences of consecutive numbers, each from another start. A model learns them at once."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) + index) % 50
        return {"input_ids": tokens, "labels": tokens}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return LlamaForCausalLM(config)


def trainer(
    folder: Path, model: nn.Module | None = None, steps: int = 8, trained: Any = None, **options: Any
) -> Trainer:
    """``trained``: keyword arguments of the Trainer itself."""
    common = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    arguments = TrainingArguments(**common | options)
    return Trainer(model or make_model(), arguments, train_dataset=Text(), **(trained or {}))


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(run: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def by_its_string(folder: Path) -> None:
    """By the Trainer's string: groups and options arrive, and the logged learning rate follows the schedule."""
    run = trainer(folder, **NAMED)
    run.train()
    optimizer = run.optimizer.optimizer if hasattr(run.optimizer, "optimizer") else run.optimizer
    assert isinstance(optimizer, APOLLOAdamW), type(optimizer)
    dense, low_rank = (group for group in optimizer.param_groups if group["params"])
    assert (low_rank["rank"], low_rank["scale"], "rank" in dense) == (4, 2.0, False)
    assert len(low_rank["params"]) == 2 * 7
    found = losses(run)
    assert found[-1] < found[0] - 0.5, found
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates[0] > rates[-1] >= 0, rates


def resumed(folder: Path) -> None:
    """Resuming after 4 of 8 steps gives the same bits. torch.load reads the checkpoint with weights_only."""
    whole = trainer(folder / "whole", save_strategy="steps", save_steps=4, **NAMED)
    whole.train()
    saved = torch.load(folder / "whole" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert saved["state"]
    again = trainer(folder / "again", **NAMED)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    assert losses(again)[4:] == losses(whole)[4:]
    for ours, expected in zip(weights(again), weights(whole), strict=True):
        assert torch.equal(ours, expected)


SVD = NAMED | {"optim_args": "rank=4,scale=2.0,proj=svd,update_proj_gap=3"}


def of_apollo_torch(folder: Path) -> None:
    """Without the prefix: apollo-torch trains all steps and saves after 4 of 8. Its P of svd is no random one."""
    whole = trainer(folder, save_strategy="steps", save_steps=4, **SVD)
    whole.train()
    assert type(whole.optimizer.optimizer).__module__.startswith("apollo_torch"), whole.optimizer
    torch.save({"losses": losses(whole), "weights": weights(whole)}, folder / "whole.pt")


def converted(folder: Path) -> None:
    """The folder ``converted`` goes on as apollo-torch did, schedule and order of the data too, to rounding."""
    whole = torch.load(folder / "whole.pt")
    again = trainer(folder, **SVD)
    again.train(resume_from_checkpoint=str(folder / "converted"))
    assert isinstance(again.optimizer.optimizer, APOLLOAdamW)
    assert {int(state["step"]) for state in again.optimizer.state.values()} == {8}
    for ours, expected in zip(losses(again), whole["losses"], strict=True):
        assert abs(ours - expected) < 1e-5, (losses(again), whole["losses"])
    start = weights(trainer(folder, **SVD))
    for ours, expected, before in zip(weights(again), whole["weights"], start, strict=True):
        assert (ours - expected).norm() < 1e-5 * (expected - before).norm()


def layer_by_layer(folder: Path) -> None:
    """The Trainer's own layer-wise mode, with an optimizer per parameter, trains as the plain string does.

    The learning rate is constant, because this mode never shows the inner optimizers' rate to the scheduler.
    """
    constant = {"lr_scheduler_type": "constant"}
    run = trainer(folder, **NAMED | constant | {"optim": "apollo_adamw_layerwise", "max_grad_norm": 0.0})
    run.train()
    plain = trainer(folder, **NAMED | constant | {"max_grad_norm": 0.0})
    plain.train()
    assert losses(run)[0] == losses(plain)[0]
    for ours, expected in zip(losses(run), losses(plain), strict=True):
        assert abs(ours - expected) < 1e-3, (losses(run), losses(plain))


def directly(folder: Path) -> None:
    """An optimizer that is passed to the Trainer is the one that trains, with all options of this package. One that
    the Trainer makes by the pair trains the same."""
    model, keys = make_model(), {"scale": 4.0, "state_dtype": torch.bfloat16}
    optimizer = APOLLOAdamW.mini(model, lr=1e-2, eps=1e-8, **keys)  # the Trainer's eps
    run = trainer(folder, model, trained={"optimizers": (optimizer, None)})
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.5, losses(run)
    other = trainer(folder)
    other.optimizer_cls_and_kwargs = optimizer_for_trainer(APOLLOAdamW.mini, other.args, **keys)
    other.train()
    assert losses(other) == losses(run)


def attached(folder: Path) -> None:
    """Layer-wise updates under the Trainer's defaults: its clipping, which has no gradient left, is not silent."""
    for limit, expected in ((1.0, 1), (0.0, 0)):
        model = make_model()
        optimizer = APOLLOAdamW.mini(model, lr=1e-2, scale=4.0)
        given = {"optimizers": (optimizer, None), "callbacks": [LayerwiseCallback]}
        run = trainer(folder, model, trained=given, max_grad_norm=limit)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train()
        found = [str(each.message) for each in caught if "clips nothing" in str(each.message)]
        assert len(found) == expected, found
        assert not found or found[0].startswith(
            "TrainingArguments(max_grad_norm=1.0) clips nothing: use max_grad_norm=0"
        )
        assert losses(run)[-1] < losses(run)[0] - 0.5, losses(run)


def accumulated_in_bfloat16(folder: Path) -> None:
    """Four micro-batches per step, under autocast."""
    run = trainer(folder, **NAMED, gradient_accumulation_steps=4, per_device_train_batch_size=1, bf16=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.5, losses(run)


def compiled(folder: Path) -> None:
    """Under torch.compile, which renames the modules. The step is not part of the graph."""
    run = trainer(folder, **NAMED, torch_compile=True, torch_compile_backend="aot_eager")
    run.train()
    eager = trainer(folder, **NAMED)
    eager.train()
    for ours, expected in zip(losses(run), losses(eager), strict=True):
        assert abs(ours - expected) < 1e-4, (losses(run), losses(eager))


def as_transformers_tests_it(folder: Path) -> None:
    """What the tests of transformers do with the string.

    They use regular expressions, the default rank on a narrower model, Mini by optim_args, the learning rate before a
    step, and a scheduler with the layer-wise mode.
    """
    named: dict[str, Any] = {"optim": "apollo_adamw", "optim_target_modules": [r".*attn.*", r".*mlp.*"]}
    run = trainer(folder, **named)
    run.create_optimizer_and_scheduler(num_training_steps=10)
    assert run.get_learning_rates() == [1e-2, 1e-2]
    run.train()
    assert [group.get("rank") for group in run.optimizer.param_groups] == [None, 128]
    trainer(folder, **named | {"optim": "apollo_adamw_layerwise", "lr_scheduler_type": "cosine"}).train()
    mini = "proj=random,scale_type=tensor,rank=1,update_proj_gap=100,scale=128.0"
    run = trainer(folder, **named, optim_args=mini, lr_scheduler_type="cosine", warmup_steps=3)
    run.train()
    keys = ("rank", "scale_type", "update_proj_gap", "scale")
    assert [run.optimizer.param_groups[1][key] for key in keys] == [1, "tensor", 100, 128.0]
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True), rates
    assert max(rates) == 1e-2, rates


def sharded(folder: Path) -> None:
    """FSDP2 through Accelerate on two ranks has the losses of DDP, and resuming gives the same bits.

    The Trainer is not patched. Accelerate is patched so that it shards on CPUs. The optimizer is the string's, and then
    the pair's.
    """

    def made(name: str, by_pair: bool, **options: Any) -> Trainer:
        run = trainer(folder / name, **{} if by_pair else NAMED, **options)
        if by_pair:
            run.optimizer_cls_and_kwargs = optimizer_for_trainer(
                APOLLOAdamW.apollo, run.args, run.model, rank=4, scale=2.0
            )
        return run

    plain = [made("plain", by_pair) for by_pair in (False, True)]
    for run in plain:
        run.train()
    refused = trainer(folder, trained={"callbacks": [LayerwiseCallback]})
    with pytest.raises(ValueError, match=r"LayerwiseCallback works on one process or with FSDP2, .* by MULTI_CPU"):
        refused.train()
    shard_on_cpus()
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {"fsdp": True, "fsdp_config": config | {"state_dict_type": "SHARDED_STATE_DICT"}}
    for by_pair in (False, True):
        whole = made(f"whole-{by_pair}", by_pair, save_strategy="steps", save_steps=4, **options)
        whole.train()
        groups = whole.optimizer.param_groups
        assert all(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
        assert [len(group["params"]) for group in groups if group.get("rank") == 4] == [2 * 7]
        for ours, expected in zip(losses(whole), losses(plain[by_pair]), strict=True):
            assert abs(ours - expected) < 1e-4, (losses(whole), losses(plain[by_pair]))
        again = made("again", by_pair, **options)
        again.train(resume_from_checkpoint=str(folder / f"whole-{by_pair}" / "checkpoint-4"))
        assert losses(again)[4:] == losses(whole)[4:]
        for ours, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours.to_local(), expected.to_local())
    if os.environ["RANK"] == "0":
        print("sharded and resumed")


def sharded_savings(folder: Path) -> None:
    """Layer-wise updates, int8 weights and 8-bit moments under FSDP2 on two ranks, as under DDP without the first.

    A step has two micro-batches. Weights are rounded to the nearest, so that the runs can be compared. Resuming gives
    the same bits.
    """
    parts = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}

    def made(name: str, callbacks: list[Any], **options: Any) -> Trainer:
        model = quantize_model(make_model(), group_size=8, stochastic_rounding=False)
        run = trainer(folder / name, model, trained={"callbacks": callbacks}, **parts, **options)
        run.optimizer_cls_and_kwargs = optimizer_for_trainer(
            APOLLOAdamW.apollo, run.args, run.model, rank=16, state_bits=8, min_8bit_size=256
        )
        return run

    plain = made("plain", [])
    plain.train()
    shard_on_cpus()
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {"fsdp": True, "fsdp_config": config | {"state_dict_type": "SHARDED_STATE_DICT"}}
    whole = made("whole", [LayerwiseCallback], save_strategy="steps", save_steps=4, **options)
    whole.train()
    parameters = list(whole.model.parameters())
    assert all(isinstance(parameter, DTensor) and parameter.grad is None for parameter in parameters)
    states = [state for _, state in whole.optimizer.optimizer.state.items()]
    assert any(value.dtype == torch.uint8 for state in states for value in state.values() if torch.is_tensor(value))
    for ours, expected in zip(losses(whole), losses(plain), strict=True):
        assert abs(ours - expected) < 1e-2, (losses(whole), losses(plain))
    again = made("again", [LayerwiseCallback], **options)
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-4"))
    assert losses(again)[4:] == losses(whole)[4:]
    for (name, ours), expected in zip(again.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours.to_local(), expected.to_local()), name
    if os.environ["RANK"] == "0":
        print("saved memory and resumed")


PROGRAMS = {
    program.__name__: program
    for program in (
        by_its_string,
        resumed,
        of_apollo_torch,
        converted,
        layer_by_layer,
        directly,
        attached,
        accumulated_in_bfloat16,
        compiled,
        as_transformers_tests_it,
        sharded,
        sharded_savings,
    )
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](Path(sys.argv[2]))
