"""Files that are damaged, or made to harm whoever reads them as a checkpoint of apollo-torch."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_triton import checkpoint
from apollo_triton.checkpoint import from_apollo_torch
from apollo_triton.core import torch_file

GROUP = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "correct_bias": True}
KEYS = {"rank": 3, "proj": "random", "proj_type": "std", "scale_type": "channel", "scale": 1.0}


class GradientProjector:
    """As apollo-torch pickles it, by its name alone."""

    def __init__(self, P: Any) -> None:
        self.ortho_matrix = P


GradientProjector.__module__ = "apollo_torch.random_projector"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """pickle looks a class up before it writes its name."""
    module = type(sys)("apollo_torch.random_projector")
    module.GradientProjector = GradientProjector
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "apollo_torch", type(sys)("apollo_torch"))  # the real one takes 3 s to import


def whole(group: dict[str, Any] | None = None, **state: Any) -> dict[str, Any]:
    """The state of one matrix ``[6, 12]`` of rank 3; ``state`` and ``group`` replace values."""
    moments = torch.arange(36.0).view(3, 12)
    own = {"step": 5, "seed": 1, "exp_avg": moments, "exp_avg_sq": moments + 1, "scaled_grad": torch.tensor(2.0)}
    own["projector"] = GradientProjector(torch.ones(6, 3))
    return {"state": {0: own | state}, "param_groups": [GROUP | KEYS | (group or {})]}


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def read(content: bytes) -> dict[str, Any] | str:
    """The state, or the message of the ValueError, which is one short line for any terminal."""
    try:
        return from_apollo_torch(io.BytesIO(content))
    except ValueError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 1500, len(message)
        return message


@pytest.mark.parametrize("examples", [40, pytest.param(4000, marks=pytest.mark.full)])
def test_a_damaged_file_is_refused_or_read_as_it_was(examples: int) -> None:
    """Bits of a tensor that flip unnoticed; errors of other types than ValueError."""
    good, old = saved(whole()), saved(whole(), _use_new_zipfile_serialization=False)
    expected = read(good)
    assert equal(read(old), expected)
    assert isinstance(expected, dict)

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
    def flipped(flips: list[tuple[float, int]]) -> None:
        for content in (good, old):
            damaged = bytearray(content)
            for place, bits in flips:
                damaged[int(place * len(content))] ^= bits
            found = read(bytes(damaged))
            assert isinstance(found, str) or content is old or equal(found, expected)

    @settings(max_examples=examples, deadline=None)
    @given(st.floats(0, 1, exclude_max=True), st.floats(0, 1), st.binary(max_size=9))
    def cut_or_longer(begin: float, share: float, inserted: bytes) -> None:
        for content in (good, old):
            at = int(begin * len(content))
            found = read(content[:at] + inserted + content[at + int(share * (len(content) - at)) :])
            assert isinstance(found, str) or content is old or equal(found, expected)

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
    def another_pickle(changes: list[tuple[float, int]]) -> None:
        """Opcodes and their arguments, under a checksum that is right."""
        with zipfile.ZipFile(io.BytesIO(good)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        pickled = bytearray(records["archive/data.pkl"])
        for place, byte in changes:
            pickled[int(place * len(pickled))] = byte
        read(zipped(records | {"archive/data.pkl": bytes(pickled)}))

    flipped()
    cut_or_longer()
    another_pickle()


def zipped(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def pickled(body: bytes, **storages: bytes) -> bytes:
    """A file whose pickle is ``body``."""
    data = {f"archive/data/{key}": content for key, content in storages.items()}
    return zipped({"archive/data.pkl": b"\x80\x02" + body + b".", "archive/version": b"3\n", **data})


def reference(key: bytes, count: int) -> bytes:
    """Opcodes of a float32 storage."""
    name = b"X" + struct.pack("<I", len(key)) + key
    kind = b"X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + name + b"X\x03\x00\x00\x00cpu"
    return b"(" + kind + b"J" + struct.pack("<i", count) + b"tQ"


def with_tensor(opcodes: bytes, **storages: bytes) -> bytes:
    """The good file with these opcodes in the place of ``exp_avg``."""
    with zipfile.ZipFile(io.BytesIO(saved(whole(exp_avg=None)))) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    old = records["archive/data.pkl"]
    head, key, tail = old.partition(b"exp_avgq")
    assert tail[1:2] == b"N"
    records["archive/data.pkl"] = head + key + tail[:1] + opcodes + tail[2:]
    return zipped(records | {f"archive/data/{name}": content for name, content in storages.items()})


def tensor(storage: bytes, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    rest = pickle.dumps((offset, shape, stride), protocol=2)[2:-1]
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest
    # The three are a tuple there; taken apart here, since the arguments are one tuple.
    numbers = b"".join(pickle.dumps(value, protocol=2)[2:-1] for value in (offset, shape, stride))
    return made[: -len(rest)] + numbers + b"\x89ccollections\nOrderedDict\n)RtR"


def doubled(levels: int) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value, value)
    return value


FLOATS = struct.pack("<36f", *range(36))
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a view of stride 0": (
        lambda: saved(whole(exp_avg=torch.ones(1, 1).expand(3, 12))),
        "elements of a tensor share memory",
    ),
    "4 GB of 2 KB": (
        lambda: with_tensor(tensor(reference(b"9", 36), 0, (3, 2**28), (0, 0)), **{"9": FLOATS}),
        "elements of a tensor share memory",
    ),
    "beyond its storage": (
        lambda: with_tensor(tensor(reference(b"9", 36), 30, (3, 12), (12, 1)), **{"9": FLOATS}),
        "a tensor is larger than what the file has of it",
    ),
    "a storage that says more than it is": (
        lambda: with_tensor(tensor(reference(b"9", 2**30), 0, (3, 2**28), (2**28, 1)), **{"9": FLOATS}),
        "a tensor is larger than what the file has of it",
    ),
    "before its storage": (
        lambda: with_tensor(tensor(reference(b"9", 36), -1, (3, 12), (12, 1)), **{"9": FLOATS}),
        "no shape and strides that can be",
    ),
    "a storage that is not there": (
        lambda: with_tensor(tensor(reference(b"8", 36), 0, (3, 12), (12, 1))),
        "a tensor is of a kind that is not read",
    ),
    "a rank of tuples in tuples": (lambda: saved(whole({"rank": doubled(60)})), "'rank' is .*nested too deeply"),
    "a long rank": (lambda: saved(whole({"rank": "x" * 10**6})), "rank of its group is 'xxx.*an integer of 1 or more"),
    "objects in a group": (lambda: saved(whole({"more": [{1}]})), r"'more' is \[<__builtin__.set>\]; give numbers"),
    "tensors in a list": (lambda: saved(whole({"more": [torch.ones(1)]})), r"'more' is \[<tensor>\]; give numbers"),
    "a key that is no text": (lambda: saved(whole({5: 1})), "its key 5 is no text"),
    "a huge integer": (lambda: saved(whole(step=2**60)), "step is 1152921504606846976; it must be an integer from 1"),
    "steps that are none": (lambda: saved(whole(step=[1])), r"step is \[1\]"),
    "a norm that is not finite": (lambda: saved(whole(scaled_grad=torch.tensor(float("nan")))), "scaled_grad is nan"),
    "moments of integers": (lambda: saved(whole(exp_avg=torch.ones(3, 12).long())), "floats of 16, 32 or 64 bits"),
    "moments that are a number": (lambda: saved(whole(exp_avg_sq=1.0)), "exp_avg_sq is 1.0; it must be a tensor"),
    "moments of two shapes": (lambda: saved(whole(exp_avg_sq=torch.ones(3, 11))), "they must be equal"),
    "sparse moments": (lambda: saved(whole(exp_avg=torch.ones(3, 12).to_sparse())), "exp_avg is .*must be a tensor"),
    "moments on meta": (lambda: saved(whole(exp_avg=torch.ones(3, 12, device="meta"))), "exp_avg is .*be a tensor"),
    "an unknown proj": (lambda: saved(whole({"proj": "none"})), "proj of its group is 'none'"),
    "svd without a matrix": (lambda: saved(whole({"proj": "svd"}, projector=GradientProjector(1))), "a projection of"),
    "a projector that is a text": (lambda: saved(whole(projector="P")), "a projection of"),
    "a state that is None": (lambda: saved(whole() | {"state": {0: None}}), "whose state is no dictionary"),
    "params that are a number": (lambda: saved(whole({"params": 3})), "params is 3; it must be a list"),
    "params that are tuples": (lambda: saved(whole({"params": [(1, 2)]})), "must be a list of integers"),
    "a parameter of two groups": (
        lambda: saved(whole() | {"param_groups": [GROUP | KEYS, GROUP | KEYS]}),
        "has a parameter of a group before it",
    ),
    "escapes of the terminal in a name": (
        lambda: saved({"\x1b[2J\x1b]0;owned\x07": whole(), "b": whole()}),
        r"holds 2 optimizers \('\\x1b\[2J",
    ),
    "escapes in a class": (lambda: pickled(b"cos\n\x1b[31msystem\n"), r"needs 'os.\\x1b\[31msystem' to be read"),
    "a protocol with other opcodes": (
        lambda: saved(whole(), pickle_protocol=4),
        "has the opcode FRAME, which torch.save does not write by default",
    ),
    "compressed records": (lambda: zipped({"a/data.pkl": b"N." * 10**5}, zipfile.ZIP_DEFLATED), "are compressed"),
    "text longer than the file": (lambda: pickled(b"X\xff\xff\xff\xff"), "it is damaged"),
    "a memo of four billion places": (lambda: pickled(b"}r\xff\xff\xff\xff"), "holds no optimizer's state_dict"),
    "a list in itself": (lambda: pickled(b"]q\x00h\x00a"), "holds no optimizer's state_dict"),
    "ten thousand lists in lists": (lambda: pickled(b"]" * 10**4 + b"a" * (10**4 - 1)), "holds no optimizer's"),
    "a key of tuples in tuples": (
        lambda: pickled(b"})" + b"\x85" * 2 * 10**5 + b"Ns"),
        "holds no optimizer's state_dict",
    ),
    "a persistent id of tuples in tuples": (lambda: pickled(b")" + b"\x85" * 2 * 10**5 + b"Q"), "it is damaged"),
    "a call of what is no function": (lambda: pickled(b"K\x01)R"), "calls what is no function"),
    "an item of what is no dictionary": (lambda: pickled(b"K\x01K\x02K\x03s"), "sets an item of what is no dict"),
    "marks without an end": (lambda: pickled(b"(" * 10**4), "it is damaged"),
}
IN_A_PROCESS = {name for name in ATTACKS if name.endswith("of tuples in tuples") or "GB" in name}


@pytest.mark.parametrize("attack", sorted(ATTACKS.keys() - IN_A_PROCESS))
def test_what_is_made_to_harm_is_refused(attack: str) -> None:
    make, message = ATTACKS[attack]
    found = read(make())
    assert isinstance(found, str), found
    assert re.search(message, found), found


CHILD = """
import resource, sys
from apollo_triton.checkpoint import from_apollo_torch

with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()  # CUDA's libraries alone may take many GB of addresses
resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, used + 10**9))
for path in sys.argv[1:]:
    try:
        print(from_apollo_torch(path))
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_would_end_the_process_or_fill_memory_is_refused(tmp_path: Path) -> None:
    for index, name in enumerate(sorted(IN_A_PROCESS)):
        (tmp_path / str(index)).write_bytes(ATTACKS[name][0]())
    paths = [str(tmp_path / str(index)) for index in range(len(IN_A_PROCESS))]
    found = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for name, line in zip(sorted(IN_A_PROCESS), found.stdout.splitlines(), strict=True):
        assert re.search(ATTACKS[name][1], line), line


def test_records_of_one_name_and_tensors_that_share_a_storage() -> None:
    """A name that two readers take for two contents; 1 MB of storage that is read for each of a million tensors."""
    good = saved(whole())
    file = io.BytesIO(good)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/data.pkl", b"N.")
    assert "have one name" in str(read(file.getvalue()))
    shared = torch.ones(3 * 12)
    state = {index: whole(exp_avg=shared.view(3, 12), exp_avg_sq=shared.view(3, 12))["state"][0] for index in range(90)}
    many = {"state": state, "param_groups": [GROUP | KEYS | {"params": list(range(90))}]}
    for value in state.values():
        value["projector"] = state[0]["projector"]
    large = torch.ones(10**5)
    for value in state.values():
        value["exp_avg"] = large[:36].view(3, 12)
    assert "larger than what the file has of it" in str(read(saved(many)))


def test_more_than_any_optimizer_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of 64 bytes for each byte of the file."""
    monkeypatch.setattr(checkpoint, "MOST_VALUES", 99)
    assert "'more' is [0, 1, 2, 3, 4, 5, ...], which is nested too deeply or too large" in str(
        read(saved(whole({"more": list(range(100))})))
    )
    monkeypatch.setattr(torch_file, "MOST_OPCODES", 1000)
    assert "more than 1000 opcodes" in str(read(pickled(b"}" * 1000)))
    monkeypatch.setattr(torch_file, "MOST_BYTES", 500)
    assert "larger than 500 bytes" in str(read(pickled(b"}" * 1000)))


def test_threads_read_one_file(tmp_path: Path) -> None:
    """State that belongs to the whole process: of 80 reads, 23 were refused; another thread could load the classes."""
    path = tmp_path / "optimizer.pt"
    path.write_bytes(saved(whole()))
    expected, found, allowed = from_apollo_torch(path), [], torch.serialization.get_safe_globals()

    def many() -> None:
        for _ in range(20):
            try:
                found.append(equal(from_apollo_torch(path), expected))
            except ValueError as error:
                found.append(error)
            assert torch.serialization.get_safe_globals() == allowed

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_what_is_no_file(tmp_path: Path) -> None:
    """A FIFO, for which it would wait for ever; a folder; a device; what is no path."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is a pipe or a device; a file is needed"):
        from_apollo_torch(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is a pipe or a device"):
        from_apollo_torch(os.devnull)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        from_apollo_torch(tmp_path)
    with pytest.raises(TypeError, match="path is 3; give a path"):
        from_apollo_torch(3)  # type: ignore[arg-type]
    (tmp_path / "good.pt").write_bytes(saved(whole()))
    with (tmp_path / "good.pt").open() as text, pytest.raises(TypeError, match="a file that is open for reading bytes"):
        from_apollo_torch(text)  # type: ignore[arg-type]  # it was called damaged


def test_a_tensor_as_the_learning_rate() -> None:
    found = read(saved(whole({"lr": torch.tensor(0.5)})))
    assert isinstance(found, dict)
    assert torch.equal(found["param_groups"][0]["lr"], torch.tensor(0.5))


def test_other_content_of_a_checkpoint_is_not_read(tmp_path: Path) -> None:
    """Schedulers, counters and views of a model that lie beside the optimizer; a file that has no checksums."""
    from collections import Counter, OrderedDict

    model = OrderedDict(
        weight=torch.nn.Parameter(torch.ones(3)), view=torch.ones(1).expand(9), small=torch.ones(1).int()
    )
    beside = {"milestones": Counter([3]), "size": torch.Size([2]), "dtype": torch.float32, "set": {1, 2}, "b": b"bytes"}
    value = {"optimizer": whole(), "model": model, "scheduler": beside, ("a", "tuple"): torch.ones(2).to(torch.uint16)}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        assert equal(read(saved(value, **options)), read(saved(whole())))
    torch.serialization.set_crc32_options(False)
    try:
        assert equal(read(saved(value)), read(saved(whole())))
    finally:
        torch.serialization.set_crc32_options(True)
