"""The kernels as launches: exact bytes, no race, no stray access, the same bits whatever the order, tile or batch."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_same_bits, drawn, new_gradients, optimizer_of, parameters_of, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from apollo_triton.kernels import table as fields
from sanitizer import Recorder

from apollo_triton.backends.interface import Factors, StepScalars
from apollo_triton.backends.triton import matrices as tables
from apollo_triton.backends.triton import verbs as fused
from apollo_triton.core import gpu
from apollo_triton.core.projection import TENSOR_CORE_RANK
from apollo_triton.core.settings import Settings

MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
SIDES = [(512, 384), (384, 512)]
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


def second_step(parameters, dense=(), recorder=None, **options):
    """The launches of a step that is not the first, when no state is made and no projection written."""
    optimizer = optimizer_of(parameters, dense, **options)
    optimizer.step()
    with recorder or Recorder() as recorder:
        optimizer.step()
    recorder.assert_clean()
    return recorder.launches, optimizer


@pytest.mark.parametrize("shape", SIDES)
def test_rank_one_moves_eight_bytes_a_parameter(shape):
    (weight,) = parameters_of([shape], torch.bfloat16)
    launches, _ = second_step([weight], **MINI)
    traffic = [launch.traffic(tensor) for launch in launches for tensor in (weight, weight.grad)]
    moved = sum(each.loaded + each.stored for each in traffic)
    assert moved == 8 * weight.numel()
    # All else: addresses, 64 channels' sums, and a few numbers a program of 8192 elements.
    assert sum(launch.loaded + launch.stored for launch in launches) <= 8.2 * weight.numel()


@pytest.mark.parametrize("shape", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rank_64_moves_the_moments_besides_and_nothing_else(shape, dtype):
    (weight,) = parameters_of([shape], dtype)
    launches, optimizer = second_step([weight], rank=64)
    state = optimizer.state[weight]
    itemsize = weight.element_size()
    for tensor, expected in (
        (weight, 2 * itemsize * weight.numel()),
        (weight.grad, 2 * itemsize * weight.numel()),
        (state["exp_avg"], 8 * state["exp_avg"].numel()),
        (state["exp_avg_sq"], 8 * state["exp_avg_sq"].numel()),
    ):
        traffic = [launch.traffic(tensor) for launch in launches]
        assert sum(each.loaded + each.stored for each in traffic) == expected
    rest = sum(launch.loaded_once + launch.stored_once for launch in launches)
    rest -= 4 * itemsize * weight.numel() + 16 * state["exp_avg"].numel()
    projection = 2 * 64 * min(shape)
    assert rest <= projection + 0.05 * weight.numel()  # one factor a channel, written and read, and the table


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


LLAMA_7B = [(64, 64)] * 128 + [(172, 64)] * 64 + [(64, 172)] * 32


@pytest.mark.parametrize(
    ("shapes", "norms", "group", "most"),
    [
        (LLAMA_7B, 66, MINI, 6),
        (LLAMA_7B, 66, {"rank": 32, "update_proj_gap": 1}, 7),  # a refresh in the step
        ([(64, 48)] * 9, 0, MINI, 2),
        ([(64, 48), (48, 64), (80, 16), (16, 16), (200, 30), (30, 200)], 0, MINI, 6),  # 30 columns are not aligned
        ([(64, 48), (48, 64), (80, 16), (16, 16), (200, 32), (32, 200)], 0, MINI, 4),
    ],
)
def test_launches_do_not_grow_with_layers(shapes, norms, group, most, monkeypatch):
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    weights, dense = parameters_of(shapes, torch.bfloat16), parameters_of([(64,)] * norms, torch.bfloat16)
    optimizer = optimizer_of(weights, dense, **group)
    optimizer.step()
    launched.clear()
    optimizer.step()
    assert len(launched) == most


# Several programs along the channels (64), turns along the width (64 or 128), ragged ends, aligned and unaligned rows.
SHAPES = [(70, 40), (40, 70), (64, 48), (2, 67, 20), (1, 40), (40, 1), (1, 1)]


def fitting(group, shapes=SHAPES):
    """The shapes that a rank suits."""
    if group["rank"] > 100:
        return [(20, 304), (2, 304, 8)]
    if group == VARIANTS["rank 3"]:
        shapes = [*shapes, (140, 132)]
    return [shape for shape in shapes if min(shape[-2:]) >= group["rank"]]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_race_no_stray_access_and_any_order_gives_the_same_bits(name, dtype):
    group = VARIANTS[name]
    shapes = fitting(group)
    weights, dense = parameters_of(shapes, dtype), parameters_of([(4104,), (7,), (3, 5)], dtype)
    runs = []
    for shuffle in (None, 1, 2):
        with Recorder(shuffle=shuffle) as recorder:
            runs.append(train(weights, dense, steps=2, **group))
        recorder.assert_clean()
    for parameters, optimizer in runs[1:]:
        assert_same_bits(runs[0][0], parameters, (runs[0][1], optimizer))


@pytest.mark.parametrize("name", VARIANTS)
def test_scratch_is_written_before_it_is_read(name, monkeypatch):
    group = VARIANTS[name]
    weights, dense = parameters_of(fitting(group)), parameters_of([(4104,), (7,)])
    expected, optimizer = train(weights, dense, steps=2, **group)
    empty = torch.empty

    def poisoned(*arguments, **options):
        result = empty(*arguments, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)
    ours, poisoned_optimizer = train(weights, dense, steps=2, **group)
    assert_same_bits(expected, ours, (optimizer, poisoned_optimizer))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("offset", [0, 16, 3])
def test_nothing_outside_of_a_buffer_is_touched(name, offset):
    """Weights, gradients and moments between sentinels, at aligned and at odd addresses."""
    group = VARIANTS[name]
    buffers = []

    def guarded(tensor):
        whole = torch.full((tensor.numel() + offset + 64,), 77.0, dtype=tensor.dtype)
        inner = whole[offset : offset + tensor.numel()].view(tensor.shape)
        buffers.append((whole, tensor.numel()))
        return inner.copy_(tensor)

    weights = [nn.Parameter(guarded(each.detach())) for each in parameters_of(fitting(group))]
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


@pytest.mark.parametrize("group", [{"rank": 4}, MINI, {"rank": 20, "weight_decay": 0.1}])
def test_tiles_of_elementwise_work_do_not_show(group, monkeypatch):
    weights = parameters_of([(130, 70), (70, 130), (64, 48)], torch.bfloat16)
    options = {**group, "constructor": {"stochastic_rounding": True}}
    expected, _ = train(weights, **options)
    tiles = {"BLOCK_ROWS": 8, "BLOCK_COLUMNS": 32, "num_warps": 4}
    monkeypatch.setattr(tables.apply, "blocks", lambda columns: tiles)
    ours, optimizer = train(weights, **options)
    assert optimizer._engine._plan.tables[0].tile_blocks == tiles
    assert_same_bits(expected, ours)


@pytest.mark.parametrize("rank", [4, 20])
def test_the_block_of_channels_does_not_show_in_work_that_is_a_channels_own(rank, monkeypatch):
    """Without the limiter, whose sum over channels is grouped by programs."""
    weights = parameters_of([(130, 70), (70, 130)])
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


@pytest.mark.parametrize("name", VARIANTS)
def test_a_parameter_alone_in_a_batch_and_in_any_order_gets_the_same_bits(name):
    group = {key: value for key, value in VARIANTS[name].items() if name != "clipped" or key != "constructor"}
    weights = parameters_of(fitting(group), torch.bfloat16)
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


@pytest.mark.parametrize("keeps_rows", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
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
    assert not recorder.launches[0].strays
    loaded, stored = recorder.launches[0].addresses(weight_at, size)
    assert torch.equal(torch.from_numpy(loaded), tile)
    assert torch.equal(torch.from_numpy(stored), tile)
    assert torch.equal(torch.from_numpy(recorder.launches[0].addresses(gradient_at, size)[0]), tile)

    table.channel_blocks["BLOCK_CHANNELS"] = block
    with Recorder(phantom=phantom, only=[(len(table.channel_programs) - 1, 0, 0)]) as recorder:
        fused.sketch_and_rescale(table, settings, scalars)
    assert not recorder.launches[0].strays
    loaded = torch.from_numpy(recorder.launches[0].addresses(gradient_at, size)[0])
    first = (channels - 1) // block * block
    assert loaded.numel() == (channels - first) * 72
    assert loaded[-1] == size - nbytes
    assert loaded[0] == (first * columns if keeps_rows else first) * nbytes
    moments = torch.from_numpy(recorder.launches[0].addresses(moments_at, 8 * channels)[1])
    expected = torch.arange(first, channels)
    assert torch.equal(moments, 4 * torch.cat((expected, channels + expected)))


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


def test_the_table_of_the_documentation_is_what_the_recorder_counts():
    from bench import kernel_table, report_text

    page = kernel_table.PAGE.read_text(encoding="utf-8")
    assert kernel_table.written(page) == report_text.launches(kernel_table.measured())
