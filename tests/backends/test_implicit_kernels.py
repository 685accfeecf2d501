"""The kernels of a step from operands: against float64, and against the reference path given G.

On a machine with a GPU the numbers are those of the compiled kernels."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from implicit_cases import (
    MINI,
    by_channel,
    copy_of,
    gradient_of,
    layer_of,
    operands_of,
    projection_of,
    reference_step,
    step,
)
from kernel_cases import DEVICE, drawn, kernels_everywhere
from tiers import tiers, values

pytest.importorskip("triton")

from apollo_triton.kernels import operand_sketch

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.interface import Factors, StepScalars
from apollo_triton.backends.selection import backend_of
from apollo_triton.backends.triton import implicit as fused_operands
from apollo_triton.core import gpu
from apollo_triton.core.geometry import Geometry
from apollo_triton.core.implicit_gradient import ImplicitGradient
from apollo_triton.core.settings import Settings
from apollo_triton.engine.caches import Caches
from apollo_triton.engine.engine import Engine
from apollo_triton.int8.weight import Int8Weight
from apollo_triton.params.member import Part, params_of

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, out, in: no side a multiple of a tile's, tiles that are cut, filled and alone, both orientations.
SHAPES = [(127, 130, 200), (200, 130, 127), (130, 200, 127), (1, 40, 24), (33, 1, 20), (40, 128, 256)]
# For what differs by group alone: two tiles of channels, the second cut, and one of everything else.
SMALL = (40, 130, 72)
GROUPS = {
    "mini": MINI,
    "rank 4": {"rank": 4},
    "rank 16": {"rank": 16, "weight_decay": 0.1},
    "rank 64, one factor": {"rank": 64, "scale_type": "tensor"},
    "rademacher 1": {"rank": 1, "scale_type": "tensor", "distribution": "rademacher"},
    "rademacher 24": {"rank": 24, "distribution": "rademacher", "disable_nl": True},
    "front": {"rank": 3, "scale_front": True, "scale": "auto"},
}
# Every group on the small shape and on the first, the narrowest and one of tensor cores on the second, one group on the
# others.
CASES = [(shape, name) for shape in (SMALL, SHAPES[0]) for name in GROUPS]
CASES += [(SHAPES[1], "mini"), *((shape, "rank 16") for shape in SHAPES[1:])]
FIRST = StepScalars(1)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def fitting(group, shape):
    """The group, with no rank above the width."""
    return group | {"rank": min(group["rank"], *shape)}


def parted(group):
    """Keys of a group, and arguments of the constructor."""
    constructor = {key: group[key] for key in ("scale_front", "disable_nl") if key in group}
    return {key: value for key, value in group.items() if key not in constructor}, constructor


@pytest.fixture
def poisoned(monkeypatch):
    """What the launches allocate is NaN until it is written."""
    empty = torch.empty

    def nans(*arguments, **named):
        values = empty(*arguments, **named)
        return values.fill_(math.nan) if values.is_floating_point() else values

    monkeypatch.setattr(torch, "empty", nans)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name", "dtype"),
    tiers(
        [(*case, dtype) for dtype in DTYPES for case in CASES],
        lambda shape, name, dtype: (
            (dtype == torch.bfloat16 and shape not in (SHAPES[0], SHAPES[1]) and name != "front")
            or (dtype == torch.bfloat16 and (shape, name) in ((SHAPES[0], "rank 16"), (SHAPES[1], "mini")))
            or (name == "rank 16" and shape == SHAPES[5])
        ),
    ),
    ids=str,
)
def test_sketch_and_norms(shape, dtype, name, poisoned):
    """Wrong tiles at the ends, a wrong P, the other operand's projection, sums of parts that are left out."""
    tokens, *sides = shape
    group, constructor = parted(fitting(GROUPS[name], sides))
    layer = layer_of(sides, dtype, constructor=constructor, **group)
    operands = operands_of(tokens, sides, dtype)
    found = fused_operands.sketch(layer.table, layer.settings, FIRST, operands)
    G = by_channel(layer, gradient_of(operands))
    R = G @ projection_of(layer).T
    assert found.projected.shape == R.shape
    # Two bfloat16 parts are 16 bits, cut off in the interpreter. Few numbers scatter.
    assert relative(found.projected, R) <= (5e-5 if dtype == torch.bfloat16 else 2e-6)
    if R.numel() > 100:
        assert relative(found.projected, R) <= relative(G.to(dtype).double() @ projection_of(layer).T, R) * (
            1 / 10 if dtype == torch.bfloat16 else 40  # tensor cores cut three products off: 24 on an H100
        )
    norms = G.square().sum(1)
    torch.testing.assert_close(fused_operands.tile_norms(layer.table, operands).double(), norms, rtol=2e-6, atol=0)
    by_gram = fused_operands.gram_norms(layer.table, operands)
    kept, contracted = (each.double() for each in operands.kept_and_contracted(layer.table.keeps_rows))
    terms = (kept.abs() * ((contracted @ contracted.T).abs() @ kept.abs())).sum(0)  # of which a norm is the sum
    assert ((by_gram - norms).abs() <= 5e-7 * terms).all()
    assert ((found.squared_norms - norms).abs() <= 5e-7 * terms).all()
    estimate = fused_operands.sketch(layer.table, layer.settings, FIRST, operands._replace(limiter_norm="sketch"))
    assert torch.equal(estimate.projected, found.projected)
    torch.testing.assert_close(estimate.squared_norms, found.projected.square().sum(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "side", "dtype"),
    [
        ((24, 1100), "right", torch.bfloat16),
        pytest.param((24, 1100), "right", torch.float32, marks=pytest.mark.full),
        ((1100, 24), "left", torch.bfloat16),
        pytest.param((1100, 24), "left", torch.float32, marks=pytest.mark.full),
    ],
)
def test_long_sums_in_parts(sides, side, dtype, poisoned):
    """Parts of S, K and R, the last of them shorter than the others: left out, or read beyond the end."""
    layer, operands = layer_of(sides, dtype, rank=16, proj_type=side), operands_of(100, sides, dtype)
    assert operand_sketch.parts(1, 1100, 128) == operand_sketch.parts(3, 1100, 128) == (3, 384)
    found = fused_operands.sketch(layer.table, layer.settings, FIRST, operands)
    G = by_channel(layer, gradient_of(operands))
    assert relative(found.projected, G @ projection_of(layer).T) <= (5e-5 if dtype == torch.bfloat16 else 2e-6)
    assert relative(fused_operands.gram_norms(layer.table, operands), G.square().sum(1)) <= 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(("sides", "rank"), values([(72, 40), (40, 72)], [1, 16]))
def test_tokens_that_cancel_cost_no_more_than_rounding_G(sides, rank):
    """S or K rounded to one bfloat16: errors of 2**-9 of the terms, which are 100 times the sum here."""
    layer = layer_of(sides, torch.bfloat16, rank=rank)
    operands = operands_of(150, sides, torch.bfloat16, cancelling=True)
    G = by_channel(layer, gradient_of(operands))
    terms = by_channel(layer, gradient_of(ImplicitGradient(*(each.abs() for each in operands[:2]))))
    assert terms.norm() > 20 * G.norm()
    R = G @ projection_of(layer).T
    found = fused_operands.sketch(layer.table, layer.settings, FIRST, operands)
    assert relative(found.projected, R) <= relative(G.bfloat16().double() @ projection_of(layer).T, R)
    norms = G.square().sum(1)
    assert (fused_operands.tile_norms(layer.table, operands) / norms - 1).abs().max() <= 1e-5
    assert (fused_operands.gram_norms(layer.table, operands) / norms - 1).abs().max() <= 1e-3


# Every group, every mixture of dtypes, and every shape.
FAST_STEPS = {
    *((SMALL, name, "bf16, stochastic") for name in ("rank 4", "rank 64, one factor", "rademacher 24", "front")),
    *((SHAPES[0], "mini", "fp32/bf16, roomy"), (SHAPES[0], "rank 16", "fp32"), (SHAPES[0], "mini", "fp16")),
    *((SHAPES[0], "rank 16", "bf16"), (SHAPES[1], "rank 16", "bf16, stochastic"), (SHAPES[3], "rank 16", "fp32")),
    (SHAPES[4], "rank 16", "bf16, stochastic"),
}


def assert_as_close_as(found, expected, before, share=0.01):
    """Two float32 results that are rounded to the weight's dtype: few entries fall to different sides."""
    found, expected, before = found.detach(), expected.detach(), before.detach()
    assert not torch.equal(found, before)
    if found.dtype == torch.float32:
        moved = (expected - before).double().norm()
        # Of float32 operands; those of 16 bits have an R of 16 bits.
        assert (found - expected).double().norm() <= 2e-4 * moved + 2**-23 * expected.double().norm()
    else:
        differ = found != expected
        assert differ.double().mean() <= share + 2 / differ.numel()
        # An R of 16 bits, of a channel whose terms cancel, has a factor that is a little off.
        moved = (expected.float() - before.float()).abs()
        ulp = torch.finfo(found.dtype).eps * expected.float().abs().clamp(min=1e-3)
        assert ((found.float() - expected.float()).abs() <= 2 * ulp + 5e-3 * moved).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name", "dtypes"),
    tiers(
        [
            *((shape, name, "bf16, stochastic") for shape in (SMALL, SHAPES[0]) for name in GROUPS),
            *((SHAPES[0], name, dtypes) for name in ("mini", "rank 16") for dtypes in ("fp32", "bf16", "fp16")),
            *((SHAPES[0], name, "fp32/bf16, roomy") for name in ("mini", "rank 16")),
            *((shape, "rank 16", dtypes) for shape in SHAPES[1:] for dtypes in ("fp32", "bf16, stochastic")),
        ],
        lambda *case: case in FAST_STEPS,
    ),
    ids=str,
)
def test_steps_are_those_of_the_reference_path(shape, dtypes, name, poisoned, monkeypatch):
    """Factors of the wrong side, the limiter or decay left out, u_prev and random bits of other elements."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "has_large_shared_memory", lambda device: dtypes[-1] in "cy")
    tokens, *sides = shape
    first, second = {"bf16": (torch.bfloat16,) * 2, "fp16": (torch.float16,) * 2}.get(
        dtypes[:4], (torch.float32, torch.bfloat16 if "/" in dtypes else torch.float32)
    )
    group, constructor = parted(fitting(GROUPS[name], sides))
    constructor["stochastic_rounding"] = "stochastic" in dtypes
    mine = layer_of(sides, first, constructor=constructor, **group)
    theirs = copy_of(mine)
    for number in (1, 2):
        before = mine.weight.detach().clone()
        operands = operands_of(tokens, sides, second, seed=number)
        operands = ImplicitGradient(
            operands.inputs, operands.output_gradient * 2**number
        )  # which the limiter cuts down
        step(mine, operands, number)
        reference_step(theirs, gradient_of(operands, torch.float32), number)
        assert_as_close_as(mine.weight, theirs.weight, before)
        with torch.no_grad():
            theirs.weight.copy_(mine.weight)
        for key in ("exp_avg", "exp_avg_sq", "update_norm"):
            torch.testing.assert_close(
                mine.state[key], theirs.state[key], rtol=1e-3, atol=1e-4 * theirs.state[key].abs().max().item()
            )
    assert (mine.state["update_norm"] > 0) == (not constructor.get("disable_nl"))
    assert mine.table.skipped.tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "rounding"),
    tiers(
        [
            (sizes, rounding)
            for rounding in (False, True)
            for sizes in (
                *(((127, 130, 256), 128), ((127, 200, 256), 256), ((64, 130, 96), 32)),
                *(((40, 70, 48), 16), ((40, 256, 96), 8)),
            )
        ],
        lambda sizes, rounding: rounding == (sizes[1] in (128, 32, 8)),
    ),
)
def test_int8_weights(sizes, rounding, poisoned, monkeypatch):
    """Scales of a neighbour, groups that two tiles own, random bits of other elements."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(gpu, "has_large_shared_memory", lambda device: rounding)
    (tokens, *sides), group_size = sizes
    for group in (MINI, {"rank": 4, "weight_decay": 0.1, "proj_type": "left"}):
        layer = layer_of(sides, torch.bfloat16, group_size, {"stochastic_rounding": rounding}, **group)
        theirs = copy_of(layer)
        old = layer.weight.floats(slice(0, sides[0])).clone()
        operands = operands_of(tokens, sides, torch.bfloat16)
        step(layer, operands)
        reference_step(theirs, gradient_of(operands, torch.float32))
        assert not torch.equal(layer.weight.q, theirs.weight.q.new_zeros(sides))
        assert (layer.weight.floats(slice(0, sides[0])) != old).double().mean() > 0.3
        torch.testing.assert_close(layer.weight.scale, theirs.weight.scale, rtol=1e-4, atol=0)
        assert (layer.weight.zero != theirs.weight.zero).double().mean() <= 0.02
        differ = layer.weight.q != theirs.weight.q
        assert differ.double().mean() <= 0.02
        assert (layer.weight.q.int() - theirs.weight.q.int()).abs().max() <= 1


def test_int8_groups_that_do_not_change_keep_their_bits():
    """Rounded anew they would wander. Of rows of which no token has a gradient, and where lr is 0."""
    sides, group_size = (130, 256), 128
    layer = layer_of(sides, torch.bfloat16, group_size, {"stochastic_rounding": True}, **MINI)
    # Scales and zero points that rounding anew would not find.
    layer.weight.scale.mul_(1.3)
    before = layer.weight.detach().clone()
    operands = operands_of(40, sides, torch.bfloat16)
    operands.output_gradient[:, 3:120] = 0
    step(layer, operands)
    still = slice(3 * 2, 120 * 2)
    assert torch.equal(layer.weight.q[3:120], before.q[3:120])
    assert torch.equal(layer.weight.scale[still], before.scale[still])
    assert torch.equal(layer.weight.zero[still], before.zero[still])
    assert (layer.weight.scale[: 3 * 2] != before.scale[: 3 * 2]).all()
    assert (layer.weight.scale[120 * 2 :] != before.scale[120 * 2 :]).all()


def test_int8_weights_whose_groups_cross_tiles_are_the_reference_paths(monkeypatch):
    def chosen(weight):
        settings = Settings.of(APOLLOAdamW([{"params": [torch.nn.Parameter(weight)], "rank": 2}]).param_groups[0])
        return backend_of(weight, settings, {}, is_implicit=True)

    def int8(outputs, inputs, group_size):
        return Int8Weight.of(torch.zeros(outputs, inputs), group_size)

    with kernels_everywhere(monkeypatch):
        for fits in ((4, 256, 128), (4, 256, 256), (4, 11008, 128), (4, 24, 8)):
            assert chosen(int8(*fits)).name == "triton"
        for crosses in ((4, 96, 64), (4, 96, 48), (4, 512, 512), (4, 24, 4)):
            assert chosen(int8(*crosses)).name == "reference"
            assert str(crosses[2]) in chosen(int8(*crosses)).reason
        assert chosen(torch.zeros(3, 5)).name == "triton"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "bad", "limiter_norm"),
    values([MINI, {"rank": 4}, {"rank": 16, "disable_nl": True}], [math.inf, math.nan], ["exact", "sketch"]),
)
def test_operands_that_are_not_finite_move_nothing(group, bad, limiter_norm):
    group, constructor = parted(group)
    for which, tokens, int8 in ((0, 40, 0), (1, 40, 0), (0, 150, 0), (1, 40, 32)):
        layer = layer_of((72, 96), torch.bfloat16, int8, constructor, **group, weight_decay=0.1)
        operands = operands_of(tokens, (72, 96), torch.bfloat16)
        step(layer, operands, 1, limiter_norm)
        before = copy_of(layer)
        operands[which][7, 5] = bad
        step(layer, operands, 2, limiter_norm)
        for mine, theirs in ((layer.weight, before.weight),) if not int8 else ():
            assert torch.equal(mine, theirs)
        if int8:
            assert all(torch.equal(getattr(layer.weight, x), getattr(before.weight, x)) for x in ("q", "scale", "zero"))
        assert torch.equal(layer.state["update_norm"], before.state["update_norm"])
        assert all(layer.state[name].isfinite().all() for name in ("exp_avg", "exp_avg_sq"))
        assert layer.table.skipped.tolist() == [1]


def test_no_tokens_are_a_gradient_of_zero():
    """As of a layer of experts to which no token went: moments shrink and the weight decays."""
    layer = layer_of((40, 24), rank=4, weight_decay=0.1)
    step(layer, operands_of(30, (40, 24)))
    theirs = copy_of(layer)
    step(layer, operands_of(0, (40, 24)), 2)
    reference_step(theirs, torch.zeros(40, 24, device=DEVICE), 2)
    torch.testing.assert_close(layer.weight, theirs.weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(layer.state["exp_avg"], theirs.state["exp_avg"])
    assert torch.equal(layer.state["update_norm"], theirs.state["update_norm"])


@pytest.mark.parametrize("group", [{"rank": 5, "proj": "svd"}, {"rank": 17, "proj": "svd", "proj_type": "left"}])
def test_singular_vectors_in_memory(group):
    layer = layer_of((130, 70), torch.bfloat16, **group)
    operands = operands_of(50, (130, 70), torch.bfloat16)
    P = drawn((group["rank"], layer.member.geometry.width), 3)
    layer.table.set_projections([P])
    found = fused_operands.sketch(layer.table, layer.settings, FIRST, operands)
    assert relative(found.projected, by_channel(layer, gradient_of(operands)) @ P.double().T) <= 5e-5


def test_8bit_and_bfloat16_moments():
    """``rescale`` from this table: its blocks of channels, and the addresses of moments and of their absmax."""
    for options in ({"state_bits": 8, "min_8bit_size": 0}, {"state_dtype": torch.bfloat16}):
        layer = layer_of((300, 70), torch.bfloat16, constructor=options, rank=17)
        theirs = copy_of(layer)
        before = layer.weight.detach().clone()
        operands = operands_of(50, (300, 70), torch.bfloat16)
        step(layer, operands)
        reference_step(theirs, gradient_of(operands, torch.float32))
        assert_as_close_as(layer.weight, theirs.weight, before)
        name = "exp_avg_q" if "state_bits" in options else "exp_avg"
        assert layer.state[name].dtype == theirs.state[name].dtype
        assert (layer.state[name] != theirs.state[name]).double().mean() <= 0.05
        assert layer.state[name].any()


def test_float32_operands_follow_the_precision_that_pytorch_is_told(monkeypatch):
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *_, **constants: launched.append((kernel.__name__, constants)))
    monkeypatch.setattr(torch.version, "hip", None)
    layer, operands = layer_of((64, 48), rank=16), operands_of(40, (64, 48))
    before = torch.get_float32_matmul_precision()
    try:
        for name, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(name)
            step(layer, operands)
            fused_operands.tile_norms(layer.table, operands)
            found = {kernel: constants["PRECISION"] for kernel, constants in launched if "PRECISION" in constants}
            assert set(found.values()) == {expected}
            assert found.keys() >= {"collect_kernel", "tile_norms_kernel", "apply_operands_kernel"}
            launched.clear()
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cheaper_way_to_the_norms_is_taken(monkeypatch):
    """By multiplications, of which the Gram matrix may have a quarter: at 4096 x 4096 up to 292 tokens."""
    assert operand_sketch.gram_is_cheaper(292, 4096, 4096, in_parts=True)
    assert not operand_sketch.gram_is_cheaper(293, 4096, 4096, in_parts=True)
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *_, **constants: launched.append(kernel.__name__))
    for tokens, dtype, expected in (
        (4, torch.bfloat16, ["gram_kernel", "gram_norms_kernel"]),
        (200, torch.bfloat16, ["tile_norms_kernel"]),
        (4, torch.float16, ["tile_norms_kernel"]),
        (0, torch.float32, ["tile_norms_kernel"]),
    ):
        layer = layer_of((96, 64), dtype, **MINI)
        fused_operands.squared_norms(layer.table, operands_of(tokens, (96, 64), dtype))
        assert launched == expected
        launched.clear()


@pytest.mark.parametrize("length", [0, 1, 127, 128, 500, 4096, 11008])
@pytest.mark.parametrize("programs", [0, 1, 30, 300])
def test_parts_cover_a_sum_once(length, programs):
    count, part = operand_sketch.parts(programs, length, 128)
    assert 1 <= count <= 8
    assert part % 128 == 0
    assert count == 1 or (count - 1) * part < length <= count * part
    assert count == 1 or part >= 512 - 128
    assert part >= length or count > 1


@pytest.mark.slow
def test_layers_share_a_projection_and_write_their_own_epoch():
    """Layer-wise updates run an engine for each weight: one P a width, and never the P of another epoch."""
    caches = Caches()
    shape, operands = (96, 64), operands_of(20, (96, 64))
    groups = [{"rank": 16}, {"rank": 16, "distribution": "rademacher"}, {"rank": 16}, {"rank": 16, "seed": 3}]
    weights = [torch.nn.Parameter(drawn(shape, seed)) for seed in range(len(groups))]
    optimizer = APOLLOAdamW([{"params": [w], **g} for w, g in zip(weights, groups, strict=True)], backend="triton")
    engines = [Engine(caches) for _ in groups]
    params = [*params_of(optimizer.param_groups)]

    def run(index):
        part = Part(optimizer.param_groups, [params[index]])
        engines[index].run(part, optimizer.state, given={weights[index]: operands})
        (table,) = engines[index]._plan.tables
        return table.projections[0]

    first, *others = [run(index) for index in range(len(groups))]
    assert [other is first for other in others] == [False, True, False]
    assert len(caches.projection_buffers) == 3
    optimizer.param_groups[2]["update_proj_gap"] = 1
    assert run(2).epoch == 1  # a buffer of its own, or the other weight would read this epoch
    assert run(0) is first
    assert first.epoch == 0


def test_norms_by_the_gram_matrix_do_not_end_below_zero():
    """Tokens that cancel: the square root of what rounding leaves would be NaN, and the update skipped."""
    layer = layer_of((128, 128), **MINI)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(1, 128, generator=generator) + 1e-5 * torch.randn(3, 128, generator=generator)
        dY = torch.randn(3, 128, generator=generator)
        dY[2] = -(dY[0] + dY[1])
        norms = fused_operands.gram_norms(layer.table, ImplicitGradient(X.to(DEVICE), dY.to(DEVICE)))
        assert torch.all(norms >= 0)
    dY[0, 0] = float("nan")
    assert fused_operands.gram_norms(layer.table, ImplicitGradient(X.to(DEVICE), dY.to(DEVICE))).isnan().any()


def test_what_the_compiler_is_told_of_alignment_is_true(monkeypatch):
    """A GPU faults at a 16-byte access elsewhere. The interpreter does not see it, and bytes one by one are slow."""
    told = {}
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: told.update(constants))
    for shape in ((24, 16), (20, 16), (24, 20)):
        layer, operands = layer_of(shape, torch.bfloat16, rank=1), operands_of(3, shape, torch.bfloat16)
        fused_operands.apply(layer.table, layer.settings, FIRST, Factors(None, torch.zeros(1, 3)), operands)
        assert (told["ROWS_BY_EIGHTS"], told["ALIGNED"]) == (shape[0] % 8 == 0, shape[1] % 8 == 0)
    # The last 8 of 17 columns, of which 9 are on another rank: their bits for rounding begin at 27.
    layer, operands = layer_of((3, 8), torch.bfloat16, rank=1), operands_of(3, (3, 8), torch.bfloat16)
    (member,), whole = layer.table.members, Geometry(1, 3, 17, keeps_rows=False)
    for first, by_eights in ((0, True), (9, False)):
        shard = dataclasses.replace(member.shard, whole=whole, first_channel=first)
        monkeypatch.setattr(layer.table, "members", [member._replace(shard=shard)])
        fused_operands.apply(layer.table, layer.settings, FIRST, Factors(None, torch.zeros(1, 3)), operands)
        assert told["ALIGNED"] == by_eights
    buffer = torch.zeros(32, 36, dtype=torch.bfloat16, device=DEVICE)
    of_32 = buffer.view(36, 32)
    weights = {of_32[:, 8:24]: True, of_32[:, 1:17]: False, of_32[:16].T: False, buffer[:, :16]: False}
    assert [fused_operands._is_aligned(weight) for weight in weights] == [*weights.values()]


@pytest.mark.parametrize(
    "place",
    [lambda W: W.T.contiguous().T, lambda W: torch.cat((W[:, :1], W), 1)[:, 1:]],
    ids=["transposed", "rows begin anywhere"],
)
def test_weights_with_strides_get_the_same_bits(place):
    shape, results = (40, 24), []
    for lay_out in (torch.clone, place):
        weight = torch.nn.Parameter(lay_out(drawn(shape, 1, torch.bfloat16)))
        options = {"backend": "triton", "stochastic_rounding": True}
        optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}], lr=1e-2, **options)
        Engine(Caches()).run(optimizer.param_groups, optimizer.state, given={weight: operands_of(5, shape)})
        results.append(weight.detach())
    assert results[1].stride() != results[0].stride()
    assert torch.equal(*results)
