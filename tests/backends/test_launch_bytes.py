"""The kernels as launches: exact bytes, no temporary of a weight's size, as few launches as kinds of matrices, and
nothing compiled in that changes from step to step.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from implicit_cases import layer_of, operands_of
from implicit_cases import step as step_from_factors
from kernel_cases import (
    MINI,
    new_gradients,
    optimizer_of,
    parameters_of,
    parts_of,
)
from tiers import values
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Launch, Recorder

from apollo_triton.core import gpu
from apollo_triton.int8.weight import Int8Weight

SIDES = [(256, 384), (384, 256)]
EIGHT = {"constructor": {"state_bits": 8, "min_8bit_size": 257}}  # the interpreter takes a second for 4096


# --- bytes


class Moved(NamedTuple):
    """What launches should move."""

    launches: list[Launch]
    kernels: list[str]
    tensors: list[tuple[torch.Tensor, int | None, int]]  # with bytes loaded, None for any, and stored
    most: float  # bytes in all
    distinct: bool = False  # whether a launch may load a byte again, as P is loaded for every 64 channels


def second_step(weights, **options):
    """The launches of a step that is not the first, when no state is made and no projection written."""
    optimizer = optimizer_of(weights, **options)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    recorder.assert_clean()
    return recorder.launches, optimizer


def rank_one(shape, dtype):
    """Eight bytes a parameter in bfloat16. All else: addresses, 64 channels' sums, a few numbers a program."""
    (weight,) = parameters_of([shape], dtype)
    launches, _ = second_step([weight], **MINI)
    nbytes = weight.nbytes
    tensors = [(weight, nbytes, nbytes), (weight.grad, 2 * nbytes, 0)]
    return Moved(launches, ["sketch_kernel", "apply_kernel"], tensors, 4.1 * nbytes)


def clipped(shape, dtype):
    """R and |G_c|^2 besides, written and read: no third read of G, which would be two bytes a parameter."""
    (weight,) = parameters_of([shape], dtype)
    launches, _ = second_step([weight], constructor={"max_grad_norm": 1e-3}, **MINI)
    tensors = [(weight, weight.nbytes, weight.nbytes), (weight.grad, 2 * weight.nbytes, 0)]
    return Moved(launches, ["sketch_kernel", "rescale_kernel", "apply_kernel"], tensors, 8.3 * weight.numel())


def rank_64(shape, dtype):
    """The moments besides, the projection, and one factor a channel, written and read."""
    (weight,) = parameters_of([shape], dtype)
    launches, optimizer = second_step([weight], rank=64)
    moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
    nbytes = weight.nbytes
    tensors = [(weight, nbytes, nbytes), (weight.grad, 2 * nbytes, 0), *((M, M.nbytes, M.nbytes) for M in moments)]
    most = 4 * nbytes + 4 * moments[0].nbytes + 2 * 64 * min(shape) + 0.05 * weight.numel()
    return Moved(launches, ["sketch_kernel", "apply_kernel"], tensors, most, distinct=True)


def blockwise(shape, dtype):
    """8-bit moments are read twice and written once, a byte each."""
    (weight,) = parameters_of([shape], dtype)
    launches, optimizer = second_step([weight], rank=16, **EIGHT)
    held = optimizer.state[weight]
    tensors = [(held[name], 2 * held[name].nbytes, held[name].nbytes) for name in ("exp_avg_q", "exp_avg_sq_q")]
    tensors += [(held[f"{name}_absmax"], None, held[f"{name}_absmax"].nbytes) for name in ("exp_avg", "exp_avg_sq")]
    tensors += [(weight.grad, 2 * weight.nbytes, 0), (weight, weight.nbytes, weight.nbytes)]
    return Moved(launches, ["sketch_kernel", "rescale_blockwise_kernel", "apply_kernel"], tensors, float("inf"))


def int8(shape, dtype):
    """Under 6.3 bytes a parameter in bfloat16, groups of 128: G twice, q read and written, five bytes a group likewise.
    No float copy of the weight goes through memory."""
    (plain,) = parameters_of([shape], dtype)
    weight = nn.Parameter(Int8Weight.of(plain.detach(), 128))
    weight.grad = plain.grad
    launches, _ = second_step([weight], **MINI)
    tensors = [(weight.grad, 2 * weight.grad.nbytes, 0)]
    tensors += [(part, part.nbytes, part.nbytes) for part in (weight.q, weight.scale, weight.zero)]
    return Moved(launches, ["sketch_kernel", "apply_int8_kernel"], tensors, (2 * dtype.itemsize + 2.3) * weight.numel())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step_of", "shape", "dtype"),
    [
        *values((rank_one, int8), SIDES, (torch.bfloat16,)),
        *values((clipped,), SIDES, (torch.bfloat16,)),
        *values((rank_64,), SIDES, (torch.bfloat16, torch.float32)),
        (blockwise, (192, 96), torch.bfloat16),
    ],
)
def test_bytes_moved(step_of, shape, dtype):
    """A tensor read once more, or a temporary of its size that goes through memory."""
    moved = step_of(shape, dtype)
    assert [launch.kernel for launch in moved.launches] == moved.kernels
    for tensor, loaded, stored in moved.tensors:
        traffic = [launch.traffic(tensor) for launch in moved.launches]
        assert loaded is None or sum(each.loaded for each in traffic) == loaded
        assert sum(each.stored for each in traffic) == stored
    once = "_once" * moved.distinct
    total = sum(getattr(each, f"loaded{once}") + getattr(each, f"stored{once}") for each in moved.launches)
    assert total <= moved.most


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "side"), [(16, 192), pytest.param(64, 768, marks=pytest.mark.full)])
def test_clipping_moves_a_sketch_and_no_gradient(rank, side):
    """R and |G_c|^2 are written and read: at rank 64 and width 768 these are 0.68 bytes a parameter, at 4096 0.13."""
    (weight,) = parameters_of([(side, side)], torch.bfloat16)
    plain, clipped = (
        sum(launch.loaded_once + launch.stored_once for launch in second_step([weight], rank=rank, **options)[0])
        for options in ({}, {"constructor": {"max_grad_norm": 1e-3}})
    )
    sketch = 8 * (rank + 1) * side
    assert sketch <= clipped - plain <= sketch + 16 * side / 64  # the coefficient and addresses, 64 channels a program


@pytest.mark.parametrize(
    ("shape", "dtype", "group", "most", "kept"),
    [
        ((384, 256), torch.bfloat16, {"rank": 63}, 1 << 29, True),
        ((384, 256), torch.bfloat16, {"rank": 64}, 1 << 29, False),  # R written and read is as much as G
        ((256, 384), torch.float32, {"rank": 64}, 1 << 29, True),  # half as much
        ((384, 320), torch.bfloat16, {"rank": 300}, 1 << 29, True),  # above rank 256 R is in memory anyway
        ((384, 256), torch.bfloat16, {"rank": 64, **EIGHT}, 1 << 29, True),  # so it is for 8-bit moments
        ((384, 256), torch.bfloat16, {"rank": 16}, 4 * 384 * 16, True),
        ((384, 256), torch.bfloat16, {"rank": 16}, 4 * 384 * 16 - 1, False),
    ],
)
def test_clipping_keeps_a_sketch_that_is_worth_its_memory(shape, dtype, group, most, kept, monkeypatch):
    """A gradient that is read a third time for nothing, or a sketch that takes more than it saves."""
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel.fn.__name__))
    monkeypatch.setattr("apollo_triton.backends.interface._MOST_KEPT", most)
    constructor = {"max_grad_norm": 1.0, **group.get("constructor", {})}
    optimizer = optimizer_of(parameters_of([shape], dtype), **{**group, "constructor": constructor})
    optimizer.step()
    assert ("squared_norm_kernel" not in launched) == kept
    assert launched.count("sketch_kernel") == 1


IMPLICIT = {  # of a step that is not the first
    "exact": ["project_kernel", "collect_kernel", "tile_norms_kernel", "rescale_kernel", "apply_operands_kernel"],
    "gram": [
        *("project_kernel", "collect_kernel", "gram_kernel", "gram_norms_kernel"),
        *("rescale_kernel", "apply_operands_kernel"),
    ],
    "sketch": ["project_kernel", "collect_kernel", "rescale_kernel", "apply_operands_kernel"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "how_and_tokens"), values([(256, 128), (128, 256)], [("exact", 200), ("gram", 4), ("sketch", 40)])
)
def test_a_step_from_factors_reads_and_writes_the_weight_once(sides, how_and_tokens):
    """4 bytes a parameter in bfloat16, and the factors once a tile of the other side."""
    how, tokens = how_and_tokens
    layer = layer_of(sides, torch.bfloat16, constructor={"stochastic_rounding": True}, rank=16)
    step_from_factors(layer, operands_of(tokens, sides, torch.bfloat16))
    factors = operands_of(tokens, sides, torch.bfloat16, seed=1)
    with Recorder() as recorder:
        step_from_factors(layer, factors, 2, "sketch" if how == "sketch" else "exact")
    recorder.assert_clean()
    assert [launch.kernel for launch in recorder.launches] == IMPLICIT[how]
    traffic = [launch.traffic(layer.weight) for launch in recorder.launches]
    for name in ("loaded", "stored", "loaded_once", "stored_once"):
        assert sum(getattr(each, name) for each in traffic) == layer.weight.nbytes
    tiles = [side // 128 for side in sides]
    for factor, times in zip(factors[:2], tiles, strict=True):
        assert recorder.launches[-1].traffic(factor).loaded == factor.nbytes * times


def test_int8_weights_are_read_and_written_once_from_factors():
    layer = layer_of((256, 256), torch.bfloat16, 128, {"stochastic_rounding": True}, **MINI)
    factors = operands_of(64, (256, 256), torch.bfloat16)
    with Recorder() as recorder:
        step_from_factors(layer, factors)
    recorder.assert_clean()
    apply = recorder.launches[-1]
    assert apply.kernel == "apply_int8_operands_kernel"
    for part in parts_of(layer.weight):
        traffic = apply.traffic(part)
        assert (traffic.loaded, traffic.stored) == (part.nbytes, part.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "layers"),
    [
        (["APOLLO-Mini"], 1),
        pytest.param(None, 4, marks=pytest.mark.full),
    ],
)
def test_the_table_of_the_documentation_is_what_the_recorder_counts(methods, layers, monkeypatch):
    """Of four layers, which share P: that of Mini takes no memory, and its figures are those of one."""
    from bench import kernel_table, report_text

    table = kernel_table.written(kernel_table.PAGE.read_text(encoding="utf-8")).splitlines()
    if methods is not None:
        monkeypatch.setattr(kernel_table, "METHODS", {name: kernel_table.METHODS[name] for name in methods})
        monkeypatch.setattr(kernel_table, "DENSE", {})
        table = [*table[:2], *(line for line in table if any(f"| {name}:" in line for name in methods))]
    monkeypatch.setattr(kernel_table, "LAYERS", layers)
    assert table == report_text.launches(kernel_table.measured()).splitlines()


# --- allocations


class LargestNewTensor(TorchDispatchMode):
    """The most bytes that an operation's result takes, views aside."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, torch.Tensor) and not any(each is given for given in args):
                given = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
                if each.untyped_storage().data_ptr() not in given:
                    self.nbytes = max(self.nbytes, each.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("group", [MINI, {"rank": 4}, {"rank": 4, "constructor": {"max_grad_norm": 1.0}}])
def test_no_temporary_has_a_weights_size(group, monkeypatch):
    """The kernels only compute; what a step allocates is made by torch."""
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    weight, dense = parameters_of([(512, 384), (4096,)], torch.bfloat16)
    with LargestNewTensor() as largest:
        optimizer = optimizer_of([weight], [dense], **group)
        optimizer.step()
        optimizer.step()
    assert largest.nbytes <= 4 * 4096  # the dense parameter's moments; the weight has 393,216


def test_a_step_from_factors_allocates_no_tensor_of_the_weights_size(monkeypatch):
    """R, S, K and shares of norms."""
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    for tokens in (64, 1024):
        layer = layer_of((1024, 512), torch.bfloat16, **MINI)
        factors = operands_of(tokens, (1024, 512), torch.bfloat16)
        with LargestNewTensor() as largest:
            step_from_factors(layer, factors)
        assert 0 < largest.nbytes <= 8 * 4 * 1024 * max(4, tokens // 128)
        assert largest.nbytes < layer.weight.nbytes / 8


# --- few launches


LLAMA_7B = [(64, 64)] * 128 + [(172, 64)] * 64 + [(64, 172)] * 32
OF_128 = [(64, 128), (128, 128), (256, 128)] * 3


@pytest.mark.parametrize(
    ("shapes", "norms", "int8", "group", "most"),
    [
        (LLAMA_7B, 66, {}, MINI, 6),
        (LLAMA_7B, 66, {}, {"rank": 32, "update_proj_gap": 1}, 7),  # a refresh in the step
        ([(64, 48)] * 9, 0, {}, MINI, 2),
        ([(64, 48), (48, 64), (80, 16), (16, 16), (200, 30), (30, 200)], 0, {}, MINI, 6),  # 30 columns: not aligned
        ([(64, 48), (48, 64), (80, 16), (16, 16), (200, 32), (32, 200)], 0, {}, MINI, 4),
        ([(64, 32), (96, 32), (128, 40)] * 2, 0, {}, {"rank": 16, **EIGHT}, 3),
        # A matrix whose moments are too small for 8 bits is float32, and goes by itself.
        ([(64, 32), (96, 32), (16, 16)], 0, {}, {"rank": 16, **EIGHT}, 3 + 2),
        (OF_128, 0, {128: OF_128}, MINI, 4),  # two orientations of two launches
        (OF_128, 0, {128: OF_128, 64: [(64, 128)]}, MINI, 6),  # another group size is another kernel
    ],
)
def test_launches_do_not_grow_with_layers(shapes, norms, int8, group, most, monkeypatch):
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    weights, dense = parameters_of(shapes, torch.bfloat16), parameters_of([(64,)] * norms, torch.bfloat16)
    if int8:
        weights = [
            nn.Parameter(Int8Weight.of(each.detach(), size))
            for size, given in int8.items()
            for each in parameters_of(given, torch.bfloat16)
        ]
        new_gradients(weights, 0)
    optimizer = optimizer_of(weights, dense, **group)
    optimizer.step()
    launched.clear()
    optimizer.step()
    assert len(launched) == most


# --- what is compiled in


def specialisation(launched):
    """What Triton compiles a launch by: types, values of constants, and of integers whether 1 or a multiple of 16."""
    kernel, arguments, constants = launched
    names = [name for name in kernel.arg_names if name not in constants]
    key = [kernel.fn.__name__, tuple(sorted(constants.items(), key=lambda item: item[0]))]
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            key.append((name, value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and name in kernel.kwargs.get("do_not_specialize", ()):
            key.append((name, -(2**31) <= value < 2**31))
        elif isinstance(value, int):
            key.append((name, value == 1, value % 16 == 0, -(2**31) <= value < 2**31))
        else:
            key.append((name, type(value)))
    return tuple(key)


@pytest.mark.parametrize("rank", [1, 20])
def test_nothing_that_changes_between_steps_is_compiled_in(rank, monkeypatch):
    launched = []
    monkeypatch.setattr(
        gpu,
        "launch",
        lambda kernel, grid, device, *arguments, **constants: launched.append((kernel, arguments, constants)),
    )
    seen = []
    # A seed at or above 2**31 is a 64-bit argument of the projection kernel: one more variant, of that kernel alone.
    for seed, lr, decay, betas, gap in ((0, 1e-3, 0.0, (0.9, 0.999), 3), (77, 0.5, 0.1, (0.0, 0.95), 16)):
        weights, dense = parameters_of([(64, 48)] * (1 + seed % 3), seed=seed), parameters_of([(8,)])
        group = {"rank": rank, "weight_decay": decay, "betas": betas, "update_proj_gap": gap, "scale": 1.0 + seed}
        optimizer = optimizer_of(weights, dense, lr=lr, constructor={"seed": seed}, **group)
        for step in range(18):
            for each in optimizer.param_groups:
                each["lr"] = lr / (step + 1)
            new_gradients(weights + dense, step)
            optimizer.step()
        seen.append({specialisation(each) for each in launched})
        launched.clear()
    assert seen[0] == seen[1]
    assert len(seen[0]) == (5 if rank == 20 else 4)
