"""What layer-wise updates cannot be attached to, and what a group must not ask for while they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dtensors import is_dtensor
from ..core.geometry import is_flattened
from ..core.messages import listed, warn
from ..int8.replaced import replaced_by
from ..optimizer import APOLLOAdamW
from ..params.member import Param, params_of
from .fsdp2 import sharded_modules
from .linear import owners_of


def check_model(model: nn.Module, optimizer: APOLLOAdamW) -> None:
    """Raise ValueError unless hooks on the model see whole, final gradients of all of the optimizer's parameters."""
    if any(isinstance(module, _kinds_of_ddp()) for module in model.modules()):
        raise ValueError(
            "layer-wise updates would use gradients before DistributedDataParallel has averaged them, and it keeps all "
            "of them in its buckets anyway; use fully_shard on a mesh of replicas instead, which frees them: "
            'init_device_mesh("cuda", (ranks, 1), mesh_dim_names=("replicate", "shard")); or plain optimizer.step()'
        )
    in_model = set(model.parameters())
    params = [*params_of(optimizer.param_groups)]
    foreign = [param for param in params if param.tensor not in in_model]
    if foreign:
        conversion = next(filter(None, (replaced_by(param.tensor) for param in foreign)), None)
        advice = "give attach_layerwise the whole model that the optimizer trains"
        if conversion is not None:
            advice = f"{conversion} has replaced them since the optimizer was made: make the optimizer after it"
        elif any(is_dtensor(param.tensor) for param in foreign):
            advice = (
                "where fully_shard was called before the optimizer was made, a forward has left the root gathered: "
                "call model.reshard() first"
            )
        elif any(is_dtensor(parameter) for parameter in in_model):
            advice = (
                "fully_shard or parallelize_module has replaced them since the optimizer was made: make the optimizer "
                "after it"
            )
        names = listed([*map(str, foreign)], 3)
        raise ValueError(f"not in the model: {names} of the optimizer's {len(params)} parameters; {advice}")


def _kinds_of_ddp() -> tuple[type, ...]:
    """The classes of modules whose gradients DistributedDataParallel averages. ``replicate`` of
    ``torch.distributed._composable`` keeps it out of the model, and gives the module a class of its own."""
    composable: Any = sys.modules.get("torch.distributed._composable.replicate")  # without it there is no such module
    kind = getattr(composable, "DDP", None)
    return (nn.parallel.DistributedDataParallel, *([kind] if isinstance(kind, type) else []))


def warn_of_replicas(optimizer: APOLLOAdamW) -> None:
    """Warn where several ranks train and no weight is sharded. DistributedDataParallel around the model is not seen."""
    distributed = torch.distributed
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if ranks > 1 and not any(is_dtensor(param.tensor) for param in params_of(optimizer.param_groups)):
        warn(
            f"torch.distributed has {ranks} ranks, and none of this optimizer's weights is a DTensor: layer-wise "
            "updates move each rank's weights by its own gradients, and a DistributedDataParallel around the model "
            "would average what has been used already. Call fully_shard on the model before the optimizer is made; "
            f'for replicas, on init_device_mesh("cuda", ({ranks}, 1), mesh_dim_names=("replicate", "shard"))'
        )


def check_layers(model: nn.Module, optimizer: APOLLOAdamW, layers: Mapping[Tensor, nn.Linear], gradients: str) -> None:
    """Raise ValueError for a low-rank weight that several modules hold, or if no layer could do without a gradient."""
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError(
            f'gradients="{gradients}" would update the weights from each part of a batch that nn.DataParallel '
            'cuts; use one device, or gradients="freed"'
        )
    groups = optimizer.param_groups
    low_rank = [param for param in params_of(groups) if groups[param.group].get("rank")]
    parallel = data_is_parallel(model)
    for param in low_rank:
        if param.tensor in parallel:
            raise ValueError(
                f'{param}: gradients="{gradients}" cannot update what fully_shard manages: the sum over ranks needs a '
                'gradient; use gradients="freed", which frees it as soon as it is reduced, or tensor parallel alone '
                "(parallelize_module), whose ranks see the same tokens"
            )
        names = owners_of(model, param.tensor)
        if len(names) > 1:
            raise ValueError(
                f"{param} is tied: {' and '.join(names)} are one weight, whose gradient comes in parts, and "
                f'gradients="{gradients}" would move it by each; untie them, put it into a group without '
                "'rank', or use gradients=\"freed\""
            )
    if not any(param.tensor in layers for param in low_rank):
        raise ValueError(
            f"gradients=\"{gradients}\": no weight of a group with a 'rank' is that of a plain nn.Linear or "
            'Int8Linear, so nothing would be gained; use gradients="freed"'
        )


def data_is_parallel(model: nn.Module) -> set[Tensor]:
    """The parameters whose gradient is a sum over ranks with other data: those that FSDP2 manages.

    That a mesh has one rank changes nothing: a layer computes with what FSDP2 has gathered for it.
    """
    return {parameter for module in sharded_modules(model) for parameter in module.parameters}


def check_parameter(param: Param) -> None:
    """Raise ValueError for a shard, whose gradient is not whole in its hook."""
    if is_flattened(param.tensor):
        raise ValueError(
            f"{param} is flattened by FullyShardedDataParallel, which reduces gradients after the hooks; "
            "use plain optimizer.step()"
        )


def check_groups(groups: list[dict[str, Any]], gradients: str) -> None:
    """Raise ValueError for a group that asks for what needs all gradients at once, or one that is not made."""
    for index, group in enumerate(groups):
        check_group(group, index, gradients)


def check_group(group: dict[str, Any], index: int, gradients: str) -> None:
    if gradients != "freed" and group.get("rank") is not None and group["proj"] == "svd":
        raise ValueError(
            f"parameter group {index}: proj='svd' takes singular vectors of a gradient, which "
            f'gradients="{gradients}" does not make; use proj="random", or gradients="freed"'
        )
    if group["max_grad_norm"] is not None:
        raise ValueError(
            f"parameter group {index}: max_grad_norm={group['max_grad_norm']!r} needs the norm of all gradients, of "
            "which layer-wise updates keep one at a time; use max_grad_norm=None (the norm-growth limiter stays), "
            "or plain optimizer.step()"
        )
    if group["capturable"]:
        raise ValueError(
            f"parameter group {index}: capturable=True captures a whole step, and layer-wise updates run inside "
            "backward; use capturable=False, or plain optimizer.step()"
        )


def check_operands(param: Param, gradients: str, was_updated: bool, ran_once: bool) -> None:
    """Raise RuntimeError unless a weight may be updated from its layer's operands now."""
    if param.tensor.grad is not None:
        raise RuntimeError(
            f"{param} has a gradient of an earlier backward, which this one would be added to, and with "
            f'gradients="{gradients}" there is none to add; call optimizer.zero_grad() before backward()'
        )
    if was_updated:
        raise RuntimeError(twice(param, gradients))
    if not ran_once:
        raise RuntimeError(
            f"{param}: its layer ran forward more than once, and each backward would move it by a part of its "
            'gradient; use attach_layerwise(..., gradients="freed"). A forward without training, whose output is '
            "still there, belongs into torch.no_grad()"
        )


def twice(param: Param, gradients: str) -> str:
    if gradients != "freed":
        return (
            f"{param}: backward comes by it a second time since the last optimizer.step(), and the first has moved it "
            f'already. Gradients do not accumulate with gradients="{gradients}": call optimizer.step() after each '
            'backward(), or use attach_layerwise(..., gradients="freed"), also for a layer that is used twice'
        )
    return (
        f"{param}: its gradient comes a second time since the last optimizer.step(), and the first part has moved it "
        "already. If it is shared between parts that torch.utils.checkpoint runs, use use_reentrant=False; if "
        "gradients accumulate over several backward(), run all but the last inside `with handle.accumulate():`; "
        "else call optimizer.step() after each backward()"
    )
