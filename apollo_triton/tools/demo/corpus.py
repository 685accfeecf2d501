"""Text for the demo, as bytes: the source of Python's standard library, or files of the user's choice."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...core.files import open_regular

# A byte is a token.
VOCABULARY = 256
HELD_OUT_WINDOWS = 128
HELD_OUT_SHARE = 0.1
TEXT_SUFFIXES = frozenset({".c", ".cpp", ".h", ".html", ".java", ".js", ".md", ".py", ".rs", ".rst", ".tex", ".txt"})
# Generated tables, copies of other modules and tests: they would make the task too easy, or are no text.
STANDARD_LIBRARY_EXCLUDED = frozenset(
    {"site-packages", "dist-packages", "ensurepip", "test", "tests", "idle_test"}
    | {"encodings", "pydoc_data", "lib2to3", "__phello__"}
)


@dataclass(frozen=True)
class Corpus:
    """Two strings of tokens from different files, as 1-D tensors of integers. ``name`` is for people. A token is a
    byte, or one of a larger ``vocabulary``."""

    name: str
    train: Tensor
    held_out: Tensor
    vocabulary: int = VOCABULARY

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the text, whatever its name."""
        digest = hashlib.sha256(self.train.numpy().tobytes())
        digest.update(self.held_out.numpy().tobytes())
        return digest.hexdigest()[:16]

    def batch(self, seed: int, step: int, size: int, length: int) -> Tensor:
        """The windows ``[size, length]`` of step ``step``. They depend only on the arguments, so that all methods see
        the same windows and a resumed run needs no random state."""
        # The generator reads only 32 bits of its seed, so seed << 32 would lose ours.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - length + 1, (size,), generator=generator)
        return _windows(self.train, starts, length)

    def held_out_windows(self, length: int) -> Tensor:
        """Evenly spaced windows ``[HELD_OUT_WINDOWS, length]``, the same each time. In a short text they overlap."""
        starts = torch.linspace(0, len(self.held_out) - length, HELD_OUT_WINDOWS, dtype=torch.float64).long()
        return _windows(self.held_out, starts, length)


def load_corpus(source: Path | None, length: int) -> Corpus:
    """Read ``source`` (a file, a folder of text files, or None for the standard library) and split it.

    Raises ValueError if there is no such path, if it cannot be read, or if it has too little text for windows of
    ``length`` bytes.
    """
    if source is None:
        name = option = "the source of Python's standard library"
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = _text_files(folder, frozenset({".py"}), STANDARD_LIBRARY_EXCLUDED)
        files = [path for path in files if not path.name.startswith("_sysconfigdata")]
    else:
        name, option = str(source), f"--data {source}"
        if not source.exists():
            raise ValueError(f"--data {source}: there is no such file or folder")
        files = _text_files(source, TEXT_SUFFIXES) if source.is_dir() else [source]
    train, held_out = split([_content(path) for path in files])
    if min(len(train), len(held_out)) < 2 * length:
        raise ValueError(
            f"{option}: too little text, {len(train)} bytes to train on and {len(held_out)} held out, in {len(files)} "
            f"files; sequences of {length - 1} bytes need at least {2 * length} in each. "
            f"In a folder, files ending in {' '.join(sorted(TEXT_SUFFIXES))} count"
        )
    return Corpus(name, _as_tensor(train), _as_tensor(held_out))


def split(texts: list[bytes]) -> tuple[bytes, bytes]:
    """Join ``texts`` into one to train on and one, about a tenth, to hold out.

    Equal texts count once. Texts are ordered by their hashes, so that neither the file system nor their names matter.
    Whole texts are held out while they fit into a tenth. If none fits, the smallest one is held out. Of a single text
    the last tenth is held out.

    >>> split([b"only one here"])
    (b'only one her', b'e')
    """
    ordered = [text for _, text in sorted({hashlib.sha256(text).digest(): text for text in texts if text}.items())]
    if len(ordered) < 2:
        text = b"".join(ordered)
        cut = len(text) - int(HELD_OUT_SHARE * len(text))
        return text[:cut], text[cut:]
    room = HELD_OUT_SHARE * sum(map(len, ordered))
    train, held_out = [], []
    for text in ordered:
        if len(text) <= room:
            room -= len(text)
            held_out.append(text)
        else:
            train.append(text)
    if not held_out:
        held_out = [min(train, key=len)]
        train.remove(held_out[0])
    return b"".join(train), b"".join(held_out)


def _text_files(folder: Path, suffixes: frozenset[str], excluded: frozenset[str] = frozenset()) -> list[Path]:
    """Sorted. Folders with an ``excluded`` name are not entered: site-packages may have a hundred thousand files."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in excluded]
        paths = (Path(parent, name) for name in names if os.path.splitext(name)[1].lower() in suffixes)
        found += [path for path in paths if path.is_file()]
    return sorted(found)


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path}, to train on, cannot be read ({error.strerror}); give another --data") from error
    except ValueError as error:
        raise ValueError(f"--data: {error}") from error


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts[:, None] + torch.arange(length)].long()
