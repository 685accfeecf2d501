"""A step from operands as launches: exact bytes, no race, no stray access, the same bits whatever the order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import drawn
from implicit_cases import MINI, layer_of, operands_of, step

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from apollo_triton.kernels import table
from sanitizer import Recorder

from apollo_triton.backends.interface import Factors, StepScalars
from apollo_triton.backends.triton import implicit as fused_operands
from apollo_triton.core import gpu
from apollo_triton.core.implicit_gradient import ImplicitGradient

FIRST = StepScalars(1)
ODD = [(127, 130, 200), (130, 200, 127), (1, 40, 24), (33, 5, 20)]  # tokens, out, in
LAUNCHES = {  # of a step that is not the first
    "exact": ["project_kernel", "collect_kernel", "tile_norms_kernel", "rescale_kernel", "apply_operands_kernel"],
    "gram": [
        *("project_kernel", "collect_kernel", "gram_kernel", "gram_norms_kernel"),
        *("rescale_kernel", "apply_operands_kernel"),
    ],
    "sketch": ["project_kernel", "collect_kernel", "rescale_kernel", "apply_operands_kernel"],
}


@pytest.mark.parametrize("sides", [(384, 256), (256, 384)], ids=str)
@pytest.mark.parametrize(("how", "tokens"), [("exact", 300), ("gram", 16), ("sketch", 40)])
def test_a_step_reads_and_writes_the_weight_once(sides, how, tokens):
    """4 bytes a parameter in bfloat16, and the operands once a tile of the other side; whatever the order of programs
    the same bits, no race, nothing beyond the ends."""
    ends = []
    for order in (None, 1, 2):
        layer = layer_of(sides, torch.bfloat16, constructor={"stochastic_rounding": True}, rank=16)
        step(layer, operands_of(tokens, sides, torch.bfloat16))
        operands = operands_of(tokens, sides, torch.bfloat16, seed=1)
        with Recorder(shuffle=order) as recorder:
            step(layer, operands, 2, "sketch" if how == "sketch" else "exact")
        recorder.assert_clean()
        assert [launch.kernel for launch in recorder.launches] == LAUNCHES[how]
        ends.append([layer.weight.detach(), *(layer.state[name] for name in ("exp_avg", "exp_avg_sq", "update_norm"))])
        traffic = [launch.traffic(layer.weight) for launch in recorder.launches]
        count = layer.weight.numel()
        for name in ("loaded", "stored", "loaded_once", "stored_once"):
            assert sum(getattr(each, name) for each in traffic) == 2 * count
        apply = recorder.launches[-1]
        tiles = [side // 128 for side in sides]
        for operand, times in zip(operands, tiles, strict=True):
            assert apply.traffic(operand).loaded == 2 * operand.numel() * times
    for other in ends[1:]:
        assert all(torch.equal(*pair) for pair in zip(ends[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ODD, ids=str)
@pytest.mark.parametrize("int8", [0, 8])
def test_odd_shapes_are_clean_and_the_same_in_any_order(shape, dtype, int8, monkeypatch):
    monkeypatch.setattr(gpu, "has_large_shared_memory", lambda device: dtype == torch.bfloat16)
    tokens, *sides = shape
    if int8 and sides[1] % int8:
        sides[1] = 200
    ends = []
    for order in (None, 3):
        layer = layer_of(sides, dtype, int8, rank=4)
        operands = operands_of(tokens, sides, dtype)
        with Recorder(shuffle=order) as recorder:
            step(layer, operands)
            fused_operands.gram_norms(layer.table, operands)
            fused_operands.tile_norms(layer.table, operands)
        recorder.assert_clean()
        weight = layer.weight
        ends.append([weight.q, weight.scale, weight.zero] if int8 else [weight.detach()])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def test_int8_weights_are_read_and_written_once():
    layer = layer_of((256, 256), torch.bfloat16, 128, {"stochastic_rounding": True}, **MINI)
    operands = operands_of(64, (256, 256), torch.bfloat16)
    with Recorder() as recorder:
        step(layer, operands)
    recorder.assert_clean()
    weight, apply = layer.weight, recorder.launches[-1]
    assert apply.kernel == "apply_int8_operands_kernel"
    for part in (weight.q, weight.scale, weight.zero):
        traffic = apply.traffic(part)
        assert (traffic.loaded, traffic.stored) == (part.nbytes, part.nbytes)


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


def test_more_than_two_to_the_31_elements(monkeypatch):
    """72 tokens of 30 million features, and 80 rows of W, that do not exist: the last programs reach just the last."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda executor, *arguments: arguments)
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)
    tokens, rows, columns, rank = 72, 80, 30_000_008, 80
    X_at, W_at, out_at = 1 << 44, 1 << 45, 1 << 46
    layer = layer_of((128, 96), torch.bfloat16, proj_type="left", rank=rank, scale_type="tensor")
    own = layer.table
    own.channels = columns
    own.addresses[0, table.ROWS.value], own.addresses[0, table.COLUMNS.value] = rows, columns
    own.channel_blocks["BLOCK_CHANNELS"] = 1 << 30  # one partial sum to add up, not half a million
    own.members = [SimpleNamespace(weight=Phantom(W_at, torch.bfloat16, rows, columns))]
    own.previous.fill_(1)
    operands = ImplicitGradient(
        Phantom(X_at, torch.bfloat16, tokens, columns), drawn((tokens, rows), 1, torch.bfloat16)
    )
    sizes = {X_at: 2 * tokens * columns, W_at: 2 * rows * columns, out_at: 4 * columns * rank}
    scratch = fused_operands._scratch
    monkeypatch.setattr(
        fused_operands,
        "_scratch",
        lambda where, *shape: Phantom(out_at, torch.float32, *shape) if columns in shape else scratch(where, *shape),
    )
    monkeypatch.setattr(fused_operands, "_sum", lambda parts: parts)
    factors = Factors(None, torch.ones(1, 3))
    last = (-(-columns // 128) - 1, 0, 0)  # of the tiles in a row, and of the blocks of channels
    with Recorder(phantom=list(sizes.items()), only=[last]) as recorder:
        fused_operands.apply(own, layer.settings, FIRST, factors, operands)
        fused_operands.tile_norms(own, operands)
        fused_operands._project(own, layer.settings, FIRST, operands)
    tile = torch.arange(columns // 128 * 128, columns)
    apply, norms, project, collect = recorder.launches
    assert project.programs == 0  # there are not so many tokens
    for launch in (apply, norms, collect):
        assert not launch.strays
        loaded = torch.from_numpy(launch.addresses(X_at, sizes[X_at])[0])
        assert torch.equal(loaded, 2 * (torch.arange(tokens)[:, None] * columns + tile).flatten())
    expected = 2 * (torch.arange(rows)[:, None] * columns + tile).flatten()
    assert all(torch.equal(torch.from_numpy(each), expected) for each in apply.addresses(W_at, sizes[W_at]))
    assert torch.equal(torch.from_numpy(norms.addresses(out_at, sizes[out_at])[1]), 4 * tile)
    R = 4 * (tile[:, None] * rank + torch.arange(rank)).flatten()
    assert torch.equal(torch.from_numpy(collect.addresses(out_at, sizes[out_at])[1]), R)


def test_a_step_allocates_no_tensor_of_the_weights_size(monkeypatch):
    """The kernels only compute; what a step allocates is made by torch: R, S, K and shares of norms."""
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    largest = 0
    empty = torch.empty

    def counted(*arguments, **named):
        nonlocal largest
        result = empty(*arguments, **named)
        largest = max(largest, result.nbytes)
        return result

    monkeypatch.setattr(torch, "empty", counted)
    for tokens in (64, 1024):
        layer = layer_of((1024, 512), torch.bfloat16, **MINI)
        operands = operands_of(tokens, (1024, 512), torch.bfloat16)
        largest = 0
        step(layer, operands)
        assert 0 < largest <= 8 * 4 * 1024 * max(4, tokens // 128)
        assert largest < layer.weight.nbytes / 8
