"""Files that are read and written with care: no pipe is waited for, and no half-written file takes a good one's place.

What waits at a path may be anything: a FIFO, which blocks whoever opens it, a folder, or a link to another file.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read its bytes.

    Raises ValueError if ``path`` is a FIFO, a socket or a device, and OSError if it is missing, a folder, or cannot be
    read.
    """
    # O_NONBLOCK: else opening a FIFO that nobody writes to would wait for ever. Windows has no such flag and no FIFO.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{os.fspath(path)} is a folder; a file is needed")
        raise ValueError(f"{os.fspath(path)} is a pipe or a device; a file is needed")
    return os.fdopen(descriptor, "rb")


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file beside ``path`` to write to. It takes the place of ``path`` if the block ends without an error.

    So ``path`` holds the whole old content or the whole new one, also if the program or the machine dies meanwhile. A
    link at ``path`` is replaced, and what it points to stays as it is. The new name cannot be guessed, and its suffix
    is that of ``path``. Raises OSError that names ``path`` if nothing can be written there.
    """
    path = Path(path)
    unfinished = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"{path} is a folder, where a file is to be written; move it away")
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # the umask takes its part
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None  # not the name that nobody knows
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())  # else a rename may reach the disk before the bytes do
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last. Some systems open no folders or sync none, and there it is left to them."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
