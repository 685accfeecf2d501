"""``apollo-triton convert``: a checkpoint of apollo-torch, rewritten as one that this package and the Trainer load.

What the numbers become is said in ``checkpoint.py``. Here are the files: the old ones are only read, and the new one,
or the new folder, appears whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import from_apollo_torch
from ..core.files import open_regular, replaced
from ..core.messages import shown
from .checkpoints import first_line
from .text import as_bytes, fill, table

# The state's file in the folders of the Trainer and of Accelerate.
NAMES = "optimizer.pt", "optimizer.bin"
# Parts of a state: PyTorch's distributed checkpoints (FSDP), the second of Accelerate's optimizers, DeepSpeed's folder.
_PARTS = "*.distcp", "optimizer_[0-9]*", "global_step*"


def run(options: argparse.Namespace) -> int:
    """Write ``options.new``, and print what it has, what it lacks, and how to load it.

    Raises OSError or ValueError, one line that names the path, and then leaves nothing behind.
    """
    old, new = options.old, options.new
    folder = new.absolute().parent
    if not old.exists():
        raise FileNotFoundError(f"there is no {old}; give the file of optimizer.state_dict(), or a Trainer's folder")
    if os.path.lexists(new):
        raise FileExistsError(f"{new} is there already, and nothing is overwritten; give another path")
    if not folder.is_dir():
        raise FileNotFoundError(f"{new} cannot be written: there is no folder {folder}; make it first")
    if not old.is_dir():
        state_dict = from_apollo_torch(old)
        with replaced(new) as unfinished:
            _save(state_dict, unfinished, new)
        _report(state_dict, old, new)
        return 0
    if new.resolve().is_relative_to(old.resolve()):
        raise ValueError(f"{new} is inside {old}, which stays as it is; give a path outside of it")
    source = _file_of_the_state(old)
    state_dict = from_apollo_torch(source)
    with _whole_folder(new) as unfinished:
        _copy_folder(old, unfinished, besides=source)
        _save(state_dict, unfinished / source.name, new)
    _report(state_dict, source, new)
    return 0


def _file_of_the_state(folder: Path) -> Path:
    """The one file of a checkpoint folder that holds the whole optimizer state."""
    parts = sorted(path.name for pattern in _PARTS for path in folder.glob(pattern))
    if parts:
        raise ValueError(
            f"{folder} has {shown(parts[0])}: its optimizer state is in parts, of shards or of several optimizers, "
            "which are not read; give the file of one whole optimizer.state_dict()"
        )
    found = [folder / name for name in NAMES if (folder / name).exists()]
    if len(found) != 1:
        inner = [path for path in folder.glob("checkpoint-*") if any((path / name).exists() for name in NAMES)]
        newest = max(inner, key=lambda path: path.stat().st_mtime, default=None)
        names = " and ".join(path.name for path in found) or f"no {' or '.join(NAMES)}"
        hint = f"one of its checkpoints, such as {newest}" if newest else "the Trainer's checkpoint-N, or one file"
        raise ValueError(f"{folder} has {names}, where one file of an optimizer's state is needed; give {hint}")
    return found[0]


def _save(state_dict: dict[str, Any], path: Path, new: Path) -> None:
    try:
        torch.save(state_dict, path)
    except RuntimeError as error:  # where the disk is full, without a number or a name
        raise OSError(f"{new} cannot be written ({first_line(error)})") from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, to fill. It gets that name if the block ends well, else it is deleted."""
    unfinished = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    try:
        unfinished.mkdir()
        yield unfinished
        os.rename(unfinished, path)  # fails if something with content has come there meanwhile
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        is_ours = isinstance(error, OSError) and str(error.filename or unfinished).startswith(str(unfinished))
        if isinstance(error, OSError) and error.errno and is_ours:
            raise OSError(error.errno, error.strerror, str(path)) from error  # not a name that nobody knows
        raise


def _copy_folder(old: Path, new: Path, besides: Path) -> None:
    """Copy every file with its date, and every folder, but not the file ``besides``. A link to a file becomes one."""
    for folder, inner, names in os.walk(old, onerror=_raise):
        here = new / Path(folder).relative_to(old)
        for name in inner:
            if Path(folder, name).is_symlink():
                raise ValueError(f"{Path(folder, name)} is a link to a folder, which is not followed; remove the link")
            (here / name).mkdir()
        for source in (Path(folder, name) for name in names):
            if source != besides:
                _copy(source, here / source.name)


def _copy(source: Path, target: Path) -> None:
    with open_regular(source) as read, target.open("xb") as written:
        shutil.copyfileobj(read, written, 2**22)
        written.flush()
        os.fsync(written.fileno())
    shutil.copystat(source, target)


def _raise(error: OSError) -> None:
    raise error


def _report(state_dict: Mapping[str, Any], source: Path, new: Path) -> None:
    """Print what was read, and what became of it."""
    groups, states = state_dict["param_groups"], state_dict["state"]
    rows = [("group", "kind", "parameters", "steps", "state")]
    for index, group in enumerate(groups):
        own = [states[key] for key in group["params"] if key in states]
        steps = sorted({int(state["step"]) for state in own})
        kind = f"rank {group['rank']}, {group['proj']}" if group.get("rank") is not None else "dense"
        size = sum(value.nbytes for state in own for value in state.values() if torch.is_tensor(value))
        span = "-".join(map(str, dict.fromkeys([*steps[:1], *steps[-1:]]))) or "none"
        rows.append((str(index), kind, str(len(group["params"])), span, as_bytes(size)))
    files = [path for path in new.rglob("*") if path.is_file()] if new.is_dir() else [new]
    total = as_bytes(sum(path.stat().st_size for path in files))
    many = f"{len(files)} files, {total}" if new.is_dir() else total
    paragraphs = [
        fill(f"{source}, which apollo-torch wrote, is now in {new} ({many})."),
        table(rows, left=(0, 1)),
        *map(fill, _what_goes_on(groups, states)),
        _how_to_load(new),
    ]
    print("\n\n".join(paragraphs))


def _what_goes_on(groups: list[Mapping[str, Any]], states: Mapping[Any, Mapping[str, Any]]) -> Iterator[str]:
    """Paragraphs: what training continues with, and what it does not."""
    projections = {group["proj"] for group in groups if group.get("rank") is not None}
    norms = [state["update_norm"] for state in states.values() if "update_norm" in state]
    kept = ["step counts", "moments"] + ["the limiter's norms"] * any(norms)
    kept += ["svd's projections"] * ("svd" in projections)
    yield f"Kept: {', '.join(kept[:-1])} and {kept[-1]}, in float32, and the settings of the groups."
    missing = sum(len(group["params"]) for group in groups) - len(states)
    if missing:
        yield f"{missing} of the parameters had no gradient before, so they have no state."
    if "random" in projections:
        yield (
            "Not kept: the random projection, which no seed makes here. The next step makes one of this package's. "
            "That is a refresh as every update_proj_gap steps, up to that many steps early, and moments stay at every "
            "refresh. The run goes on, but with other numbers than apollo-torch's."
        )
    if projections:
        off = " No norm of the limiter was there, so disable_nl was True, it seems." * (bool(norms) and not any(norms))
        yield f"Not saved by apollo-torch: scale_front and disable_nl. Give them to the constructor again.{off}"


def _how_to_load(new: Path) -> str:
    """How, and the lines of code, which are not wrapped, so that they can be copied."""
    if new.is_dir():
        how = (
            "Resume with the Trainer's string and this package in apollo-torch's place, or with an optimizer that has "
            "the groups above, in this order:"
        )
        code = [
            "from apollo_triton.compat import as_apollo_torch",
            "as_apollo_torch()  # first of all, for the string",
            f"trainer.train(resume_from_checkpoint={str(new)!r})",
        ]
    else:
        how = "It has the optimizer's state alone. Load it into an optimizer that has the groups above, in this order:"
        code = [f"state = torch.load({str(new)!r})", "optimizer.load_state_dict(state)"]
    return "\n".join([fill(how), "", *(f"    {line}" for line in code)])
