"""Checkpoints of apollo-torch 1.0.3: training goes on as if it had never changed hands, and nothing in a file is run.

The official package is run, never read (its licence is CC-BY-NC).
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apollo_torch
import pytest
import torch
from official import LR, close, gradients, several, share_projection, train, weight
from torch import Tensor
from torch.nn import Parameter

from apollo_triton import APOLLOAdamW
from apollo_triton.checkpoint import from_apollo_torch

SAVED, STEPS = 5, 11  # a gap of 3 refreshes at steps 1, 4, 7 and 10: the file is written within a period
WIDE, TALL, SQUARE, DENSE = (6, 12), (12, 6), (6, 6), (5,)
MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
TENSOR = {"scale_type": "tensor"}

# Constructor, group, shapes: every proj_type where the official code runs, with ranks below both sides and equal to one
# or both, where some or all shapes no longer tell moments of rows from those of columns.
CASES: dict[str, tuple[dict, dict, list[tuple[int, int]]]] = {
    "apollo": ({}, {}, [WIDE, TALL, SQUARE]),
    "decay": ({"weight_decay": 0.5}, {}, [WIDE, TALL, SQUARE]),
    "tensor, decay": ({"weight_decay": 0.5}, TENSOR, [WIDE, TALL, SQUARE]),
    "mini": ({"lr": 0.01}, MINI, [WIDE, TALL, SQUARE]),
    "scale": ({}, {"scale": 3.0}, [WIDE, TALL, SQUARE]),
    "scale in front": ({"scale_front": True}, {"scale": 3.0}, [WIDE, TALL, SQUARE]),
    "no limiter": ({"disable_nl": True}, {}, [WIDE, TALL, SQUARE]),
    "no bias correction": ({"correct_bias": False, "lr": 0.02}, {}, [WIDE, TALL, SQUARE]),
    "right": ({}, {"proj_type": "right"}, [TALL, SQUARE]),
    "left": ({}, {"proj_type": "left"}, [WIDE]),
    "right, tensor": ({}, {"proj_type": "right", **TENSOR}, [WIDE, TALL, SQUARE]),
    "left, tensor": ({}, {"proj_type": "left", **TENSOR}, [WIDE, TALL, SQUARE]),
    "reverse_std, tensor": ({}, {"proj_type": "reverse_std", **TENSOR}, [WIDE, TALL, SQUARE]),
    "rank 6": ({}, {"rank": 6}, [WIDE, TALL, SQUARE]),
    "rank 6, right, tensor": ({}, {"rank": 6, "proj_type": "right", **TENSOR}, [WIDE, TALL, SQUARE]),
    "rank 6, left, tensor": ({}, {"rank": 6, "proj_type": "left", **TENSOR}, [WIDE, TALL, SQUARE]),
    "rank 6, reverse_std, tensor": ({}, {"rank": 6, "proj_type": "reverse_std", **TENSOR}, [WIDE, TALL, SQUARE]),
    "rank 12, reverse_std, tensor": ({}, {"rank": 12, "proj_type": "reverse_std", **TENSOR}, [WIDE, TALL]),
    "svd": ({}, {"proj": "svd"}, [WIDE, TALL, SQUARE]),
    "svd, rank 6": ({}, {"proj": "svd", "rank": 6}, [WIDE, TALL, SQUARE]),
    "svd, mini": ({"lr": 0.01}, {"proj": "svd", **MINI}, [WIDE, TALL, SQUARE]),
    "svd, left, tensor": ({}, {"proj": "svd", "proj_type": "left", **TENSOR}, [WIDE, TALL, SQUARE]),
}


def make(kind: type, parameters: list[Parameter], constructor: dict, keys: dict) -> torch.optim.Optimizer:
    """As ``several``, at the learning rate of the case."""
    optimizer = several(kind, parameters, {name: value for name, value in constructor.items() if name != "lr"}, **keys)
    for each in optimizer.param_groups:
        each["lr"] = constructor.get("lr", LR)
    return optimizer


def trained(
    constructor: dict, keys: dict, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[torch.optim.Optimizer, list[Parameter], list[list[Tensor]]]:
    """The official optimizer of matrices and a vector after ``SAVED`` steps, and the gradients of all steps."""
    parameters = [weight(*shape, dtype=dtype) for shape in (*shapes, DENSE)]
    sequences = [gradients(*p.shape, steps=STEPS, dtype=dtype, seed=seed) for seed, p in enumerate(parameters)]
    optimizer = make(apollo_torch.APOLLOAdamW, parameters, constructor, keys)
    train(optimizer, parameters, [sequence[:SAVED] for sequence in sequences])
    return optimizer, parameters, sequences


def saved(value: Any, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_the_official_run_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    constructor, keys, shapes = CASES[case]
    share_projection(monkeypatch, 0)
    official, parameters, sequences = trained(constructor, keys, shapes)
    start = [parameter.detach().clone() for parameter in parameters]
    ours_parameters = [Parameter(each.clone()) for each in start]
    ours = make(APOLLOAdamW, ours_parameters, constructor, keys)
    ours.load_state_dict(from_apollo_torch(saved(official.state_dict())))
    for optimizer, own in ((official, parameters), (ours, ours_parameters)):
        train(optimizer, own, [sequence[SAVED:] for sequence in sequences])
    for mine, theirs, before in zip(ours_parameters, parameters, start, strict=True):
        assert close(mine, theirs.detach(), before), tuple(before.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj", ["random", "svd"])
def test_every_number_of_the_state_is_carried(proj: str, dtype: torch.dtype) -> None:
    """With the official P, whatever it is: ours is channel-major where columns are kept too, and all float32."""
    official, parameters, _ = trained({}, {"proj": proj}, [WIDE, TALL], dtype)
    ours = several(APOLLOAdamW, parameters, {})
    ours.load_state_dict(from_apollo_torch(saved(official.state_dict())))
    for parameter in parameters:
        theirs, mine = official.state[parameter], ours.state[parameter]
        turned = parameter.shape == WIDE
        names = {"exp_avg": theirs["exp_avg"], "exp_avg_sq": theirs["exp_avg_sq"]}
        if parameter.dim() == 2:
            assert mine["exp_avg"].shape == (12, 3)
            assert theirs["scaled_grad"] > 0
            names["update_norm"] = theirs["scaled_grad"]
            if proj == "svd":
                names["projection"] = theirs["projector"].ortho_matrix
        assert mine.keys() == {"step", "seed", *names}
        assert torch.equal(mine["step"], torch.tensor(float(SAVED)))
        assert mine["seed"] == 0
        for name, value in names.items():
            assert mine[name].dtype == torch.float32
            assert mine[name].is_contiguous()
            assert torch.equal(mine[name], (value.T if turned and value.dim() else value).float())


def test_groups_keep_their_keys_and_take_the_rest_from_the_constructor() -> None:
    official, parameters, _ = trained({"weight_decay": 0.5}, {"scale": 3.0, "seed": 9, "initial_lr": 0.7}, [WIDE])
    ours = several(APOLLOAdamW, parameters, {"seed": 4, "max_grad_norm": 1.0, "disable_nl": True})
    ours.load_state_dict(from_apollo_torch(saved(official.state_dict())))
    low_rank, dense = ours.param_groups
    assert {"scale": 3.0, "seed": 9, "initial_lr": 0.7, "weight_decay": 0.5, "max_grad_norm": 1.0}.items() <= (
        low_rank.items()
    )
    assert (dense["seed"], dense["disable_nl"]) == (4, True)
    assert ours.state[parameters[0]]["seed"] == 9


def test_without_limiter_and_without_gradient() -> None:
    official, parameters, _ = trained({"disable_nl": True}, {}, [WIDE])
    assert from_apollo_torch(saved(official.state_dict()))["state"][0]["update_norm"] == 0
    fresh = several(apollo_torch.APOLLOAdamW, parameters, {})
    assert from_apollo_torch(saved(fresh.state_dict()))["state"] == {}
    # A parameter without a gradient has a seed there, and no moments.
    parameters[0].grad, parameters[1].grad = None, torch.ones(DENSE)
    fresh.step()
    assert fresh.state_dict()["state"].keys() == {0, 1}
    assert from_apollo_torch(saved(fresh.state_dict()))["state"].keys() == {1}


def test_where_the_state_may_be(tmp_path: Path) -> None:
    state_dict = trained({}, {}, [WIDE])[0].state_dict()
    path = tmp_path / "optimizer.pt"
    torch.save(state_dict, path)
    model = {"weight": torch.ones(3)}
    for file in (
        path,
        str(path),
        saved({"model": model, "optimizer": state_dict, "step": 5}),
        saved({"state_dict": model, "optimizer_states": [state_dict], "callbacks": {}}),  # Lightning
        saved(state_dict, _use_new_zipfile_serialization=False),
    ):
        read = from_apollo_torch(file)
        assert read["state"].keys() == {0, 1}
        assert read["state"][0]["exp_avg"].shape == (12, 3)


def other(kind: type, keys: dict, **constructor: Any) -> dict[str, Any]:
    matrix = weight(*WIDE)
    optimizer = kind([{"params": [matrix], **keys}], lr=LR, **constructor)
    train(optimizer, [matrix], [gradients(*WIDE, steps=1)])
    return optimizer.state_dict()


GALORE = {"rank": 3, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std"}


def with_state(**state: Any) -> dict[str, Any]:
    """A checkpoint of the official optimizer with another state in its matrix's place; None takes a key out."""
    state_dict = trained({}, {}, [WIDE])[0].state_dict()
    changed = {**state_dict["state"][0], **state}
    state_dict["state"][0] = {name: value for name, value in changed.items() if value is not None}
    return state_dict


def eight_bit() -> dict[str, Tensor]:
    """As bitsandbytes writes it (its optimizers step on a GPU only)."""
    return {"state1": torch.zeros(36, dtype=torch.uint8), "state2": torch.zeros(36, dtype=torch.uint8)}


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "AdamW": (lambda: other(torch.optim.AdamW, {}), "is not one of apollo-torch's APOLLOAdamW.* fresh optimizer"),
    "SGD": (lambda: other(torch.optim.SGD, {}), "is not one of apollo-torch's APOLLOAdamW"),
    "AdamW of the old transformers": (lambda: other(apollo_torch.GaLoreAdamW, {}), "is not one of apollo-torch's"),
    "GaLore": (lambda: other(apollo_torch.GaLoreAdamW, GALORE), "is GaLore's.* fresh optimizer"),
    "this package's": (lambda: other(APOLLOAdamW, {"rank": 3}), "was saved by this package; read it with torch.load"),
    "8 bits": (lambda: with_state(exp_avg=None, exp_avg_sq=None, **eight_bit()), "bitsandbytes.* fresh optimizer"),
    "8 bits of new bitsandbytes": (
        lambda: with_state(exp_avg=None, exp_avg_sq=None, __bnb_optimizer_quant_state__=eight_bit()),
        "moments of bitsandbytes",
    ),
    "no projector": (lambda: with_state(projector=None), "is not one of apollo-torch's APOLLOAdamW"),
    "another rank": (
        lambda: with_state(exp_avg=torch.ones(4, 12)),
        r"parameter 0: moments of shape \(4, 12\).* rank 3",
    ),
    "moments of the other side": (lambda: with_state(exp_avg=torch.ones(12, 3)), r"and a projection of \(6, 3\)"),
    "a model": (lambda: {"weight": torch.ones(3)}, "holds no optimizer's state_dict; save one"),
    "a tensor": (lambda: torch.ones(3), "holds no optimizer's state_dict"),
    "two optimizers": (lambda: {"a": with_state(), "b": with_state()}, r"holds 2 optimizers \('a', 'b'\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_checkpoints_are_refused(kind: str, tmp_path: Path) -> None:
    make_it, message = WRONG[kind]
    torch.save(make_it(), tmp_path / "some.pt")
    with pytest.raises(ValueError, match=rf"some\.pt.*{message}"):
        from_apollo_torch(tmp_path / "some.pt")


def test_galore_of_its_own_package_is_refused_as_such() -> None:
    galore_torch = pytest.importorskip("galore_torch")
    with pytest.raises(ValueError, match="is GaLore's"):
        from_apollo_torch(saved(other(galore_torch.GaLoreAdamW, GALORE, no_deprecation_warning=True)))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.pt"):
        from_apollo_torch(tmp_path / "missing.pt")
    whole = saved(with_state()).getvalue()
    for content in (b"", b"hello, world\n" * 9, bytes(100), whole[: len(whole) // 2], pickle.dumps(1, protocol=0)):
        with pytest.raises(ValueError, match=r"the file (is not a checkpoint|holds no optimizer)"):
            from_apollo_torch(io.BytesIO(content))


class Call:
    """Pickles as a call, which unpickling makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


READ = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("apollo_torch", "galore_torch"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from apollo_triton.checkpoint import from_apollo_torch

for path in sys.argv[1:]:
    try:
        print(sorted(from_apollo_torch(path)["state"][0]))
    except ValueError as error:
        print(error)
assert "apollo_torch" not in sys.modules
"""


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """In a process that has no apollo-torch, and whose environment asks PyTorch to run what files hold."""
    marker = tmp_path / "was-run"
    contents: dict[str, tuple[Any, dict[str, Any]]] = {
        "good": (with_state(), {}),
        "system": (with_state(step=Call(os.system, f"touch {marker}")), {}),
        "system-old-format": (with_state(step=Call(os.system, "x")), {"_use_new_zipfile_serialization": False}),
        "exec": (with_state(seed=Call(exec, f"open({str(marker)!r}, 'w')")), {}),
        "namespace": ({"optimizer": with_state(), "args": argparse.Namespace(lr=1)}, {}),
        "official-class": (with_state(seed=Call(apollo_torch.GaLoreAdamW, [])), {}),
        "protocol-4": (with_state(step=Call(os.system, f"touch {marker}")), {"pickle_protocol": 4}),
    }
    for name, (value, options) in contents.items():
        torch.save(value, tmp_path / name, **options)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, *(str(tmp_path / name) for name in contents)],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = dict(zip(contents, result.stdout.splitlines(), strict=True))
    assert "'update_norm'" in lines["good"]
    for name, culprit in {
        "system": f"{os.system.__module__}.system",
        "system-old-format": f"{os.system.__module__}.system",
        "exec": "exec",
        "namespace": "argparse.Namespace",
        "official-class": "apollo_torch.adamw.AdamW",
    }.items():
        assert culprit in lines[name], lines[name]
        assert "was not run; if you trust the file, save optimizer.state_dict() alone" in lines[name]
    assert "is not a checkpoint as torch.save writes it" in lines["protocol-4"]
    assert not marker.exists()


def test_a_process_that_allows_the_official_class_reads_the_same() -> None:
    """Objects of a class that this process has told PyTorch to load, where attributes alone are wanted."""
    file = saved(with_state())
    allowed = type("GradientProjector", (), {"__module__": "apollo_torch.random_projector"})
    with torch.serialization.safe_globals([allowed]):
        before = set(torch.serialization.get_safe_globals())
        assert from_apollo_torch(file)["state"][0]["exp_avg"].shape == (12, 3)
        assert set(torch.serialization.get_safe_globals()) == before
