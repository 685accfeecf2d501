"""Checkpoints of apollo-torch 1.0.3's APOLLOAdamW, read as a state of this package's APOLLOAdamW.

Their layout was learned by running apollo-torch. Its source (CC-BY-NC) was not read, and it need not be installed.
Besides tensors and numbers a checkpoint holds pickled projector objects. ``core/torch_file.py`` reads their attributes
and runs no code.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

from .core.files import open_regular
from .core.geometry import Geometry
from .core.messages import shown
from .core.settings import CHECKS
from .core.torch_file import NotReadable, SavedObject, SavedTensor, TorchFile, UnknownClass

INSTEAD = "; load the weights alone, and begin with a fresh optimizer"
MOST_STEPS = 2**24  # a step count in float32 goes no further
MOST_VALUES, MOST_LEVELS = 1_000_000, 8  # of a group's own values, all together, and of lists in lists

# GaLore's projectors are read too, so that the error can say that the checkpoint is GaLore's.
_PROJECTORS = (
    "apollo_torch.random_projector.GradientProjector",
    "apollo_torch.svd_projector.GaLoreProjector",
    "galore_torch.galore_projector.GaLoreProjector",
)


def from_apollo_torch(path: str | os.PathLike[str] | IO[bytes]) -> dict[str, Any]:
    """Read a checkpoint of apollo-torch 1.0.3's ``APOLLOAdamW``: a ``state_dict`` for ``load_state_dict``.

    Load it into an optimizer that has the same parameters in the same groups. Training continues with the checkpoint's
    moments, step count and u_prev of the limiter, all in float32, and with its projection if ``proj="svd"``. The
    official random projection is dropped. From the next step on P is this package's own, made from the step and the
    saved group's ``seed`` (0 if it has none). That is a refresh of P, up to ``update_proj_gap`` steps early.

    Groups keep their keys. Keys that they leave out get the constructor's values. ``scale_front`` and ``disable_nl``
    are such keys, because apollo-torch does not save them: pass them again.

    No code from the file is run, and apollo-torch need not be installed.

    Args:
        path: a file that ``torch.save`` wrote, as a path or an open binary file. It holds the optimizer's
            ``state_dict()`` (the Hugging Face Trainer's ``optimizer.pt``), or a dictionary that has it under a key such
            as "optimizer".

    Returns:
        A ``state_dict`` on the CPU. The state of a matrix has ``step`` (scalar), ``seed``, ``exp_avg`` and
        ``exp_avg_sq`` ``[channels, rank]`` (apollo-torch keeps ``[rank, channels]`` if columns are kept),
        ``update_norm`` (scalar, 0 if there was no limiter), and for svd ``projection`` ``[rank, width]``. The state of
        a dense parameter has ``step``, ``seed``, and moments of the parameter's shape. Parameters that never had a
        gradient have no state.

    Raises:
        ValueError: the file is no checkpoint, or is damaged; or it needs code other than tensors and projectors, which
            the error names; or it is from another optimizer: GaLore, 8-bit moments (QAPOLLO), or this package's own.
        OSError: the file is missing or cannot be read.
        TypeError: ``path`` is neither a path nor a file.

    >>> optimizer = APOLLOAdamW(groups, lr=1e-2)  # doctest: +SKIP
    >>> optimizer.load_state_dict(from_apollo_torch("checkpoint-500/optimizer.pt"))  # doctest: +SKIP

    Source: states of apollo-torch 1.0.3, observed by running it (``tests/optimizer/test_checkpoint.py``).
    """
    is_binary = hasattr(path, "read") and not isinstance(path, io.TextIOBase)
    if not isinstance(path, (str, os.PathLike)) and not is_binary:
        raise TypeError(f"path is {shown(path)}; give a path, or a file that is open for reading bytes")
    if not isinstance(path, (str, os.PathLike)):
        return _read(path, "the file")
    with open_regular(path) as file:
        return _read(file, os.fspath(path))


def _read(file: IO[bytes], where: str) -> dict[str, Any]:
    """What ``from_apollo_torch`` returns. ``where`` opens the error messages."""
    try:
        opened = TorchFile(file, _PROJECTORS)
        saved = _state_dict_in(opened.content, where)
        return _converted_state_dict(saved, opened, where)
    except UnknownClass as error:
        raise ValueError(
            f"{where} needs {shown(str(error))} to be read, which is not part of an apollo-torch optimizer's state and "
            "was not run; if you trust the file, save optimizer.state_dict() alone, in plain numbers, and read that"
        ) from None
    except NotReadable as error:
        raise ValueError(
            f"{where} is not a checkpoint as torch.save writes it ({error}); give the file of optimizer.state_dict()"
        ) from None


def _converted_state_dict(saved: Mapping[str, Any], opened: TorchFile, where: str) -> dict[str, Any]:
    state: dict[Any, dict[str, Any]] = {}
    groups = []
    for group_index, group in enumerate(saved["param_groups"]):
        at = f"{where}: parameter group {group_index}"
        _check_plain(group, at)
        states = {index: saved["state"].get(index, {}) for index in _indices(group["params"], at)}
        if state.keys() & states.keys():
            raise ValueError(f"{at} has a parameter of a group before it; each parameter belongs to one group")
        _check_group(group, list(states.values()), at)
        for index, official in states.items():
            if "exp_avg" in official:  # else it never had a gradient
                state[index] = _converted(official, group, opened, f"{where}: parameter {shown(index)}")
        groups.append({key: _opened(value, opened) for key, value in group.items()})
    return {"state": state, "param_groups": groups}


def _opened(value: Any, opened: TorchFile) -> Any:
    return opened.tensor(value) if isinstance(value, SavedTensor) else value


def _indices(params: Any, where: str) -> list[int | str]:
    """The parameters of a group: integers, or names."""
    if not isinstance(params, list) or not all(type(index) in (int, str) for index in params):
        raise ValueError(f"{where}: params is {shown(params)}; it must be a list of integers or of names")
    return params


def _check_plain(group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless a group's values are tensors, or numbers, texts, and lists of them of sensible size."""
    left = MOST_VALUES
    for key, value in group.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: its key {shown(key)} is no text")
        values, level = [value], 0
        while values:
            left, level = left - len(values), level + 1
            inner = [item for item in values if isinstance(item, (list, tuple, dict))]
            if level > MOST_LEVELS or sum(map(len, inner)) > left:
                raise ValueError(f"{where}: {shown(key)} is {shown(value)}, which is nested too deeply or too large")
            refused = (SavedObject,) if level == 1 else (SavedObject, SavedTensor)
            if any(isinstance(item, refused) for item in values):
                raise ValueError(f"{where}: {shown(key)} is {shown(value)}; give numbers and texts")
            values = [item for each in inner for item in (each.items() if isinstance(each, dict) else each)]


def _state_dict_in(loaded: Any, where: str) -> Mapping[str, Any]:
    """The one optimizer state of a checkpoint, which may also hold models and counters. It is the whole checkpoint, or
    the value of a key, or an entry of a list under a key (Lightning's "optimizer_states")."""
    if _is_state_dict(loaded):
        return loaded
    found = []
    for name, value in loaded.items() if isinstance(loaded, Mapping) else ():
        candidates = value if isinstance(value, list) else [value]
        found += [(name, candidate) for candidate in candidates if _is_state_dict(candidate)]
    if len(found) != 1:
        names = shown(tuple(name for name, _ in found))
        problem = f"holds {len(found)} optimizers {names}" if found else "holds no optimizer's state_dict"
        raise ValueError(f"{where} {problem}; save one optimizer.state_dict() with torch.save, and read that")
    return found[0][1]


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)


def _check_group(group: Mapping[str, Any], states: list[Mapping[str, Any]], where: str) -> None:
    """Raise ValueError unless group and states have the keys that only the official APOLLOAdamW has."""
    is_low_rank = group.get("rank") is not None
    if not all(isinstance(state, Mapping) for state in states):
        raise ValueError(f"{where} has a parameter whose state is no dictionary{INSTEAD}")
    if "state_dtype" in group or any(_is_ours(state) for state in states):
        raise ValueError(f"{where} was saved by this package; read it with torch.load, and load it as it is")
    if group.keys() <= {"params", "lr", "initial_lr"}:
        raise ValueError(
            f"{where} is the Trainer's placeholder for layer-wise optimizers (apollo_adamw_layerwise), whose state it "
            f"never saves{INSTEAD}"
        )
    if any({"state1", "__bnb_optimizer_quant_state__"} & state.keys() for state in states):
        raise ValueError(f"{where} has moments of bitsandbytes (as of QAPOLLOAdamW), which are not read{INSTEAD}")
    if is_low_rank and not {"proj", "proj_type", "scale_type"} <= group.keys():
        raise ValueError(f"{where} is GaLore's, whose moments belong to another algorithm{INSTEAD}")
    needed = {"step", "seed", "exp_avg_sq"} | ({"projector"} if is_low_rank else set())
    if "correct_bias" not in group or any("exp_avg" in state and not needed <= state.keys() for state in states):
        raise ValueError(f"{where} is not one of apollo-torch's APOLLOAdamW{INSTEAD}")


def _is_ours(state: Mapping[str, Any]) -> bool:
    """As ``from_apollo_torch`` returned it: a count of steps in a tensor. torch.optim has no seed beside that."""
    return "seed" in state and isinstance(state.get("step"), SavedTensor)


def _converted(official: Mapping[str, Any], group: Mapping[str, Any], opened: TorchFile, where: str) -> dict[str, Any]:
    """Our state of one parameter. The official ``seed`` is dropped: it seeded torch's generator, which our P does not
    use."""
    names = ("seed",) if group.get("rank") is None else ("seed", "rank", "proj", "proj_type")
    for name in names:
        if name in group and not CHECKS[name].allows(group[name]):
            raise ValueError(f"{where}: {name} of its group is {shown(group[name])} (allowed: {CHECKS[name].allowed})")
    step = official["step"]
    if type(step) is not int or not 0 < step <= MOST_STEPS:
        raise ValueError(f"{where}: step is {shown(step)}; it must be an integer from 1 to 2**24")
    state: dict[str, Any] = {"step": torch.tensor(float(step), device="cpu"), "seed": group.get("seed", 0)}
    matrices = {name: _matrix(official[name], opened, f"{where}: {name}") for name in ("exp_avg", "exp_avg_sq")}
    if group.get("rank") is None:
        _check_shapes(matrices, where)
        return state | {name: matrix.contiguous() for name, matrix in matrices.items()}
    state["update_norm"] = _norm(official.get("scaled_grad", 0.0), opened, f"{where}: scaled_grad")
    projector = official["projector"]
    saved_projection = projector.attributes.get("ortho_matrix") if isinstance(projector, SavedObject) else None
    is_svd = group["proj"] == "svd"
    if is_svd and isinstance(saved_projection, SavedTensor):  # a random one is not read
        matrices["projection"] = _matrix(saved_projection, opened, f"{where}: projection")
    keeps_rows = _keeps_rows(matrices["exp_avg"].shape, getattr(saved_projection, "shape", ()), group, where)
    _check_shapes(matrices, where)
    for name, matrix in matrices.items():  # copied: svd's P is a view into all singular vectors, in either order
        state[name] = (matrix if keeps_rows else matrix.T).clone(memory_format=torch.contiguous_format)
    return state


def _check_shapes(matrices: Mapping[str, Tensor], where: str) -> None:
    first, second = (tuple(matrices[name].shape) for name in ("exp_avg", "exp_avg_sq"))
    if first != second:
        raise ValueError(f"{where}: exp_avg has shape {first} and exp_avg_sq {second}; they must be equal{INSTEAD}")


def _matrix(saved: Any, opened: TorchFile, where: str) -> Tensor:
    """A tensor of real numbers in float32."""
    if not isinstance(saved, SavedTensor):
        raise ValueError(f"{where} is {shown(saved)}; it must be a tensor{INSTEAD}")
    tensor = opened.tensor(saved)
    if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"{where} is {shown(tensor)}; it must have floats of 16, 32 or 64 bits{INSTEAD}")
    return tensor.float()


def _norm(saved: Any, opened: TorchFile, where: str) -> Tensor:
    """The limiter's norm of the last update: absent with disable_nl; ours begins at 0."""
    if isinstance(saved, SavedTensor):
        tensor = _matrix(saved, opened, where)
        saved = tensor.item() if tensor.numel() == 1 else tensor
    if type(saved) not in (int, float) or not 0 <= saved <= torch.finfo(torch.float32).max:
        raise ValueError(f"{where} is {shown(saved)}; it must be a finite number, 0 or more{INSTEAD}")
    return torch.tensor(float(saved), dtype=torch.float32, device="cpu")


def _keeps_rows(moments: torch.Size, sides: Any, group: Mapping[str, Any], where: str) -> bool:
    """Whether the rows of the weight are its channels.

    If they are, the official moments are ``[rows, rank]`` and P is ``[rank, columns]``. Otherwise the moments are
    ``[rank, columns]`` and P is ``[rows, rank]``. The shapes decide, except for a square weight whose rank is its whole
    width; for that the group's ``proj_type`` does.
    """
    rank = group["rank"]
    of_matrices = len(moments) == 2 and isinstance(sides, tuple) and len(sides) == 2
    rows = of_matrices and moments[1] == sides[0] == rank
    columns = of_matrices and moments[0] == sides[1] == rank
    if not rows and not columns:
        raise ValueError(
            f"{where}: moments of shape {tuple(moments)} and a projection of {shown(sides)} do not have the group's "
            f"rank {rank} (svd has no more singular vectors than the shorter side){INSTEAD}"
        )
    return Geometry.of(moments, group["proj_type"]).keeps_rows if rows and columns else rows
