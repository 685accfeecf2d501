"""The study's two texts, which every environment with the pinned packages has: Python, and C++ to fine-tune on.

Python is the source of packages that torch brings, C++ that of torch's headers. Tests, which repeat each other, and
files of more than a megabyte, most of them generated, are left out. The BPE is trained on the Python alone.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apollo_triton.tools.demo.corpus import Corpus, split

from ..pretrain_data import LARGEST_FILE, TOKENIZER_BYTES, sample, tokens, train_tokenizer
from ..results_file import version

PACKAGES = ("torch", "sympy", "networkx", "numpy")
# Of each text. At a vocabulary of 8192, a run of the small model takes 6 million tokens of 4 bytes.
MEGABYTES = 30.0
PYTHON, CPP = "Python", "C++"


@functools.cache
def corpus(vocabulary: int, language: str = PYTHON) -> Corpus:
    """A language's text as tokens of the Python text's BPE."""
    train, held_out = _split(language)
    bpe = tokenizer(vocabulary)
    return Corpus(language, tokens(bpe, train), tokens(bpe, held_out), bpe.get_vocab_size())


@functools.cache
def tokenizer(vocabulary: int) -> Any:
    """The byte-level BPE of ``vocabulary`` tokens, trained on Python. At 256 each byte is a token."""
    return train_tokenizer(_split(PYTHON)[0][:TOKENIZER_BYTES], vocabulary)


def text_versions() -> dict[str, str | None]:
    """The versions of the packages that are the text."""
    return {package: version(package) for package in PACKAGES}


def held_out_text(language: str) -> bytes:
    """The text that is held out."""
    return _split(language)[1]


@functools.cache
def _split(language: str) -> tuple[bytes, bytes]:
    return split(list(sample(_files(language), MEGABYTES * 1e6)))


def _files(language: str) -> Iterator[bytes]:
    for package in PACKAGES if language == PYTHON else PACKAGES[:1]:
        spec = importlib.util.find_spec(package)
        root = Path(next(iter(spec.submodule_search_locations or []))) if spec else Path()
        pattern, folder = ("*.py", root) if language == PYTHON else ("*.h", root / "include")
        for path in sorted(folder.rglob(pattern)):
            is_test = {"test", "tests", "testing"}.intersection(path.relative_to(root).parts)
            if not is_test and path.stat().st_size <= LARGEST_FILE:
                yield path.read_bytes()
