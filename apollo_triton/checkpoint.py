"""Checkpoints of apollo-torch 1.0.3's APOLLOAdamW, read as a state of this package's.

Its layout was learned by running it: its source (CC-BY-NC) was neither read nor is it needed here. What it pickles
besides tensors and numbers, its projector objects, is read into a stand-in, so nothing of a checkpoint is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

from .core.geometry import Geometry

INSTEAD = "; load the weights alone, and begin with a fresh optimizer"


class _Projector:
    """Stands in for a pickled projector: its attributes, and none of its code."""


# GaLore's are read too, so that the error can say that it is GaLore.
_PROJECTORS = (
    "apollo_torch.random_projector.GradientProjector",
    "apollo_torch.svd_projector.GaLoreProjector",
    "galore_torch.galore_projector.GaLoreProjector",
)


def from_apollo_torch(path: str | os.PathLike[str] | IO[bytes]) -> dict[str, Any]:
    """Read a checkpoint of apollo-torch 1.0.3's ``APOLLOAdamW``: a ``state_dict`` for ``load_state_dict``.

    The optimizer it is loaded into has the same parameters in the same groups. Training goes on with the moments, the
    step count and the limiter's u_prev of the checkpoint, all in float32; with ``proj="svd"`` the projection comes
    along too. The official random projection is dropped: from the next step P is this package's own, of that step
    and of the saved group's ``seed`` or 0: a refresh, up to ``update_proj_gap`` steps early.
    Groups keep their keys; what they leave out is the constructor's, among it ``scale_front`` and ``disable_nl``,
    which apollo-torch does not save: pass them again.

    Nothing in the file is run, and apollo-torch need not be installed.

    Args:
        path: what ``torch.save`` wrote, as a path or an open binary file: the optimizer's ``state_dict()`` (the
            Hugging Face Trainer's ``optimizer.pt``), or a dictionary that has it under a key such as "optimizer".

    Returns:
        A ``state_dict`` on the CPU. The state of a matrix has ``step`` (scalar), ``seed``, ``exp_avg`` and
        ``exp_avg_sq`` ``[channels, rank]`` (apollo-torch keeps ``[rank, channels]`` where columns are kept),
        ``update_norm`` (scalar, 0 if there was no limiter), and for svd ``projection`` ``[rank, width]``; that of a
        dense parameter ``step``, ``seed``, and moments of its shape. Parameters that never had a gradient have none.

    Raises:
        ValueError: no checkpoint, one that needs other code than tensors and the two projectors (the error names it),
            or one of another optimizer: GaLore, 8-bit moments (QAPOLLO), this package's own.
        OSError: the file is missing or cannot be read.

    >>> optimizer = APOLLOAdamW(groups, lr=1e-2)  # doctest: +SKIP
    >>> optimizer.load_state_dict(from_apollo_torch("checkpoint-500/optimizer.pt"))  # doctest: +SKIP

    Source: the states of apollo-torch 1.0.3, seen by running it (``tests/optimizer/test_checkpoint.py``).
    """
    where = os.fspath(path) if isinstance(path, (str, os.PathLike)) else "the file"
    saved = _state_dict_in(_read(path, where), where)
    state: dict[Any, dict[str, Any]] = {}
    for number, group in enumerate(saved["param_groups"]):
        states = {index: saved["state"].get(index, {}) for index in group["params"]}
        _check_group(group, list(states.values()), f"{where}: parameter group {number}")
        for index, official in states.items():
            if "exp_avg" in official:  # else it never had a gradient
                state[index] = _converted(official, group, f"{where}: parameter {index}")
    return {"state": state, "param_groups": [dict(group) for group in saved["param_groups"]]}


def _read(path: str | os.PathLike[str] | IO[bytes], where: str) -> Any:
    """What the file holds: tensors, numbers, containers and ``_Projector``; anything else is an error."""
    try:
        with torch.serialization.safe_globals([(_Projector, name) for name in _PROJECTORS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any type: bytes that are no pickle fail anywhere
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            message = (
                f"{where} needs {refused[1]} to be read, which is not part of an apollo-torch optimizer's state and "
                "was not run; if you trust the file, save optimizer.state_dict() alone, in plain numbers, and read that"
            )
        else:
            message = f"{where} is not a checkpoint as torch.save writes it; give the file of optimizer.state_dict()"
    # Without its cause, PyTorch's text: that advises to load the file with weights_only=False, which runs it.
    raise ValueError(message)


def _state_dict_in(loaded: Any, where: str) -> Mapping[str, Any]:
    """The one optimizer state of a checkpoint, which may hold models and counters beside it: the whole, or under a
    key, there perhaps in a list (Lightning's "optimizer_states")."""
    if _is_state_dict(loaded):
        return loaded
    found = []
    for name, value in loaded.items() if isinstance(loaded, Mapping) else ():
        found += [(name, each) for each in (value if isinstance(value, list) else [value]) if _is_state_dict(each)]
    if len(found) != 1:
        names = ", ".join(repr(name) for name, _ in found)
        problem = f"holds {len(found)} optimizers ({names})" if found else "holds no optimizer's state_dict"
        raise ValueError(f"{where} {problem}; save one optimizer.state_dict() with torch.save, and read that")
    return found[0][1]


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)


def _check_group(group: Mapping[str, Any], states: list[Mapping[str, Any]], where: str) -> None:
    """Raise ValueError unless group and states are of the official APOLLOAdamW, by the keys that only it has."""
    is_low_rank = group.get("rank") is not None
    if "state_dtype" in group:
        raise ValueError(f"{where} was saved by this package; read it with torch.load, and load it as it is")
    if any({"state1", "__bnb_optimizer_quant_state__"} & state.keys() for state in states):
        raise ValueError(f"{where} has moments of bitsandbytes (QAPOLLOAdamW, say), which are not read{INSTEAD}")
    if is_low_rank and not {"proj", "proj_type", "scale_type"} <= group.keys():
        raise ValueError(f"{where} is GaLore's, whose moments belong to another algorithm{INSTEAD}")
    needed = {"step", "seed", "exp_avg_sq"} | ({"projector"} if is_low_rank else set())
    if "correct_bias" not in group or any("exp_avg" in state and not needed <= state.keys() for state in states):
        raise ValueError(f"{where} is not one of apollo-torch's APOLLOAdamW{INSTEAD}")


def _converted(official: Mapping[str, Any], group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our state of one parameter. The official ``seed`` is dropped: torch's generator took it, our P does not."""
    state: dict[str, Any] = {
        "step": torch.tensor(float(official["step"]), dtype=torch.float32, device="cpu"),
        "seed": group.get("seed", 0),
    }
    matrices = {name: official[name].float() for name in ("exp_avg", "exp_avg_sq")}
    if group.get("rank") is None:
        return state | matrices
    limiter = official.get("scaled_grad", 0.0)  # absent where disable_nl was; 0 is what ours begins with
    state["update_norm"] = torch.as_tensor(limiter, dtype=torch.float32, device="cpu")
    projection: Any = getattr(official["projector"], "ortho_matrix", None)
    keeps_rows = _keeps_rows(official["exp_avg"], projection, group, where)
    if group["proj"] == "svd":
        matrices["projection"] = projection.float()
    for name, matrix in matrices.items():  # svd's are column-major there
        state[name] = (matrix if keeps_rows else matrix.T).contiguous()
    return state


def _keeps_rows(moment: Tensor, projection: Any, group: Mapping[str, Any], where: str) -> bool:
    """Whether the rows of the weight are its channels.

    Then the official moments are ``[rows, rank]`` and its P ``[rank, columns]``; otherwise ``[rank, columns]`` and
    ``[rows, rank]``. Only a square weight whose rank is its whole width leaves that open.
    """
    rank = group["rank"]
    sides = tuple(projection.shape) if isinstance(projection, Tensor) else ()
    rows = sides[:1] == (rank,) == moment.shape[1:]
    columns = sides[1:] == (rank,) == moment.shape[:-1]
    if not rows and not columns:
        raise ValueError(
            f"{where}: moments of shape {tuple(moment.shape)} and a projection of {sides} do not have the group's "
            f"rank {rank} (svd has no more singular vectors than the shorter side){INSTEAD}"
        )
    return Geometry.of(moment.shape, group["proj_type"]).keeps_rows if rows and columns else rows
