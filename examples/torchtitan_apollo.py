"""torchtitan's Llama 3 with APOLLO: a container that knows one optimizer more, and two ways to say what is low-rank.

    cd examples && torchrun --nproc-per-node 8 -m torchtitan.train --module torchtitan_apollo --config llama3_8b

``--module`` is this file as Python imports it. Copy it to where your program starts.
"""

from dataclasses import dataclass

from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.models.llama3 import config_registry
from torchtitan.trainer import Trainer

from apollo_triton import APOLLOAdamW


class Optimizers(OptimizersContainer):
    """torchtitan's container, for which an ``optimizer_name`` may be APOLLOAdamW too."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> type:
        return APOLLOAdamW if name == "APOLLOAdamW" else OptimizersContainer._resolve_optimizer_factory(name)


def by_patterns(rank: int, lr: float, dense_lr: float) -> Optimizers.Config:
    """A group for each regular expression; a weight is in the first group of which a part of its name matches."""
    low_rank = {"rank": rank, "scale": "auto", "lr": lr, "weight_decay": 0.1}
    dense = {"lr": dense_lr, "weight_decay": 0.1}
    groups = {"norm": dense | {"weight_decay": 0.0}, r"\.(attention|feed_forward)\.": low_rank, ".*": dense}
    return Optimizers.Config(
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name="APOLLOAdamW", optimizer_kwargs=keys)
            for pattern, keys in groups.items()
        ]
    )


def by_names(rank: int, lr: float, dense_lr: float) -> Optimizers.Config:
    """One group, which the optimizer splits: as ``apollo_param_groups`` does, from the names that the container gives.
    Options of the constructor come here, such as ``max_grad_norm``."""
    options = {"rank": rank, "lr": lr, "dense_lr": dense_lr, "weight_decay": 0.1}
    return Optimizers.Config(
        param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="APOLLOAdamW")],
        optimizer_factory_kwargs_by_name={"APOLLOAdamW": options},
    )


def llama3_debugmodel() -> Trainer.Config:
    config = config_registry.llama3_debugmodel()
    config.optimizer = by_patterns(rank=64, lr=1e-3, dense_lr=3e-4)
    return config


def llama3_debugmodel_by_names() -> Trainer.Config:
    config = config_registry.llama3_debugmodel()
    config.optimizer = by_names(rank=64, lr=1e-3, dense_lr=3e-4)
    return config


def llama3_8b() -> Trainer.Config:
    config = config_registry.llama3_8b()
    config.optimizer = by_names(rank=256, lr=1e-3, dense_lr=3e-4)
    return config
