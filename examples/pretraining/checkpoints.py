"""The folder of a run: its settings and its newest checkpoint. A checkpoint is either complete or not there."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .model import Trained

# The options that may change when a run is resumed. With any other change it would be another run.
FREE = {"until", "folder", "config", "save_every", "report", "log", "micro_batch", "validation_tokens"}


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Save the settings of a new run. Raises SystemExit if the folder holds a run with other settings."""
    path = folder / "run.json"
    # Settings without a checkpoint may be those of a call that failed, and may be overwritten.
    if not steps(folder) or not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise SystemExit(f"--folder {folder}: {error.strerror}; give a folder that can be written to") from error
        return
    kept = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(settings.keys() | kept.keys()):
        if name not in FREE and settings.get(name) != kept.get(name):
            raise SystemExit(
                f"{folder} holds a run with {name}={kept.get(name)!r}, this is {settings.get(name)!r}; "
                "give the same options to resume it, or another --folder"
            )


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, or 0 if there is none."""
    return max(steps(folder), default=0)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]


def save(folder: Path, step: int, trained: Trained, place: dict[str, Any]) -> None:
    """Save weights and optimizer once, and ``place`` for each rank. The previous checkpoint is deleted at the end."""
    rank, unfinished = _rank(), folder / "unfinished"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    _barrier()
    torch.save(place, unfinished / f"rank-{rank}.pt")
    if _is_sharded(trained):
        weights, state = get_state_dict(trained.bare, trained.optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=unfinished / "sharded")
    elif rank == 0:
        torch.save({"model": trained.bare.state_dict()}, unfinished / "model.pt")
        torch.save({"optimizer": trained.optimizer.state_dict()}, unfinished / "optimizer.pt")
    _barrier()
    if rank == 0:
        old = steps(folder)
        if step in old:
            shutil.rmtree(folder / f"step-{step}")
        unfinished.rename(folder / f"step-{step}")
        for old_step in old:
            if old_step != step:
                shutil.rmtree(folder / f"step-{old_step}")
    _barrier()


def load(folder: Path, step: int, trained: Trained) -> dict[str, Any]:
    """Load weights and optimizer. Returns this rank's ``place``."""
    kept = folder / f"step-{step}"
    if _is_sharded(trained):
        weights, state = get_state_dict(trained.bare, trained.optimizer)
        loaded = {"model": weights, "optimizer": state}
        dcp.load(loaded, checkpoint_id=kept / "sharded")
        parts = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
        set_state_dict(trained.bare, trained.optimizer, **parts)
    else:
        device = next(trained.bare.parameters()).device
        for name, part in (("model", trained.bare), ("optimizer", trained.optimizer)):
            part.load_state_dict(torch.load(kept / f"{name}.pt", map_location=device, weights_only=True)[name])
    return torch.load(kept / f"rank-{_rank()}.pt", map_location="cpu", weights_only=True)


def settings_of(options: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """What identifies a run: all options, and the number of ranks that share its data."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()} | {
        "ranks": ranks
    }


def _is_sharded(trained: Trained) -> bool:
    return isinstance(trained.bare, torch.distributed.fsdp.FSDPModule)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
