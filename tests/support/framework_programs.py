"""Trains as a framework does, with the optimizer that its own code makes of its own configuration.

    python tests/support/framework_programs.py torchtune run.yaml

prints as JSON what ``trained`` returns. Each function of ``PROGRAMS`` takes a configuration, and calls of the framework
what stands between that and a step: the loader, the function that makes the optimizer, the schedule, the checkpoint.
The models are small, and their data counts on. ``tests/integration/test_configurations.py`` runs this in a process of
its own, since some of the frameworks want versions of their own.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

WIDTH, VOCABULARY = 320, 300  # wider than rank 256, which the page has
STEPS, MORE = 4, 2
Step = Callable[[], None]
Made = tuple[list[Optimizer], Step, Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.self_attn = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.mlp(self.self_attn(self.norm(hidden)).relu())


class Model(nn.Module):
    """Named as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block()])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(hidden)


def loss_of(model: nn.Module) -> Tensor:
    """That each number is followed by the next one or the one after; ln 2 is the least."""
    tokens = torch.arange(64)[None] % 32
    following = tokens + 1 + torch.arange(64) // 32
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def train(loss: Callable[[], Tensor], step: Step, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()
        step()
        losses.append(value.item())
    return losses


def trained(
    model_of: Callable[[], nn.Module],
    make: Callable[[nn.Module], Made],
    save: Callable[[Any], Any],
    load: Callable[[Any, Any], None],
    loss: Callable[[nn.Module], Tensor] = loss_of,
) -> dict[str, Any]:
    """Train, save, go on; and go on from what was saved with another model and optimizer.

    ``make`` returns the optimizers, a step with everything that follows it, and what ``save`` and ``load`` get.
    """
    model = model_of()
    optimizers, step, handle = make(model)
    losses = train(lambda: loss(model), step, STEPS)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = save(handle)
    losses += train(lambda: loss(model), step, MORE)

    other = model_of()
    _, step, handle = make(other)
    other.load_state_dict(weights)
    load(handle, saved)
    again = train(lambda: loss(other), step, MORE)
    end = other.state_dict()
    return {
        "optimizers": sorted({type(optimizer).__name__ for optimizer in optimizers}),
        "groups": groups_of(optimizers, model),
        "losses": losses,
        "resumed": again == losses[STEPS:]
        and all(torch.equal(whole(value), whole(end[name])) for name, value in model.state_dict().items()),
    }


def groups_of(optimizers: list[Optimizer], model: nn.Module) -> list[dict[str, Any]]:
    """Each group with the names that the model has for its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        | {"names": [names[id(parameter)] for parameter in group["params"]]}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def through_a_file(state: Any) -> Any:
    """What ``torch.load`` reads of what ``torch.save`` wrote, tensors and plain values alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stepping(optimizer: Optimizer, schedule: Any = None) -> Step:
    def step() -> None:
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()

    return step


def plain(make: Callable[[nn.Module], Optimizer]) -> dict[str, Any]:
    """A framework that saves ``optimizer.state_dict()`` with ``torch.save``."""

    def made(model: nn.Module) -> Made:
        optimizer = make(model)
        return [optimizer], stepping(optimizer), optimizer

    return trained(
        Model,
        made,
        lambda optimizer: through_a_file(optimizer.state_dict()),
        lambda optimizer, saved: optimizer.load_state_dict(saved),
    )


def hydra(path: str) -> dict[str, Any]:
    """``instantiate`` with a model's named parameters as first argument."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.load(path)
    return plain(lambda model: instantiate(config.optimizer, model.named_parameters()))


def lightning(path: str) -> dict[str, Any]:
    """LightningCLI, which makes the optimizer of its own key or hands the module one to call; and its checkpoints."""
    from lightning.pytorch.cli import LightningCLI
    from lightning_model import Module

    def fit(steps: int, *options: str) -> LightningCLI:
        torch.manual_seed(0)
        parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        quiet = [f"--trainer.{name}=false" for name in parts]
        args = ["fit", f"--config={path}", "--trainer.accelerator=cpu", f"--trainer.max_steps={steps}", *quiet]
        return LightningCLI(Module, args=[*args, *options], save_config_callback=None, seed_everything_default=0)

    whole = fit(STEPS + MORE)
    fit(STEPS).trainer.save_checkpoint("part.ckpt")
    second = fit(STEPS + MORE, "--ckpt_path=part.ckpt")
    model = second.model
    return {
        "optimizers": sorted({type(optimizer).__name__ for optimizer in second.trainer.optimizers}),
        "groups": groups_of(second.trainer.optimizers, model.model),
        "losses": whole.model.losses,
        "resumed": model.losses == whole.model.losses[STEPS:]
        and all(map(torch.equal, model.parameters(), whole.model.parameters())),
    }


def torchtune(path: str) -> dict[str, Any]:
    """``_setup_optimizer`` of the recipe full_finetune_single_device, with a Llama 3.2 of torchtune's."""
    import torchtune
    from omegaconf import OmegaConf
    from torchtune.models.llama3_2 import llama3_2

    config = OmegaConf.load(path)
    file = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
    recipe = runpy.run_path(str(file))["FullFinetuneRecipeSingleDevice"]
    in_backward = bool(config.get("optimizer_in_bwd"))
    sizes = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "embed_dim": WIDTH, "intermediate_dim": WIDTH}

    def make(model: nn.Module) -> Made:
        running = recipe.__new__(recipe)
        running._model = model
        optimizer = running._setup_optimizer(config.optimizer, optimizer_in_bwd=in_backward)
        if not in_backward:
            return [optimizer], stepping(optimizer), optimizer
        wrapper = running._optim_ckpt_wrapper
        return [*wrapper.optim_map.values()], lambda: None, wrapper

    return trained(
        lambda: llama3_2(vocab_size=VOCABULARY, max_seq_len=64, **sizes),
        make,
        lambda saved: through_a_file(saved.state_dict()),
        lambda loaded, saved: loaded.load_state_dict(saved),
    )


def verl(path: str) -> dict[str, Any]:
    """The command line on verl's own configuration of the SFT trainer, and ``build_optimizer``.

    verl's packages import ray at once. They are left out, and the two modules that take part are loaded alone.
    """
    from hydra import compose, initialize_config_dir

    found = importlib.util.find_spec("verl")
    assert found
    assert found.submodule_search_locations
    root = Path(found.submodule_search_locations[0])
    for name in ("verl", "verl.workers", "verl.workers.config", "verl.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    module = importlib.import_module("verl.workers.config.optimizer")
    sys.modules["verl.workers.config"].FSDPOptimizerConfig = module.FSDPOptimizerConfig
    to_dataclass = importlib.import_module("verl.utils.config").omega_conf_to_dataclass
    overrides = Path(path).read_text().splitlines()
    with initialize_config_dir(str(root / "trainer" / "config"), version_base=None):
        config = compose("sft_trainer_engine", overrides=overrides)
    assert config.engine.strategy == "fsdp2"
    return plain(lambda model: module.build_optimizer(model.parameters(), to_dataclass(config.optim)))


def nemo_automodel(path: str) -> dict[str, Any]:
    """``RecipeConfig``, its scheduler, and ``OptimizerState`` through torch.distributed.checkpoint."""
    from nemo_automodel.components.checkpoint.stateful_wrappers import OptimizerState
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes._typed_config import RecipeConfig

    config = RecipeConfig(load_yaml_config(path))
    length = types.SimpleNamespace(epoch_len=STEPS + MORE, num_epochs=1, max_steps=None)

    def make(model: nn.Module) -> Made:
        optimizers = config.optimizer.build(model)
        schedules = config.lr_scheduler.build(optimizers, length)

        def step() -> None:
            optimizers[0].step()
            schedules[0].step(1)
            optimizers[0].zero_grad()

        return optimizers, step, OptimizerState(model, optimizers, schedules)

    return through_dcp(Model, make)


def torchtitan(path: str) -> dict[str, Any]:
    """``ConfigManager`` on a command line; the container, its schedule, and both through torch.distributed.checkpoint.

    The model is torchtitan's own. Its attention runs on GPUs alone, so the loss is the weights' distance from others.
    Under torchrun it is sharded as torchtitan's FSDP does.
    """
    from torch.distributed.fsdp import fully_shard
    from torchtitan.components.optimizer import LRSchedulersContainer
    from torchtitan.config import ConfigManager

    config = ConfigManager().parse_args(Path(path).read_text().splitlines())

    def model_of() -> nn.Module:
        model = config.model_spec.model.build()
        model.init_states()
        if dist.is_initialized():
            for layer in model.layers.values():
                fully_shard(layer)
            fully_shard(model)
        return model

    class Both:
        def __init__(self, optimizers: Any, schedules: Any) -> None:
            self.parts = {"optimizer": optimizers, "lr_scheduler": schedules}

        def state_dict(self) -> dict[str, Any]:
            return {name: part.state_dict() for name, part in self.parts.items()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])

    def make(model: nn.Module) -> Made:
        optimizers = config.optimizer.build(model_parts=[model])
        schedules = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=optimizers, training_steps=9)
        return [*optimizers], stepping(optimizers, schedules), Both(optimizers, schedules)

    def loss(model: nn.Module) -> Tensor:
        distances = [((weight - 0.1 * index) ** 2).mean() for index, weight in enumerate(model.parameters())]
        return sum(whole(distance) for distance in distances)

    return through_dcp(model_of, make, loss)


def through_dcp(model_of: Callable[[], nn.Module], make: Any, loss: Any = loss_of) -> dict[str, Any]:
    """A framework whose checkpoints torch.distributed.checkpoint writes, here into the current folder, and reads into
    what is there."""

    def save(state: Any) -> str:
        dcp.save({"state": state.state_dict()}, checkpoint_id="checkpoint")
        return "checkpoint"

    def load(state: Any, folder: str) -> None:
        read = {"state": state.state_dict()}
        dcp.load(read, checkpoint_id=folder)
        state.load_state_dict(read["state"])

    return trained(model_of, make, save, load, loss)


PROGRAMS: dict[str, Callable[[str], dict[str, Any]]] = {
    "hydra": hydra,
    "lightning": lightning,
    "nemo_automodel": nemo_automodel,
    "torchtitan": torchtitan,
    "torchtune": torchtune,
    "verl": verl,
}


def run(name: str, path: str) -> dict[str, Any]:
    """What ``PROGRAMS[name]`` returns, and what was warned of."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = PROGRAMS[name](path)
    return found | {"warnings": [str(warning.message) for warning in caught]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    result = run(*sys.argv[1:])
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
