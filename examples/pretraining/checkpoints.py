"""The folder of a run: its settings and its newest checkpoint. A checkpoint is either complete or not there.

Each file of a checkpoint ends in its checksum, which is looked at before anything is loaded.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import LlamaConfig

from apollo_triton.core.files import open_regular, replaced
from apollo_triton.core.messages import shown
from apollo_triton.tools import checkpoints as files

from .data import Packer
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
            with replaced(path) as unfinished:
                unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise SystemExit(f"--folder {folder}: {reason}; give a folder that can be written to") from error
        return
    try:
        with open_regular(path) as file:
            kept = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path} cannot be read ({error}); give another --folder, or delete it") from error
    if not isinstance(kept, dict):
        raise SystemExit(f"{path} holds {shown(kept)}, not the settings of a run; give another --folder, or delete it")
    for name in sorted(settings.keys() | kept.keys()):
        if name not in FREE and settings.get(name) != kept.get(name):
            raise SystemExit(
                f"{folder} holds a run with {shown(name)[1:-1]}={shown(kept.get(name))}, this is "
                f"{settings.get(name)!r}; give the same options to resume it, or another --folder"
            )


def write_config(folder: Path, config: LlamaConfig) -> None:
    """Write ``config.json``, by which the run and its reader make the model. Raises SystemExit if it cannot be."""
    try:
        with replaced(folder / "config.json") as unfinished:
            unfinished.write_text(config.to_json_string(), encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"--folder {folder}: {error}; give a folder that can be written to") from error


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, or 0 if there is none."""
    return max(steps(folder), default=0)


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint: a folder with such a name."""
    found = (re.fullmatch(r"step-([1-9]\d{0,17})", path.name) for path in folder.glob("step-*") if path.is_dir())
    return [int(match[1]) for match in found if match]


def save(folder: Path, step: int, trained: Trained, place: dict[str, Any]) -> None:
    """Save weights and optimizer once, and ``place`` for each rank. The previous checkpoint is deleted at the end.

    Raises SystemExit if nothing can be written. The previous checkpoint is still there then.
    """
    rank, unfinished = _rank(), folder / "unfinished"
    errors = OSError, dcp.api.CheckpointException
    remedy = "the checkpoint before it is kept; give a folder that can be written to"
    with _one_line(f"--folder {folder}: step {step} cannot be saved", remedy, errors):
        if rank == 0:
            _delete(unfinished)
            unfinished.mkdir(parents=True)
        _barrier()
        files.save(unfinished / f"rank-{rank}.pt", place)
        if _is_sharded(trained):
            weights, state = get_state_dict(trained.bare, trained.optimizer)
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=unfinished / "sharded")
            for path in _shards(unfinished):
                files.seal(path)
        elif rank == 0:
            files.save(unfinished / "model.pt", {"model": trained.bare.state_dict()})
            files.save(unfinished / "optimizer.pt", {"optimizer": trained.optimizer.state_dict()})
        _barrier()
        if rank == 0:
            old = steps(folder)
            _delete(folder / f"step-{step}")
            unfinished.rename(folder / f"step-{step}")
            for old_step in old:
                if old_step != step:
                    _delete(folder / f"step-{old_step}")
        _barrier()


def load(folder: Path, step: int, trained: Trained, training: Packer) -> dict[str, Any]:
    """Load weights, optimizer, and this rank's place in its data. Returns the state of its reports.

    Raises SystemExit if a file is damaged, missing, or of something else.
    """
    kept = folder / f"step-{step}"
    remedy = f"give another --folder, or delete {kept}, which begins this run anew"
    device = next(trained.bare.parameters()).device
    with _one_line(f"{kept} cannot be loaded", remedy, (Exception,)):  # of any type: a file may hold anything
        if _is_sharded(trained):
            for path in _shards(kept):
                files.check(path, remedy)
            weights, state = get_state_dict(trained.bare, trained.optimizer)
            loaded = {"model": weights, "optimizer": state}
            dcp.load(loaded, checkpoint_id=kept / "sharded")
            parts = {"model_state_dict": loaded["model"], "optim_state_dict": loaded["optimizer"]}
            set_state_dict(trained.bare, trained.optimizer, **parts)
        else:
            loaded = {
                name: files.load(kept / f"{name}.pt", {name: dict}, remedy, device) for name in ("model", "optimizer")
            }
            trained.bare.load_state_dict(loaded["model"]["model"])
            trained.optimizer.load_state_dict(loaded["optimizer"]["optimizer"])
        place = files.load(kept / f"rank-{_rank()}.pt", {"training": dict, "reports": dict}, remedy)
        training.load_state_dict(place["training"])
        losses = [pair for name in ("losses", "validation") for pair in place["reports"][name]]
        if any(tuple(map(type, pair)) != (int, float) for pair in losses):
            raise ValueError(f"its losses are {shown(losses)}, not pairs of a step and a loss")
        return place["reports"]


def _shards(folder: Path) -> list[Path]:
    """The files of a sharded checkpoint that this rank writes. Rank 0 also writes their list."""
    rank = _rank()
    return [
        *(folder / "sharded").glob(f"__{rank}_*.distcp"),
        *([folder / "sharded" / ".metadata"] if rank == 0 else []),
    ]


def _delete(path: Path) -> None:
    """Delete a folder with what is in it, or a file, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _one_line(what: str, remedy: str, errors: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Turns ``errors`` into SystemExit with one line."""
    try:
        yield
    except files.NotWhole as error:
        raise SystemExit(str(error)) from error
    except errors as error:
        raise SystemExit(f"{what} ({files.first_line(error)}); {remedy}") from error


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
