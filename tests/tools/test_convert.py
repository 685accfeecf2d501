"""apollo-triton convert: real checkpoints of apollo-torch, run and never read, rewritten and trained on.

What becomes of each number is in tests/optimizer/test_checkpoint.py; what a hostile file may hold, in
test_checkpoint_hostile.py.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apollo_torch
import pytest
import torch
from official import LR, close, gradients, group, share_projection, train, weight
from torch import Tensor
from torch.nn import Parameter

from apollo_triton import APOLLOAdamW, cli
from apollo_triton.tools import convert

SAVED, STEPS = 5, 11  # a gap of 3 refreshes at steps 1, 4, 7 and 10: the file is written within a period
SHAPES = (5,), (6, 12), (12, 6), (6, 6), (6, 6)


def make(kind: type, parameters: list[Parameter], **keys: Any) -> torch.optim.Optimizer:
    """The dense group is first, as the Trainer has it, and parameters have names."""
    named = [(f"layer{index}.weight", parameter) for index, parameter in enumerate(parameters)]
    return kind([{"params": named[:1]}, {**group(**keys), "params": named[1:]}], lr=LR)


def trained(**keys: Any) -> tuple[torch.optim.Optimizer, list[Parameter], list[list[Tensor]]]:
    """The official optimizer after ``SAVED`` steps, and the gradients of all steps."""
    parameters = [weight(*shape) for shape in SHAPES]
    sequences = [gradients(*shape, steps=STEPS, seed=seed) for seed, shape in enumerate(SHAPES)]
    optimizer = make(apollo_torch.APOLLOAdamW, parameters, **keys)
    train(optimizer, parameters, [sequence[:SAVED] for sequence in sequences])
    return optimizer, parameters, sequences


@pytest.fixture(scope="module")
def official() -> dict[str, Any]:
    return trained()[0].state_dict()


@pytest.fixture
def here(tmp_path: Path, official: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``old.pt`` and a folder as the Trainer's, ``checkpoint-5``."""
    monkeypatch.chdir(tmp_path)
    torch.save(official, "old.pt")
    folder = Path("checkpoint-5")
    (folder / "global" / "empty").mkdir(parents=True)
    torch.save(official, folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (folder / "global" / "rng_state.pth").write_bytes(b"\0\1")
    os.utime(folder / "model.safetensors", (1e9, 1e9))
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes | None]:
    """All files and folders with their content; of links, FIFOs and the like the names alone."""
    paths = sorted(folder.rglob("*"))
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in paths
    }


@pytest.mark.parametrize("proj", ["random", "svd"])
def test_training_goes_on_as_the_official_run_does(
    proj: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moments of kept columns that are not transposed, a lost norm of the limiter, a step off by one, groups in another
    order, a lost P of svd; lines to copy that do not run."""
    if proj == "random":
        share_projection(monkeypatch, 0)
    optimizer, parameters, sequences = trained(proj=proj)
    start = [parameter.detach().clone() for parameter in parameters]
    torch.save(optimizer.state_dict(), tmp_path / "old.pt")
    assert cli.main(["convert", str(tmp_path / "old.pt"), str(tmp_path / "new.pt")]) == 0
    own = [Parameter(each.clone()) for each in start]
    ours = make(APOLLOAdamW, own, proj=proj)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    exec(textwrap.dedent("\n".join(lines)), {"torch": torch, "optimizer": ours})
    for each, mine in ((optimizer, parameters), (ours, own)):
        train(each, mine, [sequence[SAVED:] for sequence in sequences])
    for mine, theirs, before in zip(own, parameters, start, strict=True):
        assert close(mine, theirs.detach(), before), tuple(before.shape)


def test_names_are_kept_and_compared(here: Path) -> None:
    """Names that are lost, so that nobody notices equal shapes in another order, whose moments are then exchanged."""
    assert cli.main(["convert", "old.pt", "new.pt"]) == 0
    parameters = [weight(*shape) for shape in SHAPES]
    named = [(f"layer{index}.weight", parameter) for index, parameter in enumerate(parameters)]
    named[-2:] = named[:-3:-1]
    ours = APOLLOAdamW([{"params": named[:1]}, {**group(), "params": named[1:]}], lr=LR)
    with pytest.warns(UserWarning, match=r"parameter 3 is 'layer4\.weight', and the checkpoint's parameter 3 is"):
        ours.load_state_dict(torch.load("new.pt"))


@pytest.mark.parametrize("name", convert.NAMES)
def test_a_folder_is_copied_whole_and_the_old_one_stays(name: str, here: Path) -> None:
    """Files that are left out, changed, or hard links, so that a change of the new ones changes the old ones."""
    Path("checkpoint-5/optimizer.pt").rename(f"checkpoint-5/{name}")
    Path("weights").write_text("elsewhere")
    Path("checkpoint-5/linked").symlink_to("../weights")
    before = files_of(here)
    assert cli.main(["convert", "checkpoint-5", "new"]) == 0
    new = Path("new")
    after = files_of(here)
    assert {path: after[path] for path in before} == before
    copied = {path.removeprefix("new/"): content for path, content in after.items() if path.startswith("new/")}
    expected = {path.removeprefix("checkpoint-5/"): before[path] for path in before if path.startswith("checkpoint-5/")}
    assert copied.pop(name) != expected.pop(name)
    assert copied == expected | {"linked": b"elsewhere"}
    assert all(path.stat().st_nlink == 1 for path in new.rglob("*") if path.is_file())
    assert (new / "model.safetensors").stat().st_mtime == 1e9
    ours = make(APOLLOAdamW, [weight(*shape) for shape in SHAPES])
    ours.load_state_dict(torch.load(new / name))
    assert {int(state["step"]) for state in ours.state.values()} == {SAVED}


@pytest.mark.parametrize("columns", [60, 80])
def test_what_is_said(
    columns: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss of the projection that nobody is told of, wrong counts, lines that a narrow terminal breaks."""
    monkeypatch.setenv("COLUMNS", str(columns))
    state_dict, svd = torch.load("old.pt", weights_only=False), trained(proj="svd")[0].state_dict()
    del state_dict["state"][1]
    state_dict["state"][2]["step"] = 3
    torch.save(state_dict, "some.pt")
    for state in svd["state"].values():
        state.pop("scaled_grad", None)  # as with disable_nl
    torch.save(svd, "svd.pt")
    said = {}
    for old in ("some.pt", "svd.pt", "checkpoint-5"):
        assert cli.main(["convert", old, f"new-{old}"]) == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= min(columns, 79)
        said[old] = " ".join(text.split())
    size = f"{Path('new-some.pt').stat().st_size / 1e3:.3g} kB"
    assert f"some.pt, which apollo-torch wrote, is now in new-some.pt ({size})" in said["some.pt"]
    # Moments [12, 3] or [6, 3] in pairs, a norm and a step, in 4 bytes each. One of the matrices of 12 has no state.
    held = 4 * (2 * 12 * 3 + 2 * 2 * 6 * 3 + 3 * 2)
    assert f"0 dense 1 5 44 B 1 rank 3, random 4 3-5 {held} B" in said["some.pt"]
    assert "Kept: step counts, moments and the limiter's norms, in float32" in said["some.pt"]
    assert "1 of the parameters had no gradient before" in said["some.pt"]
    assert "Not kept: the random projection" in said["some.pt"]
    assert "disable_nl was True" not in said["some.pt"]
    assert "Kept: step counts, moments and svd's projections, in float32" in said["svd.pt"]
    assert "Not kept" not in said["svd.pt"]
    assert "no gradient" not in said["svd.pt"]
    assert "No norm of the limiter was there, so disable_nl was True" in said["svd.pt"]
    assert "is now in new-checkpoint-5 (4 files, " in said["checkpoint-5"]
    assert said["checkpoint-5"].endswith("trainer.train(resume_from_checkpoint='new-checkpoint-5')")


def test_a_converted_file_has_no_more_than_its_numbers(tmp_path: Path) -> None:
    """All singular vectors instead of the first ``rank``, of which P is a view: 64 MB of 4 at width 4096, rank 256."""
    torch.save(trained(proj="svd")[0].state_dict(), tmp_path / "old.pt")
    assert cli.main(["convert", str(tmp_path / "old.pt"), str(tmp_path / "new.pt")]) == 0
    tensors = [x for state in torch.load(tmp_path / "new.pt")["state"].values() for x in state.values()]
    tensors = [x for x in tensors if torch.is_tensor(x)]
    assert tensors
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)


class Call:
    """Pickles as a call, which unpickling makes."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("was-run",)


def _layerwise() -> None:
    """What transformers' LayerWiseDummyOptimizer is, and the Trainer saves."""
    torch.save(torch.optim.Optimizer([torch.randn(1, 1)], {"lr": 1e-3}).state_dict(), "checkpoint-5/optimizer.pt")


def _replaced_by_a_fifo() -> None:
    Path("old.pt").unlink()
    os.mkfifo("old.pt")


WRONG: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "nothing": (lambda: None, "nothing.pt", "new", "there is no nothing.pt; give the file of"),
    "a file in the way": (lambda: Path("new").touch(), "old.pt", "new", "new is there already, and nothing is"),
    "a link in the way": (lambda: Path("new").symlink_to("no"), "old.pt", "new", "new is there already"),
    "the same": (lambda: None, "checkpoint-5", "checkpoint-5", "checkpoint-5 is there already"),
    "inside": (lambda: None, "checkpoint-5", "checkpoint-5/new", "is inside checkpoint-5, which stays as it is"),
    "inside of where one is": (lambda: None, ".", "new", "new is inside ."),
    "no folder": (lambda: None, "old.pt", "no/new", "no/new cannot be written: there is no folder"),
    "the run's folder": (
        lambda: Path("run").mkdir() or Path("checkpoint-5").rename("run/checkpoint-5"),
        "run",
        "new",
        "run has no optimizer.pt or optimizer.bin, where one file of an optimizer's state is needed; give one of its "
        "checkpoints, such as run/checkpoint-5",
    ),
    "two states": (
        lambda: Path("checkpoint-5/optimizer.bin").touch(),
        "checkpoint-5",
        "new",
        "has optimizer.pt and optimizer.bin, where one file",
    ),
    "shards": (lambda: Path("checkpoint-5/optimizer_0").mkdir(), "checkpoint-5", "new", "has 'optimizer_0': its opt"),
    "DeepSpeed": (lambda: Path("checkpoint-5/global_step5").mkdir(), "checkpoint-5", "new", "has 'global_step5': its"),
    "layer-wise": (_layerwise, "checkpoint-5", "new", "optimizer.pt: parameter group 0 is the Trainer's placeholder"),
    "a FIFO": (_replaced_by_a_fifo, "old.pt", "new", "old.pt is a pipe or a device"),
    "a FIFO within": (lambda: os.mkfifo("checkpoint-5/fifo"), "checkpoint-5", "new", "fifo is a pipe or a device"),
    "a circle": (
        lambda: Path("checkpoint-5/global/up").symlink_to(".."),
        "checkpoint-5",
        "new",
        "checkpoint-5/global/up is a link to a folder, which is not followed",
    ),
    "half": (lambda: os.truncate("old.pt", 2000), "old.pt", "new", "old.pt is not a checkpoint as torch.save writes"),
    "hostile": (lambda: torch.save({"optimizer": Call()}, "old.pt"), "old.pt", "new", "mkdir' to be read, which is"),
    "already": (lambda: cli.main(["convert", "old.pt", "a.pt"]), "a.pt", "new", "a.pt: parameter group 0 was saved by"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback, an old file that is overwritten, half a folder that stays, a FIFO that is waited for, a copy into
    itself, a call out of the file."""
    prepare, old, new, message = WRONG[case]
    prepare()
    capsys.readouterr()
    before = files_of(here)
    assert cli.main(["convert", old, new]) == 2
    error = capsys.readouterr().err
    assert error.startswith("apollo-triton convert: ")
    assert message in error
    assert error.count("\n") == 1
    assert files_of(here) == before


NO_SPACE = OSError(28, "No space left on device")
FULL = {
    "the state": ("old.pt", "torch.save", RuntimeError("[enforce fail] unexpected pos 64")),
    "the new name": ("old.pt", "os.replace", NO_SPACE),
    "a folder's state": ("checkpoint-5", "torch.save", RuntimeError("[enforce fail] unexpected pos 64")),
    "a folder's copies": ("checkpoint-5", "shutil.copyfileobj", NO_SPACE),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_leaves_nothing(
    case: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder under its final name that lacks its state, hidden files that fill the disk further, a hidden name."""
    old, where, error = FULL[case]

    def full(*_: object) -> None:
        raise error

    before = files_of(here)
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        assert cli.main(["convert", old, "new"]) == 2
    said = capsys.readouterr().err
    assert "new" in said
    assert "/." not in said
    assert files_of(here) == before
