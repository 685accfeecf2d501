"""Checkpoints of the demo and of the recipes: written whole or not at all, and read only if every bit is as it was.

A file ends in a line with the SHA-256 of all bytes before it. ``torch.load`` and PyTorch's distributed checkpoints read
over that line. The files of a distributed checkpoint get theirs after PyTorch has written them (``seal``).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from ..core.files import open_regular, replaced
from ..core.messages import shown

BEGIN = b"\nsha256 "
LENGTH = len(BEGIN) + 64 + 1  # of that line


class NotWhole(ValueError):
    """A file is damaged, unfinished or something else. The text, one line, names it and says what to do."""


def save(path: Path, value: dict[str, Any]) -> None:
    """``torch.save`` of ``value``. ``path`` holds the old content until the new one is whole and on the disk.

    Raises OSError that names ``path`` if it cannot be written.
    """
    try:
        with replaced(path) as unfinished:
            torch.save(value, unfinished)
            seal(unfinished)
    except RuntimeError as error:  # of torch.save, where the disk is full, without a number or a name
        raise OSError(f"{path} cannot be written ({first_line(error)}); the file before it is kept") from error


def seal(path: Path) -> None:
    """Add the line with the checksum to a file, and wait until it is on the disk."""
    with path.open("rb+") as file:
        digest = _digest(file, None)
        file.write(BEGIN + digest + b"\n")
        file.flush()
        os.fsync(file.fileno())  # the checkpoint before it may be deleted next


def check(path: Path, remedy: str) -> None:
    """Raise NotWhole unless a file ends in the checksum of its bytes. The text names ``path`` and ends in
    ``remedy``."""
    try:
        with open_regular(path) as file:
            length = file.seek(0, 2) - LENGTH
            file.seek(max(0, length))
            line = file.read()
            file.seek(0)
            is_sealed = length >= 0 and line.startswith(BEGIN) and line.endswith(b"\n")
            is_whole = is_sealed and line[len(BEGIN) : -1] == _digest(file, length)
    except ValueError as error:
        raise NotWhole(f"{error}; {remedy}") from error
    except OSError as error:
        raise NotWhole(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
    if not is_sealed:
        raise NotWhole(
            f"{path} does not end in its checksum: it is not whole, or an earlier apollo-triton wrote it; {remedy}"
        )
    if not is_whole:
        raise NotWhole(f"{path} is damaged: its checksum is not that of its content; {remedy}")


def load(path: Path, kinds: dict[str, type], remedy: str, device: str | torch.device = "cpu") -> dict[str, Any]:
    """What ``save`` wrote to ``path``.

    Raises NotWhole unless the file is whole, and a dictionary that has a value of the given type for each key of
    ``kinds``. The text, one line, names ``path`` and what is wrong, and ends in ``remedy``.
    """
    check(path, remedy)
    try:
        value = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # its type depends on the bytes: UnpicklingError, RuntimeError, EOFError, KeyError...
        raise NotWhole(f"{path} is no checkpoint; {remedy}") from error
    if not isinstance(value, dict):
        raise NotWhole(f"{path} is no checkpoint: it holds {shown(value)}, not a dictionary; {remedy}")
    for name, kind in kinds.items():
        found = value.get(name)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise NotWhole(
                f"{path} is no checkpoint: its {name} is {shown(found)}, which is no {kind.__name__}; {remedy}"
            )
    return value


def _digest(file: Any, length: int | None) -> bytes:
    """The SHA-256 of the first ``length`` bytes, or of all, in hexadecimal. The file's place is then behind them."""
    digest = hashlib.sha256()
    left = float("inf") if length is None else length
    while left and (block := file.read(int(min(left, 2**22)))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest().encode()


def first_line(error: Exception) -> str:
    """What an error says, short enough for a message and without what a terminal would act on."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    if not text.isprintable():
        return shown(text)
    return text if len(text) <= 300 else f"{text[:300]}..."
