"""Matrices of more than 2**31 elements: the last programs reach the last elements, and no others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from implicit_cases import layer_of
from kernel_cases import (
    MINI,
    drawn,
    optimizer_of,
    parameters_of,
)

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from apollo_triton.kernels import table as fields
from sanitizer import Recorder

from apollo_triton.backends.interface import Factors, StepScalars
from apollo_triton.backends.triton import implicit
from apollo_triton.backends.triton import matrices as tables
from apollo_triton.backends.triton import verbs as fused
from apollo_triton.core.implicit_gradient import ImplicitGradient
from apollo_triton.core.settings import Settings

# --- offsets beyond 2**31


def assert_reaches(launch, at, size, loaded=None, stored=None):
    """The bytes from ``at`` on that a launch loads and stores are these, counted from there, and no others."""
    assert not launch.strays
    for found, expected in zip(launch.addresses(at, size), (loaded, stored), strict=True):
        assert expected is None or torch.equal(torch.from_numpy(found), expected)


@pytest.mark.slow
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
    table.tile_blocks = tables.apply.blocks(columns, in_16_bits=False)
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
    own.addresses[0, fields.WEIGHT.value], own.addresses[0, fields.WEIGHT_ROW_STRIDE.value] = W_at, columns
    own.channel_blocks["BLOCK_CHANNELS"] = 1 << 30  # one partial sum to add up, not half a million
    shard = layer.table.members[0].shard
    own.members = [SimpleNamespace(weight=Phantom(W_at, torch.bfloat16, rows, columns), shard=shard)]
    own.previous.fill_(1)
    given = ImplicitGradient(Phantom(X_at, torch.bfloat16, tokens, columns), drawn((tokens, rows), 1, torch.bfloat16))
    sizes = {X_at: 2 * tokens * columns, W_at: 2 * rows * columns, out_at: 4 * columns * rank}
    scratch = own.scratch
    own.scratch = lambda *shape: Phantom(out_at, torch.float32, *shape) if columns in shape else scratch(*shape)
    monkeypatch.setattr(implicit, "_sum", lambda values, parts: values)
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
