"""Whether the code that calls ``step()`` clips gradients. Layer-wise updates leave none, so that it clips nothing.

``clip_grad_norm_`` is given parameters, finds no gradient and returns 0. Nothing of ours runs there. What can be seen
is its name in the functions that are running when they call ``step()``, and the option of a Trainer that is running.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from operator import attrgetter
from types import FrameType, FunctionType

import torch

from ..core.messages import warn

# PyTorch's, and the methods of Accelerate, Fabric and Lightning.
_CLIPPING = {"clip_grad_norm_", "clip_grads_with_norm_", "clip_gradients"}
# Programs that clip elsewhere than in the functions that step: the option by which they do, and what turns it off.
_OPTIONS = {
    "transformers": ("args.max_grad_norm", "TrainingArguments(max_grad_norm={!r})", "max_grad_norm=0"),
    "lightning": ("gradient_clip_val", "Trainer(gradient_clip_val={!r})", "gradient_clip_val=None"),
    "pytorch_lightning": ("gradient_clip_val", "Trainer(gradient_clip_val={!r})", "gradient_clip_val=None"),
}
_NOT_THE_USERS = {*_OPTIONS, "accelerate", "torch", "apollo_triton"}


def warn_of_useless_clipping() -> None:
    """Warn if the functions that are running clip gradients."""
    useless = useless_clipping()
    if useless is not None:
        warn(
            f"{useless}. Layer-wise updates move each weight within backward() and free its gradient. The "
            "norm-growth limiter still bounds updates. To clip, use plain optimizer.step() and "
            "APOLLOAdamW(..., max_grad_norm=1.0)"
        )


@torch._disable_dynamo  # it would warn of sys._getframe
def useless_clipping() -> str | None:
    """What the functions that are running clip gradients by, and what to do instead; None if nothing is seen."""
    frames = _callers()
    for package, (option, call, off) in _OPTIONS.items():
        value = _option(frames, package, option)
        if value:
            return f"{call.format(value)} clips nothing: use {off}"
    for frame in frames:
        code = frame.f_code
        if _package(frame) not in _NOT_THE_USERS and (names := [*_clipping_of(frame)]):
            where = f"{names[0]} in {code.co_name} ({code.co_filename})"
            return f"{where} finds no gradient of this optimizer's parameters and clips nothing: leave it out"
    return None


def _clipping_of(frame: FrameType) -> Iterator[str]:
    """What the function that runs there uses to clip, under any name. To import it is no use of it."""
    for instruction in dis.get_instructions(frame.f_code):
        if not instruction.opname.startswith("LOAD") or instruction.opname == "LOAD_CONST":
            continue
        # from Python 3.12 on, one instruction may load two
        for name in instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,):
            value = frame.f_globals.get(name)
            yield from _CLIPPING & {name, value.__name__ if isinstance(value, FunctionType) else name}


def _callers() -> list[FrameType]:
    """The functions that are running, the innermost first, without the one that asks: its frame holds the list, and the
    two would keep all of them, with what their variables hold, until the garbage collector runs."""
    frames: list[FrameType] = []
    frame = sys._getframe(1).f_back
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _option(frames: list[FrameType], package: str, option: str) -> object:
    """The ``option`` of the outermost object of ``package`` that has it and is running; None if there is none.

    From the outside, because up to Python 3.12 what ``f_locals`` shows of a function lives as long as the function
    runs. ``Trainer.train`` holds no tensor. The loop within it holds a batch and its outputs.
    """
    for frame in reversed(frames):
        code = frame.f_code
        if _package(frame) == package and code.co_argcount and code.co_varnames[0] == "self":
            try:
                return attrgetter(option)(frame.f_locals["self"])
            except (AttributeError, KeyError):
                continue
    return None
