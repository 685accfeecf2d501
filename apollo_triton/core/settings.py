"""A parameter group's hyperparameters: their defaults, what is allowed, and the texts of the errors.

A group is an ordinary ``torch.optim`` dictionary. ``complete_group`` fills in the keys that it leaves out.
``Settings.of`` checks it and reads it into a frozen object, anew at each step. All other code sees only that object.
A group with a ``rank`` is low-rank (APOLLO). A group without one is dense (AdamW).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .messages import shown

# What a low-rank group may leave out, with the paper's defaults.
LOW_RANK_DEFAULTS: dict[str, Any] = {
    "proj": "random",
    "proj_type": "std",
    "scale_type": "channel",
    "scale": 1.0,
    "update_proj_gap": 200,
    "distribution": "gaussian",
    "rank_above_width": False,
}
# What a group without a rank may say, and mostly leaves out: it is filled in nowhere, so that checkpoints of older
# versions, where it is missing, fit.
DENSE_DEFAULTS: dict[str, Any] = {"second_moment": "element"}

AUTO = "auto"  # as ``scale``: see core/scale.py
_REALS = ("lr", "eps", "weight_decay", "scale", "max_grad_norm")  # the other numbers are integers
_LARGEST = torch.finfo(torch.float32).max
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """The checked hyperparameters of one group, in the words of the paper (arXiv 2412.05270).

    ``lr`` is a float or a one-element tensor. ``rank`` is None for a dense group; its other low-rank fields then hold
    their defaults and are not used. ``scale`` may be "auto": ``core.scale.scale_of`` has the number for a matrix.
    ``second_moment`` is that of a dense group: one for each "element", or one a "row".
    """

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    correct_bias: bool
    scale_front: bool
    disable_nl: bool
    seed: int
    seed_per_param: bool
    backend: str
    state_dtype: torch.dtype
    state_bits: int
    min_8bit_size: int
    stochastic_rounding: bool
    max_grad_norm: float | None
    capturable: bool
    rank: int | None = None
    proj: str = "random"
    proj_type: str = "std"
    scale_type: str = "channel"
    scale: float | str = 1.0
    update_proj_gap: int = 200
    distribution: str = "gaussian"
    rank_above_width: bool = False
    second_moment: str = "element"

    @classmethod
    def of(cls, group: dict[str, Any], where: str = "") -> Settings:
        """Read and check a completed group. ``where`` ("parameter group 1") opens the error messages.

        Raises ValueError that names the key, its value and what is allowed. Unknown keys are ignored, as in
        ``torch.optim``.
        """
        values = {name: group[name] for name in FIELD_NAMES if name in group}
        if missing := [name for name in _NEEDED if name not in values]:
            raise ValueError(
                f"{where or 'the group'}: {missing[0]!r} is missing; use optimizer.add_param_group(...) instead of "
                "changing optimizer.param_groups, or give the key a value"
            )
        for name, value in values.items():
            if name in LOW_RANK_DEFAULTS and values.get("rank") is None:
                continue
            check_value(name, value, where)
            values[name] = _plain(name, value)
        if values.get("rank") is not None and (values.get("scale"), values.get("proj")) == (AUTO, "svd"):
            raise ValueError(f"{f'{where}: ' if where else ''}{_NO_AUTO_SCALE}")
        if values.get("rank") is not None and values.get("second_moment") == "row":
            raise ValueError(f"{f'{where}: ' if where else ''}{_NO_LOW_RANK_ROWS.format(values['rank'])}")
        values["betas"] = tuple(map(float, values["betas"]))
        values["state_dtype"] = _DTYPES.get(values["state_dtype"], values["state_dtype"])
        if isinstance(values["lr"], Tensor):
            values["lr"] = values["lr"].detach().reshape(()).to(torch.float32)
        return cls(**values)

    def step_size(self, step: int) -> float | Tensor:
        """h of the update: the learning rate times Adam's bias correction (paper, algorithm 1)."""
        return self.lr * self.bias_correction(step)

    def with_lr_for(self, device: torch.device) -> Settings:
        """The settings with a learning rate that kernels on ``device`` can read: a number, or a tensor on it."""
        lr = self.lr
        if not isinstance(lr, Tensor) or (self.capturable and lr.device == device):
            return self
        if lr.device.type == "cpu" and not self.capturable:
            value: Any = lr.tolist()  # host memory, read without a dispatch
            return replace(self, lr=value)
        return self if lr.device == device else replace(self, lr=lr.to(device, non_blocking=True))

    def bias_correction(self, step: int) -> float:
        """The factor of the learning rate at step ``step``: sqrt(1 - b2^t) / (1 - b1^t), or 1 without correction."""
        if not self.correct_bias:
            return 1.0
        beta1, beta2 = self.betas
        return math.sqrt(1 - beta2**step) / (1 - beta1**step)

    def epoch(self, step: int) -> int:
        """Which projection step ``step`` (1, 2, ...) uses: it changes every ``update_proj_gap`` steps."""
        return (step - 1) // self.update_proj_gap


FIELD_NAMES = tuple(field.name for field in fields(Settings))
_NEEDED = tuple(field.name for field in fields(Settings) if field.default is MISSING)
# Schedulers change these, OneCycleLR even the betas. Each launch gets their current values, so a change costs nothing;
# a change of any other setting makes a new plan.
PER_STEP = ("lr", "weight_decay", "betas", "eps")
STRUCTURAL = tuple(name for name in FIELD_NAMES if name not in PER_STEP)


class SettingsReader:
    """Reads one group's settings, and checks them again only if one of its values is another object than before.

    The check of 24 values takes 15 us, a quarter of a layer-wise update's host time; to see that they are the same
    objects takes 2 us. Values that may change in place (a tensor, a list) are read every time.
    """

    def __init__(self) -> None:
        self._values: tuple[Any, ...] = ()
        self._settings: Settings | None = None

    def read(self, group: dict[str, Any], where: str) -> Settings:
        """``Settings.of(group, where)``."""
        values = tuple(map(group.get, FIELD_NAMES))
        if self._settings is None or not all(map(operator.is_, values, self._values)):
            self._settings = None  # also if the next line raises
            settings = Settings.of(group, where)
            if any(isinstance(value, (Tensor, list)) for value in values):
                return settings
            self._settings, self._values = settings, values
        return self._settings


def complete_group(group: dict[str, Any]) -> None:
    """Fill in the low-rank keys that a low-rank group leaves out. Keys that are there stay as they are.

    A ``state_dtype`` is replaced by its name, because torch.distributed.checkpoint's full_state_dict accepts no dtype
    in a group. Betas become a tuple: ``torch.load(weights_only=True)`` refuses a checkpoint with Hydra's ListConfig.
    """
    if isinstance(group.get("state_dtype"), torch.dtype):
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
    if _is_pair(group.get("betas")):
        group["betas"] = tuple(group["betas"])
    if group.get("rank") is not None:
        for name, default in LOW_RANK_DEFAULTS.items():
            group.setdefault(name, default)


def dtype_of(value: Any) -> torch.dtype | None:
    """The dtype that a ``state_dtype`` stands for, which may be its name; None for what is none."""
    return _DTYPES.get(value) if isinstance(value, str) else value if isinstance(value, torch.dtype) else None


class Check(NamedTuple):
    """What a hyperparameter may be: as a test, in words, and how the error for a wrong value begins."""

    allows: Callable[[Any], bool]
    allowed: str
    complaint: Callable[[str, Any], str] = lambda name, value: f"Invalid {name}: {shown(value)}"


def check_value(name: str, value: Any, where: str = "") -> None:
    """Raise ValueError unless the hyperparameter ``name`` may be ``value``; ``where`` opens the message."""
    check = CHECKS[name]
    if not check.allows(value):
        prefix = f"{where}: " if where else ""
        raise ValueError(f"{prefix}{check.complaint(name, value)} (allowed: {check.allowed}){_of_text(value)}")


def _of_text(value: Any) -> str:
    """What to say of a number that is given as text. PyYAML reads 1e-4 as text, and 1.0e-4 and 64 as numbers."""
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    in_yaml = ", and in YAML write a number with a dot, as 1.0e-4" if "e" in value.lower() else ""
    return f"; it is a string: convert it{in_yaml}"


def _plain(name: str, value: Any) -> Any:
    """A checked number as Python's own: torch takes neither a Fraction nor, as a float, an integer above 2**63."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    number: Any = value
    return float(number) if name in _REALS else int(number)


def _is_number(value: Any) -> bool:
    """A number that is finite in float32 too, in which a step computes."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value
    return -_LARGEST <= number <= _LARGEST


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _lr_allowed(value: Any) -> bool:
    # A tensor's value is not read here, so that a step never waits for the device. ``add_param_group`` and
    # ``load_state_dict`` read it once.
    if not isinstance(value, Tensor):
        return _is_number(value) and value >= 0
    is_real = not value.is_complex() and value.dtype != torch.bool
    return value.numel() == 1 and value.layout == torch.strided and not value.is_meta and is_real


def _lr_complaint(name: str, value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() != 1:
        return "Tensor lr must be 1-element"
    return f"Invalid learning rate: {shown(value)}"


def _is_pair(value: Any) -> bool:
    """Whether ``value`` is two of something in order: a tuple, a list, a ListConfig of Hydra's."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _betas_allowed(value: Any) -> bool:
    return _is_pair(value) and all(_is_number(beta) and 0 <= beta < 1 for beta in value)


def _betas_complaint(name: str, value: Any) -> str:
    if _is_pair(value):
        for index, beta in enumerate(value):
            if not (_is_number(beta) and 0 <= beta < 1):
                return f"Invalid beta parameter at index {index}: {shown(beta)}"
    return f"Invalid betas: {shown(value)}"


def _scale_allowed(value: Any) -> bool:
    return value == AUTO if isinstance(value, str) else _is_number(value) and value > 0


def _one_of(*options: Any) -> Check:
    return Check(
        lambda value: isinstance(value, (str, Integral)) and value in options,
        " or ".join(repr(option) for option in options),
    )


_NO_AUTO_SCALE = (
    "scale='auto' has no value for proj='svd', whose updates are between sqrt(rank / width) and 1 times AdamW's, "
    "depending on the share of the gradient that its directions hold; give a number, or use proj='random'"
)
_NO_LOW_RANK_ROWS = (
    "second_moment='row' is for dense groups, and this one has rank {}: its moments are [channels, rank] and stay one "
    "an element; give the key to a group without 'rank', as that of the embeddings, or leave it out"
)
_FLAG = Check(lambda value: isinstance(value, bool), "True or False")
_AT_LEAST_ZERO = "a finite number, 0 or more"

# The wordings for lr, betas, eps and weight_decay are torch.optim's, which people search for.
CHECKS: dict[str, Check] = {
    "lr": Check(_lr_allowed, f"{_AT_LEAST_ZERO}, or a dense real tensor of one element", _lr_complaint),
    "betas": Check(_betas_allowed, "two numbers in [0, 1)", _betas_complaint),
    "eps": Check(  # with 0, or with less than this, which is 0 in float32, a gradient of zeros would give 0 / 0
        lambda value: _is_number(value) and value >= torch.finfo(torch.float32).tiny,
        "a finite number of at least 1.2e-38, the smallest normal float32",
        lambda name, value: f"Invalid epsilon value: {shown(value)}",
    ),
    "weight_decay": Check(
        lambda value: _is_number(value) and value >= 0,
        _AT_LEAST_ZERO,
        lambda name, value: f"Invalid weight_decay value: {shown(value)}",
    ),
    "correct_bias": _FLAG,
    "scale_front": _FLAG,
    "disable_nl": _FLAG,
    "seed": Check(lambda value: _is_integer(value) and 0 <= value < 2**32, "an integer from 0 to 2**32 - 1"),
    "seed_per_param": _FLAG,
    "backend": _one_of("auto", "triton", "reference"),
    "state_dtype": Check(
        lambda value: isinstance(value, (str, torch.dtype)) and value in (*_DTYPES, *_DTYPES.values()),
        "torch.float32 or torch.bfloat16, or their names",
    ),
    "state_bits": _one_of(32, 8),
    "min_8bit_size": Check(lambda value: _is_integer(value) and value >= 0, "an integer of 0 or more"),
    "stochastic_rounding": _FLAG,
    "max_grad_norm": Check(
        lambda value: value is None or (_is_number(value) and value > 0), "None or a number above 0"
    ),
    "capturable": _FLAG,
    "rank": Check(lambda value: value is None or (_is_integer(value) and value >= 1), "an integer of 1 or more"),
    "proj": _one_of("random", "svd"),
    "proj_type": _one_of("std", "reverse_std", "right", "left"),
    "scale_type": _one_of("channel", "tensor"),
    "scale": Check(_scale_allowed, "a number above 0, or 'auto'"),
    "update_proj_gap": Check(
        lambda value: _is_integer(value) and 1 <= value < 2**63, "an integer of 1 or more, below 2**63"
    ),
    "distribution": _one_of("gaussian", "rademacher"),
    "rank_above_width": _FLAG,
    "second_moment": _one_of("element", "row"),
}
