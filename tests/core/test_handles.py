"""Kept compiled kernels: a handle launches what Triton itself would have launched, or leaves the launch to Triton.

Triton's own dispatch runs, over a driver that launches nothing and a compiler that compiles nothing.
"""

import random
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.knobs")
import triton
import triton.language as tl
from apollo_triton.kernels import apply, sketch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from apollo_triton import APOLLOAdamW
from apollo_triton.core import device_backend, gpu, handles
from bench.stub_driver import StubDriver

CPU = torch.device("cpu")


def toy(p_first, p_second, size, step, scale, numbers, FLAG: tl.constexpr, BLOCK: tl.constexpr = 64):
    pass


class Compiled(CompiledKernel):
    """What a compiler would make, without its code. Being launched, it says so in ``launched``."""

    def __init__(self, source, target, options, launched):
        self.metadata = SimpleNamespace(target=target)
        self.what = str((source.fn.__name__, source.signature, source.constants, source.attrs, options))
        self.src, self.name = source, source.fn.__name__
        self.function, self.packed_metadata = object(), object()
        self._launched = launched

    def _init_handles(self):
        pass

    def launch_metadata(self, grid, stream, *arguments):
        return None

    @property
    def run(self):
        def launch(*arguments):
            self._launched.append((self.what, *arguments[:6], *arguments[9:]))

        return launch


@pytest.fixture
def driver(monkeypatch):
    stub, config = StubDriver(), triton.runtime.driver
    monkeypatch.setattr(config, "_active" if hasattr(config, "_active") else "active", stub)  # "active" is triton 3.4's
    return stub


@pytest.fixture
def launched(driver, monkeypatch):
    """The launches: the compiled kernel in words, the grid and all arguments."""
    found = []
    monkeypatch.setattr(handles, "_of_kernel", {})
    monkeypatch.setattr(
        triton.compiler, "compile", lambda source, target, options: Compiled(source, target, options, found)
    )
    return found


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels that Triton's own dispatch has launched."""
    names = []
    real = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: (names.append(self.__name__), real(self, *a, **k))[1])
    return names


def jit(function):
    return JITFunction(function, do_not_specialize=["step"])


def launch(kernel, *arguments, grid=(2, 3), **constants):
    gpu.launch(kernel, grid, CPU, *arguments, **constants)


ALIGNED, OTHER = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
PLAIN = {"first": ALIGNED, "second": ALIGNED, "size": 17, "step": 3, "scale": 0.5, "numbers": (0.5, ALIGNED)}
VARIANTS = [
    {},
    {"first": ALIGNED[1:]},
    {"second": ALIGNED[1:]},
    {"first": OTHER},
    {"first": None},
    {"first": None, "second": None},
    *({"size": size} for size in (1, 16, -16, 0, 2**31 - 1, 2**31, 2**63, 2**63 + 1, True)),
    *({"step": step} for step in (1, 16, 2**31, 2**63)),
    {"scale": 1.0},
    {"scale": 2},
    *({"numbers": numbers} for numbers in ((0.5, ALIGNED[1:]), (0.5, None), (1, ALIGNED), (16, ALIGNED), (0.5, OTHER))),
    *({"constants": {"FLAG": 1} | constants} for constants in ({}, {"BLOCK": 32}, {"num_warps": 8})),
]


def test_a_handle_launches_what_triton_would(launched):
    """Bug: a misaligned address runs 128-bit loads, a size of 1 is compiled in for others, a wide integer is cut."""
    by_handle, by_triton = jit(toy), jit(toy)
    order = [*VARIANTS * 3]
    random.Random(0).shuffle(order)
    for changes in order:
        arguments = PLAIN | changes
        constants = arguments.pop("constants", {"FLAG": 0})
        launch(by_handle, *arguments.values(), **constants)
        by_triton[(2, 3)](*arguments.values(), **constants)
        mine, triton_s = launched[-2:]
        assert len(mine) == len(triton_s)
        names = ["kernel", *"xyz", "stream", "function", "metadata", *arguments, "FLAG", "BLOCK"]
        for name, one, other in zip(names, mine, triton_s, strict=True):
            of_its_own = name in ("function", "metadata")
            assert of_its_own or one is other or one == other, (name, changes)
    assert len(handles.handles_of(by_handle).kept) <= len(by_handle.device_caches[0][0])


def test_only_a_launch_of_a_new_kind_goes_through_triton(launched, ran):
    """Bug: a key that changes with every step, or with every size, which also grows for ever."""
    kernel = jit(toy)
    for number in range(1, 200):
        launch(kernel, *(PLAIN | {"size": number, "step": number, "scale": 1 / number}).values(), FLAG=0)
    assert len(launched) == 199
    assert len(ran) == len(handles.handles_of(kernel).kept) == 3  # sizes: 1, multiples of 16, others


def test_a_handle_keeps_no_tensor(launched):
    tensor = torch.zeros(64)
    kernel, alive = jit(toy), weakref.ref(tensor)
    launch(kernel, *(PLAIN | {"first": tensor}).values(), FLAG=0)
    launched.clear()
    del tensor
    assert handles.handles_of(kernel).kept
    assert alive() is None


def set_hook(monkeypatch, kernel):
    kernel.add_pre_run_hook(lambda *arguments, **constants: None)


def set_enter_hook(monkeypatch, kernel):
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)


def set_exit_hook(monkeypatch, kernel):
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda metadata: None)


def set_debug(monkeypatch, kernel):
    monkeypatch.setattr(knobs.runtime, "debug", True)


def set_instrumentation(monkeypatch, kernel):
    if not hasattr(knobs.compilation, "instrumentation_mode"):
        pytest.skip("comes with triton 3.6")
    monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "fpsan")


def set_inspection(monkeypatch, kernel):
    if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
        pytest.skip("comes with triton 3.6")
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *arguments: ("key", "hash"))


SETTINGS = [set_hook, set_enter_hook, set_exit_hook, set_debug, set_instrumentation, set_inspection]


@pytest.mark.parametrize("setting", SETTINGS)
def test_launches_that_are_watched_are_left_to_triton(setting, launched, ran, monkeypatch):
    """Bug: a profiler's hook or TRITON_DEBUG that is set after the first step does nothing."""
    kernel = jit(toy)
    launch(kernel, *PLAIN.values(), FLAG=0)
    with monkeypatch.context() as patch:
        setting(patch, kernel)
        launch(kernel, *PLAIN.values(), FLAG=0)
        assert len(ran) == 2
    kernel.pre_run_hooks.clear()
    launch(kernel, *PLAIN.values(), FLAG=0)
    assert len(ran) == 2
    assert launched[0] == launched[2]
    if setting is set_debug:
        assert launched[0] != launched[1]  # compiled with assertions


@pytest.mark.parametrize("what", ["argument", "constant", "AMD", "3.3.1", "3.8.0"])
def test_what_is_not_known_here_is_left_to_triton(what, driver, launched, ran, monkeypatch):
    """Bug: a handle for something whose specialisation is not in its key, or a TypeError instead of a launch."""
    kernel, arguments, constants = jit(toy), dict(PLAIN), {"FLAG": 0}
    if what == "argument":
        arguments["scale"] = tl.constexpr(2)
    elif what == "constant":
        monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: ran.append(self))  # Triton has no such constants
        constants["FLAG"] = [1]
    elif what == "AMD":  # pointers are specialised by the size of what they point to as well
        driver._target = GPUTarget("hip", "gfx942", 64)
    else:
        monkeypatch.setattr(triton, "__version__", what)
    for _ in range(2):
        launch(kernel, *arguments.values(), **constants)
    assert len(ran) == 2
    assert not handles.handles_of(kernel).kept


@pytest.mark.parametrize("gradients", ["stay", "move"])
def test_steps_after_the_first_launch_by_handles_alone(gradients, launched, ran, monkeypatch):
    """Bug: a number of the step, or new gradients, sends every launch through Triton."""
    for module, name in [(sketch, "sketch_kernel"), (apply, "apply_kernel")]:
        monkeypatch.setattr(module, name, jit(getattr(module, name).fn))
    monkeypatch.setattr(device_backend, "_obstacle", lambda device: None)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 32), (32, 64))]
    optimizer = APOLLOAdamW([{"params": weights, "rank": 2, "update_proj_gap": 2}])
    first = 0
    for number in range(20):  # t = 16 among them
        for weight in weights:
            if number == 0 or gradients == "move":
                weight.grad = torch.zeros_like(weight)
        optimizer.step()
        first = first or len(ran)
    assert first == 4
    assert len(ran) == first
    assert len(launched) == 20 * first
