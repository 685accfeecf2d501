"""Text from disk to pre-train on, as BPE tokens: the Python sources of the running environment, or your own files."""

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

# A larger file is more often a generated table than code.
LARGEST_FILE = 2**20
# More text to train a byte-level BPE on only takes longer: its merges settle long before.
TOKENIZER_BYTES = 8 * 2**20


def load_tokens(source: Path | None, vocabulary: int, megabytes: float) -> Corpus:
    """About ``megabytes`` (10**6 bytes) of text, split by file and tokenised by a byte-level BPE.

    The BPE is trained on the training part. Equal files count once. The hashes of files decide which are taken, so that
    the same environment gives the same tokens. Raises ValueError if ``source`` does not exist or holds no text.
    """
    texts = list(sample(_texts(source), megabytes * 1e6))
    if not texts:
        raise ValueError(f"--data {source}: there is no such folder or file, or no text in it")
    train, held_out = split(texts)
    tokenizer = train_tokenizer(train[:TOKENIZER_BYTES], vocabulary)

    name = "the environment's Python sources" if source is None else str(source)
    return Corpus(name, tokens(tokenizer, train), tokens(tokenizer, held_out), tokenizer.get_vocab_size())


def sample(texts: Iterable[bytes], size: float) -> Iterator[bytes]:
    """Distinct ``texts``, in the order of their hashes, as long as they fit into ``size`` bytes.

    >>> sorted(sample([b"one", b"two", b"two", b"three"], 100))
    [b'one', b'three', b'two']
    """
    for _, text in sorted({hashlib.sha256(text).digest(): text for text in texts}.items()):
        if len(text) <= size:
            size -= len(text)
            yield text


def train_tokenizer(text: bytes, vocabulary: int):  # type: ignore[no-untyped-def]
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens, of which 256 are the bytes."""
    tokenizers = require("tokenizers", "bench")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, vocab_size=max(vocabulary, 256), min_frequency=2, show_progress=False)
    return tokenizer


def tokens(tokenizer, text: bytes) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """``text`` as int32 tokens, a vector."""
    lines = text.decode("utf-8", errors="replace").splitlines(keepends=True)
    # Parts of a thousand lines: the tokenizer works on many at once, and only newlines span the end of a line.
    parts = ["".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000)]
    return torch.tensor([token for part in tokenizer.encode_batch(parts) for token in part.ids], dtype=torch.int32)


def _texts(source: Path | None) -> Iterator[bytes]:
    if source is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        # The site-packages of a virtual environment count, those of the Python that it was made from do not.
        paths = (path for path in library.rglob("*.py") if "site-packages" not in path.relative_to(library).parts)
        paths = chain(paths, *(Path(folder).rglob("*.py") for folder in site.getsitepackages()))
    elif source.is_dir():
        paths = (path for path in source.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES)
    else:
        paths = iter([source] if source.exists() else [])
    for path in paths:
        if path.is_file() and (source is not None or 0 < path.stat().st_size <= LARGEST_FILE):
            yield path.read_bytes()
