"""Weights of a float checkpoint for a model whose weights may be int8, sharded, both or neither, slice by slice.

A model that was made on the meta device, made int8, sharded and given memory by ``to_empty`` is filled here: each rank
reads its own part of each weight, some rows at a time. So no rank ever holds a weight in floats, let alone the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dtensors import local, local_slices
from ..core.extras import require
from ..core.messages import listed, shown
from . import weight as int8
from .weight import FLOATS, Int8Weight

# What wrappers put between the names of a model: torch.compile, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
# How safetensors calls the dtypes that an int8 weight is made of, and others of floats.
_FLOATS = {"F32", "BF16", "F16", "F64"}


def load_float_weights(model: nn.Module, files: str | Path | Iterable[str | Path]) -> None:
    """Fill the parameters and buffers of ``model`` from a float safetensors checkpoint, in place.

    Args:
        model: its weights have memory (after ``to_empty``). They may be int8 (``quantize_model``), sharded
            (``fully_shard``, ``parallelize_module``), both or neither. Each rank reads its part of each.
        files: a ``.safetensors`` file, several, the ``.json`` index of some, or a folder with an index or with files.

    An int8 weight gets the bits of the whole float weight, rounded to the nearest and then cut. A weight of several
    names needs to be there under one of them. Buffers that no ``state_dict`` holds, such as those of rotary embeddings,
    are read where the files have them, and else left as they are: after ``to_empty`` make them again.

    Raises ValueError, before anything changes: for a name that is missing, left over or in two files, another shape, no
    floats where floats are needed, or a weight on the meta device. A value that is not finite is found when an int8
    weight is read: the error then says that others are filled.

    >>> load_float_weights(model, "Llama-3.1-70B")  # doctest: +SKIP
    """
    require("safetensors", "demo")
    from safetensors import safe_open

    targets = _targets(model)
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        for path in _paths(files):
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            if twice := sorted(found.keys() & file.keys()):
                raise ValueError(f"{path} has {_listed(twice)} once more; name the files of one checkpoint")
            found.update(dict.fromkeys(file.keys(), file))
        chosen = _chosen(model, targets, found)
        faults = [fault for name, target in chosen.items() if (fault := _fault(name, target, found[name]))]
        if faults:
            more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ValueError("the checkpoint does not fit the model: " + "; ".join(faults[:3]) + more)
        with torch.no_grad():
            for name, target in chosen.items():
                _fill(name, target, found[name])


def _paths(files: str | Path | Iterable[str | Path]) -> Iterator[Path]:
    """The safetensors files that ``files`` names."""
    for each in [files] if isinstance(files, str | Path) else files:
        path = Path(each)
        if path.is_dir():
            indices = sorted(path.glob("*.safetensors.index.json"))
            inside = indices if len(indices) == 1 else sorted(path.glob("*.safetensors"))
            if not inside:
                raise FileNotFoundError(f"there is no .safetensors file in {path}")
            yield from _paths(inside)
        elif path.suffix == ".json":
            index = json.loads(path.read_text())
            if not isinstance(index, dict) or "weight_map" not in index:
                raise ValueError(f"{path} is no index of safetensors files, since it has no weight_map")
            yield from (path.parent / name for name in sorted(set(index["weight_map"].values())))
        else:
            yield path


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    targets = {}
    for name, tensor in named:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        targets[name] = tensor
    return targets


def _chosen(model: nn.Module, targets: Mapping[str, Tensor], found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which of the files' names fills each tensor. Raises ValueError for names that are missing or left over."""
    chosen: dict[str, Tensor] = {}
    names_of: dict[int, list[str]] = {}
    for name, tensor in targets.items():
        names_of.setdefault(id(tensor), []).append(name)
    not_saved = {
        id(module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set  # of which no state_dict tells
    }
    missing = []
    for key, names in names_of.items():
        there = [name for name in names if name in found]
        if there:
            chosen[there[0]] = targets[there[0]]
        elif key not in not_saved:
            missing.append(names[0])
    left_over = sorted(found.keys() - targets.keys())
    if any(name.endswith(".weight_q") for name in left_over):
        raise ValueError(
            f"the checkpoint holds int8 weights ({_listed(left_over)}), which model.load_state_dict(...) and "
            "torch.distributed.checkpoint load"
        )
    if missing:
        raise ValueError(
            f"the checkpoint lacks {_listed(sorted(missing))}; what to_empty has untied is to be tied again before, "
            "such as by model.tie_weights()"
        )
    if left_over:
        raise ValueError(f"the checkpoint has {_listed(left_over)}, which the model does not")
    return chosen


def _fault(name: str, target: Tensor, file: Any) -> str | None:
    entry = file.get_slice(name)
    shape, dtype = tuple(entry.get_shape()), entry.get_dtype()
    if shape != tuple(target.shape):
        return f"{name} has shape {shape}, and the model's {tuple(target.shape)}"
    if local(target).is_meta:
        return f"{name} is on the meta device; model.to_empty(device=...) gives it memory"
    if target.dtype in FLOATS and dtype not in _FLOATS:
        return f"{name} is {dtype}, and is to be one of {', '.join(sorted(_FLOATS))}"
    if not target.dtype.is_floating_point and dtype in _FLOATS:
        return f"{name} is {dtype}, and the model's {target.dtype}"
    return None


def _fill(name: str, target: Tensor, file: Any) -> None:
    """Read this rank's part of a tensor, some rows at a time."""
    here, slices = local(target), local_slices(target)
    if not here.numel():
        return
    if not here.dim():
        here.copy_(file.get_tensor(name))
        return
    entry, first = file.get_slice(name), slices[0].start
    for rows in _blocks(here):
        place = slice(first + rows.start, first + rows.stop), *slices[1:]
        values = entry[place]
        if not isinstance(here, Int8Weight):
            here[rows].copy_(values)
            continue
        values = values.to(here.device, torch.float32)
        if not int8.is_finite(values):
            raise ValueError(
                f"{name} has values that are NaN or infinite, which int8 weights cannot hold; other weights are filled "
                "already, so load a whole checkpoint before the model is used"
            )
        here.store(rows, values)


def _blocks(here: Tensor) -> Iterator[slice]:
    if isinstance(here, Int8Weight):
        yield from here.blocks()
        return
    step = max(1, int8.BLOCK_ELEMENTS * here.shape[0] // here.numel())
    for start in range(0, here.shape[0], step):
        yield slice(start, min(start + step, here.shape[0]))


def _listed(names: list[str]) -> str:
    return listed([*map(shown, names)], 5)
