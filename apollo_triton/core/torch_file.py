"""A file of ``torch.save`` as plain values. Nothing in it is run, and nothing grows beyond the file's size.

``torch.load(weights_only=True)`` runs no code either. But the classes that it may make are a setting of the whole
process, so that two threads take them from each other. It lets a view of stride 0 make 4 GB of 2 KB, and it dies where
a key of a dictionary is a tuple in a tuple in a tuple, a million deep. Here each opcode of the pickle is looked at
before it acts, objects become ``SavedObject``, and a tensor is read once it is asked for.
"""

from __future__ import annotations

import errno
import io
import pickletools
import struct
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor

# Limits of the pickle, without the tensors. Each parameter of an optimizer takes 360 bytes of it and 150 opcodes. One
# byte may become an empty dictionary of 64, so that these limits are 1 GB at most.
MOST_BYTES, MOST_OPCODES = 2**27, 2**24
MOST_SIDES = 16  # of a tensor

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_REBUILD = "torch._utils._rebuild_"
_TENSORS = (f"{_REBUILD}tensor", f"{_REBUILD}tensor_v2", f"{_REBUILD}tensor_v3")
# What PyTorch itself writes beside tensors, for models, schedulers and counters. It is read over.
_KNOWN = {*_DTYPES, *_TENSORS, "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device"}
_KNOWN |= {"torch.storage.UntypedStorage", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"}
_KNOWN |= {"__builtin__.set", "__builtin__.complex", "__builtin__.bytearray", "_codecs.encode"}
_KNOWN |= {f"torch._utils.{name}" for name in vars(torch._utils) if name.startswith("_rebuild_")}
_KNOWN |= {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class NotReadable(ValueError):
    """The file is not as ``torch.save`` writes it, or holds what is not read. The text is the reason, one line."""


class UnknownClass(NotReadable):
    """The file needs a class or a function that nobody allowed. The text is its name."""


@dataclass(eq=False, repr=False)
class SavedObject:
    """An object of the class ``name``, or that class or function itself. ``attributes`` are those that were saved."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True, eq=False, repr=False)
class SavedStorage:
    """Elements of one dtype, ``count`` of them. ``dtype`` is None if they are ``count`` bytes of any type."""

    key: str
    dtype: torch.dtype | None
    count: int


@dataclass(frozen=True, eq=False, repr=False)
class SavedTensor:
    """A tensor that is still in the file, as whatever the file says of it. ``TorchFile.tensor`` checks and reads it."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    dtype: Any = None

    def __repr__(self) -> str:
        return "<tensor>"


class TorchFile:
    """An open file of ``torch.save``, of the zip format or the one before it. ``content`` is what was saved:
    dictionaries, lists, tuples, numbers, texts, ``SavedTensor`` and ``SavedObject``.

    Objects of the classes in ``allowed`` have their attributes. Raises ``NotReadable``, and OSError as reading does.
    """

    def __init__(self, file: IO[bytes], allowed: tuple[str, ...] = ()) -> None:
        start = file.tell()
        self._size = self._left = file.seek(0, io.SEEK_END) - start
        self._places: dict[str, tuple[int, int] | zipfile.ZipInfo] = {}
        self._file = file
        self._archive: zipfile.ZipFile | None = None
        file.seek(start)
        with _broken("it is damaged, or no such file"):
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(start)
            self.content = (self._read_zip if is_zip else self._read_old)(allowed)

    def tensor(self, saved: SavedTensor) -> Tensor:
        """Read a tensor, on the CPU. Its elements are a part of its storage, and no element is there twice."""
        storage, shape, stride = saved.storage, saved.shape, saved.stride
        dtype = getattr(storage, "dtype", None) or _dtype_of(saved.dtype)
        if not isinstance(storage, SavedStorage) or dtype is None or storage.key not in self._places:
            raise NotReadable("a tensor is of a kind that is not read")
        if not isinstance(shape, tuple) or not isinstance(stride, tuple) or not len(shape) == len(stride) <= MOST_SIDES:
            raise NotReadable("a tensor has no shape and strides that can be")
        if not all(type(size) is int and size >= 0 for size in (saved.offset, *shape, *stride)):
            raise NotReadable("a tensor has no shape and strides that can be")
        reach = saved.offset + 1
        for step, size in sorted(zip(stride, shape, strict=True)):
            if size > 1 and step < reach - saved.offset:
                raise NotReadable("elements of a tensor share memory")
            reach += step * max(0, size - 1)
        length = storage.count * (dtype.itemsize if storage.dtype else 1)
        self._left -= length  # a storage that many tensors share would be read, and kept, once for each
        if self._left < 0 or (reach * dtype.itemsize > length and 0 not in shape):
            raise NotReadable("a tensor is larger than what the file has of it")
        with _broken("a tensor is damaged: its checksum is another, or it is cut short"):
            if 0 in shape:
                return torch.empty(shape, dtype=dtype)
            data = self._bytes(self._places[storage.key])
            if len(data) == length:
                return torch.frombuffer(data, dtype=dtype).as_strided(shape, stride, saved.offset)
        raise NotReadable("a tensor is larger than what the file has of it")

    def _bytes(self, place: tuple[int, int] | zipfile.ZipInfo) -> bytearray:
        if isinstance(place, zipfile.ZipInfo):
            assert self._archive is not None
            return bytearray(self._archive.read(place))
        self._file.seek(place[0])
        return bytearray(self._file.read(place[1]))

    def _read_zip(self, allowed: tuple[str, ...]) -> Any:
        self._archive = archive = zipfile.ZipFile(self._file)
        records = archive.infolist()
        names = {record.filename: record for record in records}
        stored = all(record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & 1 for record in records)
        total = sum(record.file_size for record in records)
        if len(names) < len(records) or not stored or total > self._size:
            raise NotReadable("it has records that are compressed, overlap or have one name")
        for record in records:
            if not record.CRC:  # torch.serialization.set_crc32_options(False) writes none
                del record.CRC  # zipfile then compares nothing
        (pickled,) = (name for name in names if name.count("/") == 1 and name.endswith("/data.pkl"))
        prefix = pickled.removesuffix("data.pkl")
        order = names.get(f"{prefix}byteorder")
        if order is not None and archive.read(order) != sys.byteorder.encode():
            raise NotReadable("it was written on a machine of another byte order")
        if names[pickled].file_size > MOST_BYTES:
            raise NotReadable(f"its pickle is larger than {MOST_BYTES} bytes")
        self._places.update({name.removeprefix(f"{prefix}data/"): record for name, record in names.items()})
        return _Machine(allowed).run(io.BytesIO(archive.read(names[pickled])))

    def _read_old(self, allowed: tuple[str, ...]) -> Any:
        """Five pickles: a magic number, a version, the machine, the content, the keys. Then come the storages."""
        start = self._file.tell()
        head = io.BytesIO(self._file.read(MOST_BYTES))
        magic, _, machine = (_Machine(()).run(head) for _ in range(3))
        if magic != 0x1950A86A20F9469CFC6C:
            raise NotReadable("it does not begin as such a file does")
        if machine["little_endian"] != (sys.byteorder == "little"):
            raise NotReadable("it was written on a machine of another byte order")
        content = _Machine(allowed)
        value = content.run(head)
        place = start
        keys = _Machine(()).run(head)
        place += head.tell()
        for key in keys:
            if not isinstance(key, str):
                raise NotReadable("a tensor is of a kind that is not read")
            dtype, count = content.storages[key]
            self._file.seek(place)
            (stored,) = struct.unpack("<q" if sys.byteorder == "little" else ">q", self._file.read(8))
            length = count * dtype.itemsize
            place += 8 + length
            if stored != count or key in self._places or place - start > self._size:
                raise NotReadable("a tensor is larger than what the file has of it")
            self._places[key] = (place - length, length)
        return value


@contextmanager
def _broken(reason: str) -> Iterator[None]:
    """Turns errors of any type into ``NotReadable``, since bytes that are no pickle and no zip may fail anywhere."""
    try:
        yield
    except (NotReadable, MemoryError):
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # that one is a place that no file has, such as the byte -5
            raise
        raise NotReadable(reason) from error
    except Exception as error:
        raise NotReadable(reason) from error


class _Machine:
    """Reads one pickle of protocol 2, by the thirty opcodes of which ``torch.save`` makes it.

    It calls nothing. Keys of a dictionary are texts and integers; any other key becomes an object without content,
    because to hash a tuple calls itself for each tuple inside it, and ends the process if they are nested deeply.
    """

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed
        self.classes: dict[str, SavedObject] = {}
        self.storages: dict[str, tuple[torch.dtype, int]] = {}

    def run(self, file: IO[bytes]) -> Any:
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        argument: Any
        for index, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if index == MOST_OPCODES:
                raise NotReadable(f"its pickle has more than {MOST_OPCODES} opcodes")
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    (value,) = stack
                    return value
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(argument)
                case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                    stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode.name]())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                    stack.append(tuple(reversed(items)))
                case "TUPLE":
                    items, stack = stack, marks.pop()
                    stack.append(tuple(items))
                case "APPEND" | "APPENDS":
                    if opcode.name == "APPENDS":
                        items, stack = stack, marks.pop()
                    else:
                        items = [stack.pop()]
                    _append(stack[-1], items)
                case "SETITEM" | "SETITEMS":
                    if opcode.name == "SETITEMS":
                        items, stack = stack, marks.pop()
                    else:
                        items = [stack.pop(-2), stack.pop()]
                    _set(stack[-1], items)
                case "GLOBAL":
                    stack.append(self._named(argument))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_called(function, arguments))
                case "BUILD":
                    attributes, target = stack.pop(), stack[-1]
                    if isinstance(target, SavedObject) and target.name in self.allowed:
                        _set(target.attributes, [item for pair in attributes.items() for item in pair])
                case name:
                    raise NotReadable(f"its pickle has the opcode {name}, which torch.save does not write by default")
        raise NotReadable("its pickle has no end")

    def _named(self, argument: str) -> SavedObject:
        name = argument.replace(" ", ".", 1)
        if name not in _KNOWN and name not in self.allowed:
            raise UnknownClass(name)
        return self.classes.setdefault(name, SavedObject(name))

    def _storage(self, identity: Any) -> SavedStorage:
        kind, storage, key, _, count, *view = identity
        if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0 or any(view):
            raise NotReadable("a tensor is of a kind that is not read")
        dtype = _DTYPES.get(storage.name)
        self.storages[key] = (dtype or torch.uint8, count)
        return SavedStorage(key, dtype, count)


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, SavedObject):
        raise NotReadable("its pickle appends to what is no list")


def _set(target: Any, items: list[Any]) -> None:
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) in (str, int) else SavedObject("key")] = value
    elif not isinstance(target, SavedObject):
        raise NotReadable("its pickle sets an item of what is no dictionary")


def _called(function: Any, arguments: Any) -> Any:
    """What a call stands for. None is made."""
    if not isinstance(function, SavedObject) or not isinstance(arguments, tuple):
        raise NotReadable("its pickle calls what is no function")
    if function.name == "collections.OrderedDict" and not arguments:
        return {}
    if function.name in _TENSORS:
        return SavedTensor(*arguments[:4], *(arguments[6:7] if function.name.endswith("_v3") else ()))
    if function.name == f"{_REBUILD}parameter":
        return arguments[0]
    return SavedObject(function.name)


def _dtype_of(saved: Any) -> torch.dtype | None:
    name = saved.name.removeprefix("torch.") if isinstance(saved, SavedObject) else ""
    found = vars(torch).get(name)
    return found if isinstance(found, torch.dtype) else None
