"""The kernels as launches, a row of a table for each kind of step: exact bytes, no race, no stray access, the same bits
whatever the order, tile or batch, as few launches as kinds of matrices, and offsets beyond 2**31.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from implicit_cases import layer_of, operands_of
from implicit_cases import step as step_from_factors
from int8_linear_cases import on_kernels, results, weight_of
from kernel_cases import (
    MINI,
    assert_same_bits,
    drawn,
    new_gradients,
    optimizer_of,
    parameters_of,
    state_tensors,
    train,
)
from tiers import tiers, values
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from apollo_triton.kernels import table as fields
from sanitizer import Launch, Recorder

from apollo_triton.backends.interface import Factors, StepScalars
from apollo_triton.backends.triton import implicit
from apollo_triton.backends.triton import matrices as tables
from apollo_triton.backends.triton import verbs as fused
from apollo_triton.core import gpu
from apollo_triton.core.implicit_gradient import ImplicitGradient
from apollo_triton.core.projection import TENSOR_CORE_RANK
from apollo_triton.core.settings import Settings
from apollo_triton.int8.weight import Int8Weight

SIDES = [(256, 384), (384, 256)]
EIGHT = {"constructor": {"state_bits": 8, "min_8bit_size": 257}}  # the interpreter takes a second for 4096
VARIANTS = {
    "mini": MINI,
    "rank 3": {"rank": 3},
    "rank 20": {"rank": 20},
    "rank 300": {"rank": 300, "proj_type": "reverse_std"},
    "rademacher": {"rank": 24, "distribution": "rademacher"},
    "rademacher, rank 1": {"rank": 1, "distribution": "rademacher"},
    "svd": {"rank": 5, "proj": "svd"},
    "bfloat16 moments": {"rank": 7, "constructor": {"state_dtype": torch.bfloat16, "stochastic_rounding": True}},
    "clipped": {"rank": 2, "constructor": {"max_grad_norm": 0.1}},
}
# The others are these with other numbers in P, or with another rank in the same kernels.
FAST_VARIANTS = ("mini", "rank 20", "svd", "bfloat16 moments", "clipped")

# Several programs along the channels (64), turns along the width (64 or 128), ragged ends, aligned and unaligned rows.
SHAPES = [(70, 40), (40, 70), (2, 67, 20), (1, 40), (40, 1), (1, 1)]


def fitting(group, shapes=SHAPES):
    """The shapes that a rank suits."""
    if group["rank"] > 100:
        return [(20, 304), (2, 304, 8)]
    if group == VARIANTS["rank 3"]:
        shapes = [*shapes, (140, 132)]
    return [shape for shape in shapes if min(shape[-2:]) >= group["rank"]]


# --- any order


def by_gradient(shapes, dense=(), dtype=torch.bfloat16, group_size=0, **options):
    """Two steps from gradients, of which the first makes state and P, on weights, or on int8 ones."""

    def run():
        weights = parameters_of(shapes, dtype)
        if group_size:
            weights = [nn.Parameter(Int8Weight.of(each.detach(), group_size)) for each in weights]
        parameters, optimizer = train(weights, parameters_of(dense, dtype), **options)
        return [part for each in parameters for part in (*parts_of(each), *state_tensors(optimizer, each).values())]

    return run


def by_factors(shape, dtype=torch.bfloat16, group_size=0, limiter_norm="exact", **options):
    """Two steps from the factors of a gradient, and its norms both ways. Large tiles where the factors have 16 bits."""

    def run():
        tokens, *sides = shape
        with mock.patch.object(gpu, "has_large_shared_memory", return_value=dtype == torch.bfloat16):
            layer = layer_of(sides, dtype, group_size, **options)
            for number in (1, 2):
                factors = operands_of(tokens, sides, dtype, seed=number)
                step_from_factors(layer, factors, number, limiter_norm)
            norms = [of(layer.table, factors) for of in (implicit.gram_norms, implicit.tile_norms)]
        return [*parts_of(layer.weight), *state_tensors_of(layer.state), *norms]

    return run


def by_int8_linear(rows, dtype):
    """Forward and backward through an int8 layer."""

    def run():
        x, gradient = drawn((rows, 136), 2, dtype), drawn((rows, 150), 3, dtype)
        found, _ = results(x, weight_of(150, 136, 12, dtype), None, gradient, on_kernels(nullcontext()))
        return list(found[:2])

    return run


def parts_of(weight):
    return (weight.q, weight.scale, weight.zero) if isinstance(weight, Int8Weight) else (weight.detach(),)


def state_tensors_of(state):
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


BLOCKWISE = [(301, 4), (4, 270)]  # blocks of 256 numbers, cut where programs are
INT8 = [(33, 48), (48, 96), (6, 48)]  # groups of 48 and 12 straddle the programs' tiles
# Of ``SHAPES`` two are enough for a row, one of random bits, which the interpreter draws slowly.
SHAPES_OF = {"mini": slice(0, 3, 2), "clipped": slice(0, 3, 2), "bfloat16 moments": slice(1)}
RUNS = {
    **{
        f"{name}, {str(dtype)[6:]}": by_gradient(
            fitting(group)[SHAPES_OF.get(name, slice(2))],
            [(4104,), (7,), (3, 5)] if name in ("mini", "clipped") else [],
            dtype,
            **group,
        )
        for name, group in VARIANTS.items()
        for dtype in (torch.bfloat16, torch.float32)
    },
    "8-bit moments, mini": by_gradient(BLOCKWISE, dtype=torch.float32, rank=1, scale_type="tensor", **EIGHT),
    "8-bit moments, rank 3": by_gradient(BLOCKWISE, dtype=torch.float32, rank=3, **EIGHT),
    "8-bit moments, rank 24": by_gradient([(2, 66, 25)], rank=24, **EIGHT),
    **{
        f"int8 weights, groups of {size}, rank {group['rank']}": by_gradient(INT8, (), torch.float32, size, **group)
        for size in (16, 48, 12)
        for group in (MINI, {"rank": 3})
    },
    # tokens, out, in
    "factors": by_factors((40, 136, 72), rank=16, constructor={"stochastic_rounding": True}),
    "factors, turned": by_factors((70, 136, 200), rank=16, constructor={"stochastic_rounding": True}),
    "factors, gram": by_factors((4, 136, 72), rank=16, constructor={"stochastic_rounding": True}),
    "factors, sketch": by_factors((40, 136, 200), rank=16, limiter_norm="sketch"),
    **{
        f"factors, {tokens} x {rows} x {columns}, {'int8, ' * bool(size)}{str(dtype)[6:]}": by_factors(
            (tokens, rows, columns), dtype, size, rank=4
        )
        for tokens, rows, columns in ((127, 130, 200), (130, 200, 128), (1, 40, 24), (33, 70, 72), (5, 130, 72))
        for dtype in (torch.float32, torch.bfloat16)
        for size in (0, 8)
    },
    "int8 layer, float32": by_int8_linear(40, torch.float32),
    "int8 layer, bfloat16": by_int8_linear(140, torch.bfloat16),
}
FAST_RUNS = {
    *(f"{name}, bfloat16" for name in FAST_VARIANTS),
    *("8-bit moments, mini", "8-bit moments, rank 24"),
    *("int8 weights, groups of 48, rank 3", "int8 weights, groups of 12, rank 1"),
    *("factors", "factors, gram", "factors, 33 x 70 x 72, int8, float32", "factors, 5 x 130 x 72, bfloat16"),
    *("int8 layer, float32", "int8 layer, bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers(RUNS, FAST_RUNS.__contains__))
@pytest.mark.parametrize("order", tiers((1, 2), lambda order: order == 1))
def test_programs_in_any_order_leave_the_same_bits(name, order):
    """A program that reads what another writes, elements that two programs own, accesses beyond the end, atomics."""
    ends = []
    for shuffle in (None, order):
        with Recorder(shuffle=shuffle) as recorder:
            ends.append(RUNS[name]())
        recorder.assert_clean()
        assert name not in FAST_RUNS or max(launch.programs for launch in recorder.launches) > 1
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


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
    tensors = [(held[name], 2 * held[name].nbytes, held[name].nbytes) for name in ("exp_avg", "exp_avg_sq")]
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
    [(["APOLLO-Mini"], 1), pytest.param(["APOLLO-Mini", "APOLLO, rank 64"], 4, marks=pytest.mark.full)],
)
def test_the_table_of_the_documentation_is_what_the_recorder_counts(methods, layers, monkeypatch):
    """Of four layers, which share P: that of Mini takes no memory, and its figures are those of one."""
    from bench import kernel_table, report_text

    monkeypatch.setattr(kernel_table, "METHODS", {name: kernel_table.METHODS[name] for name in methods})
    monkeypatch.setattr(kernel_table, "LAYERS", layers)
    table = kernel_table.written(kernel_table.PAGE.read_text(encoding="utf-8")).splitlines()
    of_these = [
        line for line in table if not line.startswith("| APOLLO") or any(f"| {name}:" in line for name in methods)
    ]
    assert of_these == report_text.launches(kernel_table.measured()).splitlines()


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


# --- what does not show in the bits


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers([*VARIANTS, "8-bit moments"], ("mini", "rank 20", "8-bit moments").__contains__))
def test_scratch_is_written_before_it_is_read(name, monkeypatch):
    """A part of a sum, a channel's factor or R that a program leaves out."""
    group = {**VARIANTS, "8-bit moments": {"rank": 4, **EIGHT}}[name]
    shapes = [(70, 8)] if name == "8-bit moments" else fitting(group)[:2]
    weights, dense = parameters_of(shapes), parameters_of([(4104,), (7,)])
    expected, optimizer = train(weights, dense, **group)
    empty = torch.empty

    def poisoned(*arguments, **options):
        result = empty(*arguments, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)
    ours, poisoned_optimizer = train(weights, dense, **group)
    assert_same_bits(expected, ours, (optimizer, poisoned_optimizer))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "offset"),
    tiers(
        [(name, offset) for name in VARIANTS for offset in (0, 16, 3)],
        lambda *case: case in {("mini", 3), ("rank 20", 0), ("svd", 3), ("bfloat16 moments", 16), ("clipped", 3)},
    ),
)
def test_nothing_outside_of_a_buffer_is_touched(name, offset):
    """Weights, gradients and moments between sentinels, at aligned and at odd addresses."""
    group = VARIANTS[name]
    buffers = []

    def guarded(tensor):
        whole = torch.full((tensor.numel() + offset + 64,), 77.0, dtype=tensor.dtype)
        inner = whole[offset : offset + tensor.numel()].view(tensor.shape)
        buffers.append((whole, tensor.numel()))
        return inner.copy_(tensor)

    weights = [nn.Parameter(guarded(each.detach())) for each in parameters_of(fitting(group)[:2])]
    dense = [nn.Parameter(guarded(each.detach())) for each in parameters_of([(4104,), (9,)])]
    optimizer = optimizer_of(weights, dense, **group)
    plain = [nn.Parameter(each.detach().clone()) for each in weights + dense]
    reference = optimizer_of(plain[: len(weights)], plain[len(weights) :], **group)
    for step in range(2):
        for index, (ours, theirs) in enumerate(zip(weights + dense, plain, strict=True)):
            theirs.grad = drawn(ours.shape, 10 * step + index, scale=1e-2)
            ours.grad = guarded(theirs.grad)
        optimizer.step()
        reference.step()
        if step == 0:
            for parameter in weights + dense:
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[parameter][moment] = guarded(optimizer.state[parameter][moment])
    for whole, numel in buffers:
        assert torch.all(whole[:offset] == 77)
        assert torch.all(whole[offset + numel :] == 77)
    # Misaligned ones take the other path, which adds the squares of a dense gradient up in the same order.
    assert_same_bits(weights + dense, plain)


@pytest.mark.slow
@pytest.mark.parametrize("group", tiers([{"rank": 4}, MINI, {"rank": 20, "weight_decay": 0.1}], {"rank": 4}.__eq__))
def test_tiles_of_elementwise_work_do_not_show(group, monkeypatch):
    weights = parameters_of([(70, 130), (64, 48)], torch.bfloat16)
    options = {**group, "constructor": {"stochastic_rounding": True}}
    expected, _ = train(weights, **options)
    tiles = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 64, "num_warps": 4}
    monkeypatch.setattr(tables.apply, "blocks", lambda columns: tiles)
    ours, optimizer = train(weights, **options)
    assert optimizer._engine._plan.tables[0].tile_blocks == tiles
    assert_same_bits(expected, ours)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 20])
def test_the_block_of_channels_does_not_show_in_work_that_is_a_channels_own(rank, monkeypatch):
    """Without the limiter, whose sum over channels is grouped by programs."""
    weights = parameters_of([(70, 20), (20, 70)])
    options = {"rank": rank, "disable_nl": True}
    expected, optimizer = train(weights, **options)
    blocks = tables.sketch.blocks
    monkeypatch.setattr(tables.sketch, "blocks", lambda *given: blocks(*given) | {"BLOCK_CHANNELS": 16})
    ours, other = train(weights, **options)
    pairs = [*zip(expected, ours, strict=True)]
    pairs += [(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"]) for one, two in pairs]
    for one, two in pairs:
        if rank >= TENSOR_CORE_RANK:
            # The interpreter multiplies by NumPy, whose BLAS may add a row's products in another order in a matrix of
            # 16 rows than in one of 64: on some CPUs it does. A wrong block is off by the size of the values.
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6 * one.abs().max().item())
        else:
            assert torch.equal(one, two)


ALONE = {
    **{name: (fitting(group)[:4], group) for name, group in VARIANTS.items() if name != "clipped"},
    "8-bit moments": ([(301, 5), (40, 30), (2, 70, 6)], {"rank": 2, **EIGHT}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers(ALONE, ("mini", "rank 20", "svd", "8-bit moments").__contains__))
def test_a_parameter_alone_in_a_batch_and_in_any_order_gets_the_same_bits(name):
    """A matrix's addresses, sums or random numbers taken by its place in the table."""
    shapes, group = ALONE[name]
    weights = parameters_of(shapes, torch.bfloat16)
    together, optimizer = train(weights, steps=1, **group)
    for index, weight in enumerate(weights):
        gradient = together[index].grad
        alone = nn.Parameter(weight.detach().clone())
        alone.grad = gradient
        single = optimizer_of([alone], **group)
        single.step()
        assert_same_bits([together[index]], [alone], (optimizer, single))
    reversed_order = [nn.Parameter(each.detach().clone()) for each in reversed(weights)]
    for parameter, given in zip(reversed_order, reversed(together), strict=True):
        parameter.grad = given.grad
    other = optimizer_of(reversed_order, **group)
    other.step()
    assert_same_bits(together, reversed_order[::-1], (optimizer, other))


# --- offsets beyond 2**31


def assert_reaches(launch, at, size, loaded=None, stored=None):
    """The bytes from ``at`` on that a launch loads and stores are these, counted from there, and no others."""
    assert not launch.strays
    for found, expected in zip(launch.addresses(at, size), (loaded, stored), strict=True):
        assert expected is None or torch.equal(torch.from_numpy(found), expected)


@pytest.mark.parametrize(("keeps_rows", "aligned"), [(True, True), (True, False), (False, True), (False, False)])
def test_more_than_two_to_the_31_elements(keeps_rows, aligned):
    """2.9e9 elements that do not exist: the last programs reach just the last ones, and no others."""
    rows, columns, nbytes = (40_000_000, 72, 2) if keeps_rows else (72, 40_000_000, 2)
    size = rows * columns * nbytes
    weight_at, gradient_at, moments_at = 1 << 44, 1 << 45, 1 << 46
    (weight,) = parameters_of([(64, 64)], torch.bfloat16)
    optimizer = optimizer_of([weight], **MINI, proj_type="right" if keeps_rows else "left")
    optimizer.step()
    table, *_ = optimizer._engine._plan.tables
    settings = Settings.of(optimizer.param_groups[0])
    channels = rows if keeps_rows else columns
    table.aligned = aligned
    for field, value in (
        (fields.WEIGHT, weight_at),
        (fields.EXP_AVG, moments_at),
        (fields.EXP_AVG_SQ, moments_at + 4 * channels),
        (fields.ROWS, rows),
        (fields.COLUMNS, columns),
        (fields.WEIGHT_ROW_STRIDE, columns),
        (fields.GRADIENT_ROW_STRIDE, columns),
    ):
        table.addresses[0, field.value] = value
    table.gradients[0] = gradient_at
    table.tile_blocks = tables.apply.blocks(columns)
    across = -(-columns // table.tile_blocks["BLOCK_COLUMNS"])
    table.tile_programs = torch.zeros(-(-rows // table.tile_blocks["BLOCK_ROWS"]) * across, dtype=torch.int32)
    block = table.channel_blocks["BLOCK_CHANNELS"]
    table.channel_programs = torch.zeros(-(-channels // block), dtype=torch.int32)
    scalars = StepScalars(2)
    phantom = [(weight_at, size), (gradient_at, size), (moments_at, 8 * channels)]

    first_row = (rows - 1) // table.tile_blocks["BLOCK_ROWS"] * table.tile_blocks["BLOCK_ROWS"]
    first_column = (columns - 1) // table.tile_blocks["BLOCK_COLUMNS"] * table.tile_blocks["BLOCK_COLUMNS"]
    tile = (torch.arange(first_row, rows)[:, None] * columns + torch.arange(first_column, columns)).flatten() * nbytes
    factors = Factors(None, torch.ones(len(table.channel_programs), 3))
    table.previous.fill_(1)
    # That every program adds all partial sums up is tested elsewhere; here it would take 5,000 turns.
    table.channel_blocks = table.channel_blocks | {"BLOCK_CHANNELS": 1 << 20}
    with Recorder(phantom=phantom, only=[(len(table.tile_programs) - 1, 0, 0)]) as recorder:
        fused.apply(table, settings, scalars, factors)
    assert_reaches(recorder.launches[0], weight_at, size, tile, tile)
    assert_reaches(recorder.launches[0], gradient_at, size, tile)

    table.channel_blocks["BLOCK_CHANNELS"] = block
    with Recorder(phantom=phantom, only=[(len(table.channel_programs) - 1, 0, 0)]) as recorder:
        fused.sketch_and_rescale(table, settings, scalars)
    assert not recorder.launches[0].strays
    loaded = torch.from_numpy(recorder.launches[0].addresses(gradient_at, size)[0])
    first = (channels - 1) // block * block
    assert loaded.numel() == (channels - first) * 72
    assert loaded[-1] == size - nbytes
    assert loaded[0] == (first * columns if keeps_rows else first) * nbytes
    last = torch.arange(first, channels)
    assert_reaches(recorder.launches[0], moments_at, 8 * channels, stored=4 * torch.cat((last, channels + last)))


class Phantom:
    """An argument of a launch that is nowhere in memory."""

    device = torch.device("cpu")

    def __init__(self, address, dtype, *shape):
        self.address, self.dtype, self.shape = address, dtype, shape

    def element_size(self):
        return self.dtype.itemsize

    def data_ptr(self):
        return self.address

    def stride(self):
        return self.shape[1], 1


def test_more_than_two_to_the_31_elements_from_factors(monkeypatch):
    """72 tokens of 30 million features, and 80 rows of W, that do not exist: the last programs reach just the last."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda executor, *arguments: arguments)
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    tokens, rows, columns, rank = 72, 80, 30_000_008, 80
    X_at, W_at, out_at = 1 << 44, 1 << 45, 1 << 46
    layer = layer_of((128, 96), torch.bfloat16, proj_type="left", rank=rank, scale_type="tensor")
    own = layer.table
    own.channels = columns
    own.addresses[0, fields.ROWS.value], own.addresses[0, fields.COLUMNS.value] = rows, columns
    own.channel_blocks["BLOCK_CHANNELS"] = 1 << 30  # one partial sum to add up, not half a million
    own.members = [SimpleNamespace(weight=Phantom(W_at, torch.bfloat16, rows, columns))]
    own.previous.fill_(1)
    given = ImplicitGradient(Phantom(X_at, torch.bfloat16, tokens, columns), drawn((tokens, rows), 1, torch.bfloat16))
    sizes = {X_at: 2 * tokens * columns, W_at: 2 * rows * columns, out_at: 4 * columns * rank}
    scratch = implicit._scratch
    monkeypatch.setattr(
        implicit,
        "_scratch",
        lambda where, *shape: Phantom(out_at, torch.float32, *shape) if columns in shape else scratch(where, *shape),
    )
    monkeypatch.setattr(implicit, "_sum", lambda parts: parts)
    factors = Factors(None, torch.ones(1, 3))
    last = (-(-columns // 128) - 1, 0, 0)  # of the tiles in a row, and of the blocks of channels
    with Recorder(phantom=list(sizes.items()), only=[last]) as recorder:
        implicit.apply(own, layer.settings, StepScalars(1), factors, given)
        implicit.tile_norms(own, given)
        implicit._project(own, layer.settings, StepScalars(1), given)
    tile = torch.arange(columns // 128 * 128, columns)
    apply, norms, project, collect = recorder.launches
    assert project.programs == 0  # there are not so many tokens
    read = 2 * (torch.arange(tokens)[:, None] * columns + tile).flatten()
    for launch in (apply, norms, collect):
        assert_reaches(launch, X_at, sizes[X_at], read)
    moved = 2 * (torch.arange(rows)[:, None] * columns + tile).flatten()
    assert_reaches(apply, W_at, sizes[W_at], moved, moved)
    assert_reaches(norms, out_at, sizes[out_at], stored=4 * tile)
    R = 4 * (tile[:, None] * rank + torch.arange(rank)).flatten()
    assert_reaches(collect, out_at, sizes[out_at], stored=R)


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
