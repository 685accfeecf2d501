"""Compiled kernels that are kept, so that a launch costs the host 5 us instead of 12 to 20.

``kernel[grid](...)`` finds the compiled kernel anew at every launch: it binds 30 arguments by name, compares every
global that the kernel uses, and looks up the text of all options. A handle is found by what the compiled kernel really
depends on, and is run as ``kernel[grid]`` runs it in the end. Handles hold no tensor.

Triton's own way is taken where it would do more: in the interpreter, in versions of Triton whose way was not read, on
AMD and Intel GPUs (whose pointers are specialised by more than alignment), for hooks of profilers and of the kernel,
under settings for debugging, and for arguments that are not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from torch import Tensor

Grid = tuple[int, ...]

_ALIKE = frozenset((float, bool, type(None)))  # one compiled kernel for all of a kind

# Whose JITFunction.run and CompiledKernel.run are as described here. Before 3.4 there is no ``triton.knobs`` to ask.
_FIRST, _LAST = (3, 4), (3, 7)


class Handle(NamedTuple):
    """A compiled kernel, by ``run``. It wants its ``function`` and ``metadata``, something in the places of
    ``constants``, and the current ``stream`` of the ``device``."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    stream: Callable[[int], int]
    device: int


class Unknown(TypeError):
    """An argument of which it is not known what the compiled kernel depends on."""


class Handles:
    """The handles of one kernel. There are no more than kernels in Triton's own cache, which keeps them for good."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel  # alive, so that no other kernel gets its id
        self.kept: dict[tuple[Any, ...], Handle] = {}
        self._knobs = _knobs_for(kernel)
        if self._knobs is not None:
            self._specialise = [not param.do_not_specialize for param in kernel.params]

    def launch(self, grid: Grid, device: int | None, arguments: Sequence[Any], constants: Mapping[str, Any]) -> None:
        """Launch on the current device, whose index is ``device``."""
        if self._knobs is None or self.kernel.pre_run_hooks or _is_watched(self._knobs):
            self.kernel[grid](*arguments, **constants)
            return
        try:
            key = (device, *constants, *constants.values(), *_specialisations(arguments, self._specialise))
            handle = self.kept.get(key)
        except TypeError:  # Unknown, or a constant that is no key
            self.kernel[grid](*arguments, **constants)
            return
        if handle is None:
            compiled = self.kernel[grid](*arguments, **constants)
            if _is_for_nvidia(compiled):
                parameters = self.kernel.params[len(arguments) :]
                values = tuple(constants.get(param.name, param.default) for param in parameters)
                self.kept[key] = _handle(compiled, values)
            return
        run, function, metadata, values, stream, index = handle
        x, y, z = (*grid, 1, 1)[:3]
        # Without hooks, and so without what they would be told.
        run(x, y, z, stream(index), function, metadata, None, None, None, *arguments, *values)


_of_kernel: dict[int, Handles] = {}  # by id: a kernel's own hash takes a lock and reads its source


def handles_of(kernel: Any) -> Handles:
    """The handles of ``kernel``, to launch it by."""
    handles = _of_kernel.get(id(kernel))
    if handles is None:
        handles = _of_kernel[id(kernel)] = Handles(kernel)
    return handles


def _specialisations(arguments: Iterable[Any], specialise: Iterable[bool]) -> list[Any]:
    """What Triton compiles for: dtypes, whether addresses and integers are multiples of 16, which integers are 1 and
    how wide they are, and what is None. Raises Unknown for arguments of other kinds."""
    found: list[Any] = []
    addresses = 0
    for argument, is_specialised in zip(arguments, specialise, strict=False):
        kind = type(argument)
        if kind in _ALIKE:
            found.append(kind)
        elif kind is int:
            number = (argument == 1 or (argument % 16 == 0 and 16)) if is_specialised else int
            found.append(number if -(2**31) <= argument < 2**31 else ("wide", number, argument < 2**63))
        elif isinstance(argument, Tensor):
            found.append(argument.dtype)
            addresses |= argument.data_ptr()
        elif kind is tuple:
            found.append(tuple(_specialisations(argument, repeat(True))))
        else:
            raise Unknown(f"an argument {argument!r}")
    if addresses % 16:
        found.append(("aligned", *[each.data_ptr() % 16 == 0 for each in arguments if isinstance(each, Tensor)]))
    return found


def _knobs_for(kernel: Any) -> Any:
    """``triton.knobs``; None for a kernel of Triton's interpreter, and for a Triton that is older or newer."""
    import triton
    from triton.runtime.jit import JITFunction

    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return triton.knobs if isinstance(kernel, JITFunction) and _FIRST <= version <= _LAST else None


def _is_watched(knobs: Any) -> bool:
    """Whether a hook or a setting is on that does something at each launch, or compiles kernels differently, and can be
    changed between two launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        runtime.debug
        or getattr(enter, "calls", enter)  # from 3.5 on a list of hooks, before one or None
        or getattr(leave, "calls", leave)
        or getattr(runtime, "add_stages_inspection_hook", None)  # from 3.6 on
        or getattr(knobs.compilation, "instrumentation_mode", None)
    )


def _is_for_nvidia(compiled: Any) -> bool:
    from triton.compiler import CompiledKernel

    return isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda"


def _handle(compiled: Any, constants: tuple[Any, ...]) -> Handle:
    from triton.runtime import driver

    active = driver.active
    return Handle(
        compiled.run,
        compiled.function,
        compiled.packed_metadata,
        constants,
        active.get_current_stream,
        active.get_current_device(),
    )
