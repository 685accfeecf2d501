"""The kernels as launches, a row of a table for each kind of step: no race, no stray access, and the same bits whatever
the order of programs, the tile or the batch.
"""

from __future__ import annotations

from contextlib import nullcontext
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
    optimizer_of,
    parameters_of,
    parts_of,
    state_tensors,
    train,
)
from tiers import tiers
from torch import nn

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Recorder

from apollo_triton.backends.triton import implicit
from apollo_triton.backends.triton import matrices as tables
from apollo_triton.backends.triton.arguments import sketch_constants
from apollo_triton.backends.triton.projections import MATERIALISED
from apollo_triton.core import gpu
from apollo_triton.core.projection import TENSOR_CORE_RANK
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


def state_tensors_of(state):
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


BLOCKWISE = [(301, 21), (21, 270)]  # blocks of 256 numbers, cut where programs are
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
    "8-bit moments, a tensor": by_gradient(BLOCKWISE[:1], dtype=torch.float32, rank=17, scale_type="tensor", **EIGHT),
    "8-bit moments, rank 18": by_gradient(BLOCKWISE[1:], dtype=torch.float32, rank=18, **EIGHT),
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
    *("8-bit moments, a tensor", "8-bit moments, rank 24"),
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


# --- what does not show in the bits


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers([*VARIANTS, "8-bit moments"], ("mini", "rank 20", "8-bit moments").__contains__))
def test_scratch_is_written_before_it_is_read(name, monkeypatch):
    """A part of a sum, a channel's factor or R that a program leaves out."""
    group = {**VARIANTS, "8-bit moments": {"rank": 20, **EIGHT}}[name]
    shapes = [(70, 24)] if name == "8-bit moments" else fitting(group)[:2]
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
    monkeypatch.setattr(tables.apply, "blocks", lambda columns, in_16_bits: tiles)
    ours, optimizer = train(weights, **options)
    assert optimizer._engine._plan.tables[0].tile_blocks == tiles
    assert_same_bits(expected, ours)


RIGHT = {"rank": 130, "proj_type": "right"}
SKETCHES = {
    "fused": ([(70, 136), (3, 136)], RIGHT),
    "columns kept": ([(136, 72), (136, 8)], {"rank": 130, "proj_type": "left"}),
    "two launches": ([(3, 264), (70, 264)], {"rank": 260, "proj_type": "right"}),
    "8-bit moments": ([(70, 136)], {**RIGHT, "constructor": {"state_bits": 8, "min_8bit_size": 257}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers(SKETCHES, ("fused",).__contains__))
@pytest.mark.parametrize("dtype", tiers((torch.bfloat16, torch.float16), lambda dtype: dtype == torch.bfloat16))
def test_two_blocks_of_channels_that_share_P_leave_the_bits_of_one(name, dtype):
    """A block's sums under another's number, a block that is left out or done twice, where their number is odd or 1."""
    shapes, group = SKETCHES[name]
    expected, other = train(parameters_of(shapes, dtype), steps=1, **group)
    with (
        Recorder(shuffle=1) as recorder,
        mock.patch.object(gpu, "capability", return_value=(9, 0)),
        mock.patch.object(gpu, "has_large_shared_memory", return_value=True),
    ):
        ours, optimizer = train(parameters_of(shapes, dtype), steps=1, **group)
        (table,) = optimizer._engine._plan.tables
        assert sketch_constants(table, MATERIALISED)["HALVES"]
    recorder.assert_clean()
    assert_same_bits(expected, ours, (other, optimizer))


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
    "8-bit moments": ([(301, 18), (40, 30), (2, 70, 18)], {"rank": 18, **EIGHT}),
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
