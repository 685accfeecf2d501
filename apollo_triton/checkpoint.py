"""Checkpoints of apollo-torch 1.0.3's APOLLOAdamW, read as a state of this package's APOLLOAdamW.

Their layout was learned by running apollo-torch. Its source (CC-BY-NC) was not read, and it need not be installed.
Besides tensors and numbers a checkpoint holds pickled projector objects. They are read into a stand-in class, so that
no code from a checkpoint is run.
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
    """Stands in for a pickled projector: it has the attributes, and none of the code."""


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
        ValueError: the file is no checkpoint; or it needs code other than tensors and the projectors above, which the
            error names; or it is from another optimizer: GaLore, 8-bit moments (QAPOLLO), or this package's own.
        OSError: the file is missing or cannot be read.

    >>> optimizer = APOLLOAdamW(groups, lr=1e-2)  # doctest: +SKIP
    >>> optimizer.load_state_dict(from_apollo_torch("checkpoint-500/optimizer.pt"))  # doctest: +SKIP

    Source: states of apollo-torch 1.0.3, observed by running it (``tests/optimizer/test_checkpoint.py``).
    """
    where = os.fspath(path) if isinstance(path, (str, os.PathLike)) else "the file"
    saved = _state_dict_in(_read(path, where), where)
    state: dict[Any, dict[str, Any]] = {}
    for group_index, group in enumerate(saved["param_groups"]):
        states = {index: saved["state"].get(index, {}) for index in group["params"]}
        _check_group(group, list(states.values()), f"{where}: parameter group {group_index}")
        for index, official in states.items():
            if "exp_avg" in official:  # else it never had a gradient
                state[index] = _converted(official, group, f"{where}: parameter {index}")
    return {"state": state, "param_groups": [dict(group) for group in saved["param_groups"]]}


def _read(path: str | os.PathLike[str] | IO[bytes], where: str) -> Any:
    """The content of the file: tensors, numbers, containers and ``_Projector``. Anything else is an error."""
    try:
        with torch.serialization.safe_globals([(_Projector, name) for name in _PROJECTORS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of any type, since bytes that are no pickle may fail anywhere
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            message = (
                f"{where} needs {refused[1]} to be read, which is not part of an apollo-torch optimizer's state and "
                "was not run; if you trust the file, save optimizer.state_dict() alone, in plain numbers, and read that"
            )
        else:
            message = f"{where} is not a checkpoint as torch.save writes it; give the file of optimizer.state_dict()"
    # Raised here, without PyTorch's error as its cause: that advises weights_only=False, which runs code of the file.
    raise ValueError(message)


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
    """Raise ValueError unless group and states have the keys that only the official APOLLOAdamW has."""
    is_low_rank = group.get("rank") is not None
    if "state_dtype" in group:
        raise ValueError(f"{where} was saved by this package; read it with torch.load, and load it as it is")
    if any({"state1", "__bnb_optimizer_quant_state__"} & state.keys() for state in states):
        raise ValueError(f"{where} has moments of bitsandbytes (as of QAPOLLOAdamW), which are not read{INSTEAD}")
    if is_low_rank and not {"proj", "proj_type", "scale_type"} <= group.keys():
        raise ValueError(f"{where} is GaLore's, whose moments belong to another algorithm{INSTEAD}")
    needed = {"step", "seed", "exp_avg_sq"} | ({"projector"} if is_low_rank else set())
    if "correct_bias" not in group or any("exp_avg" in state and not needed <= state.keys() for state in states):
        raise ValueError(f"{where} is not one of apollo-torch's APOLLOAdamW{INSTEAD}")


def _converted(official: Mapping[str, Any], group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our state of one parameter. The official ``seed`` is dropped: it seeded torch's generator, which our P does not
    use."""
    state: dict[str, Any] = {
        "step": torch.tensor(float(official["step"]), dtype=torch.float32, device="cpu"),
        "seed": group.get("seed", 0),
    }
    matrices = {name: official[name].float() for name in ("exp_avg", "exp_avg_sq")}
    if group.get("rank") is None:
        return state | matrices
    limiter = official.get("scaled_grad", 0.0)  # absent with disable_nl; ours begins at 0
    state["update_norm"] = torch.as_tensor(limiter, dtype=torch.float32, device="cpu")
    projection: Any = getattr(official["projector"], "ortho_matrix", None)
    keeps_rows = _keeps_rows(official["exp_avg"], projection, group, where)
    if group["proj"] == "svd":
        matrices["projection"] = projection.float()
    for name, matrix in matrices.items():  # contiguous: svd's matrices are column-major there
        state[name] = (matrix if keeps_rows else matrix.T).contiguous()
    return state


def _keeps_rows(moment: Tensor, projection: Any, group: Mapping[str, Any], where: str) -> bool:
    """Whether the rows of the weight are its channels.

    If they are, the official moments are ``[rows, rank]`` and P is ``[rank, columns]``. Otherwise the moments are
    ``[rank, columns]`` and P is ``[rows, rank]``. The shapes decide, except for a square weight whose rank is its whole
    width; for that the group's ``proj_type`` does.
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
