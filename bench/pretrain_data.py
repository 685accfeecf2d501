"""Text to pre-train on, from disk: the Python sources of the running environment, or files of yours, as BPE tokens."""

from __future__ import annotations

import hashlib
import site
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch

from apollo_triton.core.extras import require
from apollo_triton.tools.demo.corpus import TEXT_SUFFIXES, Corpus, split

# A file larger than this is a generated table more often than code.
LARGEST_FILE = 2**20
# The merges of a byte-level BPE settle long before: training on more only takes longer.
TOKENIZER_BYTES = 8 * 2**20


def load_tokens(source: Path | None, vocabulary: int, megabytes: float) -> Corpus:
    """About ``megabytes`` (10**6 bytes) of text, split by file and tokenised by a byte-level BPE.

    The BPE is trained on the part to train on.

    Equal files count once, and which are taken is decided by their hashes, so that the same environment gives the same
    tokens. Raises ValueError if ``source`` is not there, or holds no text.
    """
    texts = list(sample(_texts(source), megabytes * 1e6))
    if not texts:
        raise ValueError(f"--data {source}: there is no such folder or file, or no text in it")
    train, held_out = split(texts)
    tokenizer = train_tokenizer(train[:TOKENIZER_BYTES], vocabulary)

    def tokens(text: bytes) -> torch.Tensor:
        lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
        # Pieces of a thousand lines: the tokenizer works on many at once, and no token spans a line's end but newlines.
        pieces = ["".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000)]
        return torch.tensor([i for piece in tokenizer.encode_batch(pieces) for i in piece.ids], dtype=torch.int32)

    name = "the environment's Python sources" if source is None else str(source)
    return Corpus(name, tokens(train), tokens(held_out), tokenizer.get_vocab_size())


def sample(texts: Iterable[bytes], size: float) -> Iterator[bytes]:
    """Distinct ``texts`` in the order of their hashes while they fit into ``size`` bytes.

    >>> sorted(sample([b"one", b"two", b"two", b"three"], 100))
    [b'one', b'three', b'two']
    """
    for _, text in sorted({hashlib.sha256(text).digest(): text for text in texts}.items()):
        if len(text) <= size:
            size -= len(text)
            yield text


def train_tokenizer(text: bytes, vocabulary: int):  # type: ignore[no-untyped-def]
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens, 256 of which are the bytes."""
    tokenizers = require("tokenizers", "bench")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, vocab_size=max(vocabulary, 256), min_frequency=2, show_progress=False)
    return tokenizer


def _texts(source: Path | None) -> Iterator[bytes]:
    if source is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        # What lies in a virtual environment's site-packages, not in that of the Python it was made from.
        paths = (path for path in library.rglob("*.py") if "site-packages" not in path.relative_to(library).parts)
        paths = chain(paths, *(Path(folder).rglob("*.py") for folder in site.getsitepackages()))
    elif source.is_dir():
        paths = (path for path in source.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES)
    else:
        paths = iter([source] if source.exists() else [])
    for path in paths:
        if path.is_file() and (source is not None or 0 < path.stat().st_size <= LARGEST_FILE):
            yield path.read_bytes()
