"""From documents to sequences: text is streamed by ``datasets``, tokenised, and packed end to end.

The place in the data can be saved, so that no token is lost or used twice. When a document ends in the middle of a
sequence, the next document continues that sequence. A saved place is the tokens left over and the stream's own place.
Nothing is shuffled, because a shuffle buffer could not be saved. C4's documents are in random order, and those of other
data should be too.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from transformers import AutoTokenizer

from apollo_triton.tools.checkpoints import first_line

from .hub import hub_answers

BYTES = "bytes"  # a value of --tokenizer: each byte of the text is a token, and 0 ends a document
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
TEXT = {".txt", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cpp", ".java", ".js", ".rs", ".go"}
READ_AT_ONCE = 64  # documents: a tokenizer works on them in parallel

Encode = Callable[[list[str]], list[list[int]]]
Open = Callable[[], IterableDataset]


class Packer:
    """The sequences of one rank, without end: after the last document the first comes again."""

    def __init__(self, open_documents: Open, encode: Encode, wanted: Callable[[str], bool], column: str) -> None:
        self.open, self.encode, self.wanted, self.column = open_documents, encode, wanted, column
        self.documents = open_documents()
        self.epoch = 0
        self.rest = torch.empty(0, dtype=torch.int32)
        # The loaded place, until a document is read: only then does the stream know its own place.
        self._given: dict[str, Any] | None = None
        self._texts = self._repeated()

    def take(self, sequences: int, length: int) -> Tensor:
        """The next tokens, ``[sequences, length]``."""
        return self._cut(sequences * length, self._texts).view(sequences, length)

    def take_all(self, most: int, length: int) -> Tensor:
        """At most ``most`` sequences, ``[sequences, length]``. Fewer if the data ends before."""
        tokens = self._cut(most * length, self._once())
        return tokens[: len(tokens) // length * length].view(-1, length)

    def state_dict(self) -> dict[str, Any]:
        """The place in the data: plain values and one tensor."""
        documents = self.documents.state_dict() if self._given is None else self._given
        return {"rest": self.rest, "documents": documents, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rest = state["rest"]
        if (
            not isinstance(rest, Tensor)
            or rest.dtype != torch.int32
            or rest.dim() != 1
            or type(state["epoch"]) is not int
        ):
            raise ValueError("the place in the data is none")
        self.rest, self.epoch, self._given = state["rest"], state["epoch"], state["documents"]
        self.documents.load_state_dict(state["documents"])

    def _cut(self, wanted: int, texts: Iterator[list[str]]) -> Tensor:
        """The next ``wanted`` tokens, or as many as there are. The tokens left over are kept for the next call."""
        pieces, tokens = [self.rest], len(self.rest)
        while tokens < wanted and (documents := next(texts, None)):
            new = [token for document in self.encode(documents) for token in document]
            pieces.append(torch.tensor(new, dtype=torch.int32))
            tokens += len(new)
        found = torch.cat(pieces)
        self.rest = found[wanted:].clone()
        return found[:wanted].long()

    def _repeated(self) -> Iterator[list[str]]:
        while True:
            found = self._given is not None  # the loaded place may be the end of the documents
            for texts in self._once():
                found = True
                yield texts
            if not found:
                raise SystemExit("there is no document to train on; give more data, or fewer ranks")
            self.epoch += 1
            # A new stream: one that has loaded a place begins there every time.
            self.documents, self._given = self.open(), None

    def _once(self) -> Iterator[list[str]]:
        """Texts up to the end of the data. When a list is handed out, the stream's place is behind its last text."""
        texts: list[str] = []
        documents = iter(self.documents)
        while True:
            try:
                document = next(documents, None)
            except Exception as error:  # of any type: a broken file may fail anywhere
                raise SystemExit(
                    f"a document of --data or --validation cannot be read ({type(error).__name__}: "
                    f"{first_line(error)}); mend the file, or leave it out"
                ) from error
            if document is None:
                break
            self._given = None
            text = document.get(self.column)
            if self.column not in document or not isinstance(text, str | None):
                raise SystemExit(f"--text-column {self.column} is not text; the data has {', '.join(sorted(document))}")
            if text and self.wanted(text):
                texts.append(text)
            if len(texts) == READ_AT_ONCE:
                yield texts
                texts = []
        if texts:
            yield texts


def open_data(options: argparse.Namespace, rank: int, ranks: int) -> tuple[Packer, Packer | None]:
    """What this rank trains on, and what it evaluates on.

    It evaluates on ``--validation``, else on the data's own validation split, else on documents that are held out from
    training. With ``--evaluate-every 0`` it evaluates on nothing, and the second value is None.
    """
    for option, name in (("--data", options.data), ("--validation", options.validation)):
        if name is not None and not Path(name).exists() and not hub_answers():
            raise SystemExit(_unreachable(option, name, OSError("it does not answer")))
    encode = load_encode(options.tokenizer, options.vocabulary)

    def packer(data: str, split: str, wanted: Callable[[str], bool]) -> Packer:
        def open_documents() -> IterableDataset:
            return split_dataset_by_node(_documents(data, options, split), rank, ranks)

        return Packer(open_documents, encode, wanted, options.text_column)

    if not options.evaluate_every:
        return packer(options.data, "train", lambda text: True), None
    if options.validation is None:
        try:
            validation = packer(options.data, "validation", lambda text: True)
        except ValueError:  # it has none
            validation = packer(options.data, "train", lambda text: _is_held_out(text, options.held_out))
            return packer(options.data, "train", lambda text: not _is_held_out(text, options.held_out)), validation
    else:
        validation = packer(options.validation, "train", lambda text: True)
    return packer(options.data, "train", lambda text: True), validation


def load_encode(tokenizer: str, vocabulary: int) -> Encode:
    """A function from texts to their tokens, each followed by the token that ends a document."""
    if tokenizer == BYTES:
        if vocabulary < 256:
            raise SystemExit(f"--vocabulary {vocabulary} is too small for --tokenizer bytes; use at least 256")
        return lambda texts: [[*text.encode(errors="replace"), 0] for text in texts]
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=not hub_answers(), trust_remote_code=False)
    except Exception as error:  # of any type: a folder may hold anything
        if Path(tokenizer).exists():
            raise SystemExit(
                f"--tokenizer {tokenizer}: no tokenizer there can be loaded ({first_line(error)}); give another folder"
            ) from error
        raise SystemExit(_unreachable("--tokenizer", tokenizer, error)) from error
    end = [] if loaded.eos_token_id is None else [loaded.eos_token_id]
    loaded.model_max_length = int(1e9)  # long documents are cut into sequences here, so no warning about their length

    def encode(texts: list[str]) -> list[list[int]]:
        # If a text contains "</s>", it is text like any other, not a special token.
        found = loaded(texts, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True)
        tokens = [document + end for document in found["input_ids"]]
        largest = max(max(document, default=0) for document in tokens)
        if largest >= vocabulary:
            raise SystemExit(
                f"--tokenizer {tokenizer} gives token {largest}, and the model has {vocabulary}; "
                f"--vocabulary {len(loaded)} makes room"
            )
        return tokens

    return encode


def _documents(data: str, options: argparse.Namespace, split: str) -> IterableDataset:
    """A split of a data set: of the hub, or of a local file or folder, which has one split only, ``train``."""
    path = Path(data)
    option = "--data" if data == options.data else "--validation"
    if path.exists():
        if split != "train":
            raise ValueError(f"{data} has no split {split!r}")
        return _local(path, option)
    try:
        config = options.data_config if data == options.data else None
        return load_dataset(data, config, split=split, streaming=True)
    except (OSError, RuntimeError, datasets.exceptions.DatasetNotFoundError) as error:
        raise SystemExit(_unreachable(option, data, error)) from error
    except ValueError as error:  # no such split, or no such config
        if split != "train":
            raise
        raise SystemExit(f"{option} {data}: {first_line(error)}") from error


def _local(path: Path, option: str) -> IterableDataset:
    """The documents of a file, or of a folder with files of one kind.

    In a folder each text file is one document. In a text file that is given by itself each paragraph is one.
    """
    if not path.is_dir() and not path.is_file():
        raise SystemExit(f"{option} {path} is a pipe or a device; a file or a folder is needed")
    files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file)) if path.is_dir() else [path]
    kinds = {_kind(file) or "text" for file in files}
    if len(kinds) != 1:
        raise SystemExit(
            f"{option} {path}: a folder of one kind of files is needed, this has {sorted(kinds) or 'none'}"
        )
    (kind,) = kinds
    text = {"sample_by": "document" if path.is_dir() else "paragraph", "encoding_errors": "replace"}
    splits = {"train": [str(file) for file in files]}
    try:
        return load_dataset(kind, data_files=splits, split="train", streaming=True, **(text if kind == "text" else {}))
    except Exception as error:  # of any type: a broken file may fail anywhere
        raise SystemExit(f"{option} {path} cannot be read as {kind} ({first_line(error)}); give another") from error


def _kind(file: Path) -> str | None:
    """The loader of ``datasets`` that reads a file. None if the file holds no data."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    return LOADERS.get(last, "text" if last in TEXT else None)


def _is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept for the evaluation. Only its text decides, so all ranks decide alike."""
    return zlib.crc32(text.encode(errors="replace")) < share * 2**32


def _unreachable(option: str, name: str, error: Exception) -> str:
    here = "--data FILE_OR_FOLDER and --tokenizer FOLDER, or --tokenizer bytes"
    if option == "--validation":
        here = f"{option} FILE_OR_FOLDER, or leave it out"
    return (
        f"{option} {name}: there is no such path here, and the Hugging Face hub has not given it "
        f"({first_line(error)}).\n"
        f"Without a network: {here}"
    )
