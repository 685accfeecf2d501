"""Blocks of sharded 8-bit moments: where shards are whole blocks, and what goes by an element's place in the whole
weight."""

from __future__ import annotations

import warnings

import pytest
import torch
from distributed_cases import Weights, assert_same_bits, needs_fsdp_on_a_cpu
from distributed_harness import run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.core.moments_8bit import BLOCK
from apollo_triton.params.blocks import _cut_between_blocks

# Absmaxes have one dimension: no row fills a block. The second dimension is cut by an axis of one rank.
FLAT = {"flat": ((384, 12), {"weight_decay": 0.1}, "01"), "stacked": ((128, 4, 30), {}, "02")}
ROUNDED = {"state_bits": 8, "min_8bit_size": 1, "stochastic_rounding": True}


def steps_in_bfloat16(mesh_shape):
    """Two steps, between which the state is saved and loaded."""
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None
    cases = {name: (shape, group, cut if mesh else "plain") for name, (shape, group, cut) in FLAT.items()}
    model = Weights(cases, mesh, **ROUNDED).bfloat16().train_for(1)
    model.optimizer.load_state_dict(model.optimizer.state_dict())
    return model.train_for(1).everything()


@pytest.mark.slow
def test_dense_weights_are_rounded_as_a_single_process_rounds_them(bitsandbytes):
    """Random bits that begin anew with each shard; a cut by an axis of one rank, for which absmaxes have no
    dimension."""
    expected = steps_in_bfloat16(())
    assert expected["flat.exp_avg_absmax"].shape == (18,)
    assert expected["flat"].dtype == torch.bfloat16
    for result in run(steps_in_bfloat16, 2, mesh_shape=(2, 1)):
        assert_same_bits(result, expected, "2 ranks")


def told_layer_by_layer():
    """What is said of two modules, of which each makes a step of its own."""
    model = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Linear(40, 40))
    for module in (*model, model):
        fully_shard(module)
    optimizer = APOLLOAdamW(
        model.named_parameters(), rank=16, target_modules="all-linear", state_bits=8, min_8bit_size=1
    )
    attach_layerwise(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(3, 20)).sum().backward()
    return [str(each.message) for each in caught if "state_bits" in str(each.message)]


@pytest.mark.slow
@needs_fsdp_on_a_cpu
def test_layer_wise_updates_name_all_that_stays_in_floats():
    """Only the module whose gradient comes first is named, or each by itself."""
    for told in run(told_layer_by_layer, 2):
        assert len(told) == 1, told
        assert "the moments of 0.weight, 1.weight stay in state_dtype" in told[0]


@settings(max_examples=60, deadline=None)
@example(length=37, elements=64, pieces=[5, 2])  # the last of five pieces is cut within a block
@given(
    length=st.integers(1, 70), elements=st.sampled_from([1, 4, 12, 16, 24, 64, 100, 128, 256, 384, 512, 768]),
    pieces=st.lists(st.integers(1, 5), max_size=3),
)  # fmt: skip
def test_shards_are_whole_blocks_where_every_piece_is(length, elements, pieces):
    """Against all pieces of all ranks, element by element: a rule that looks at one rank, at even pieces, or not at the
    pieces into which absmaxes are cut."""
    blocks = -(-length * elements // BLOCK)

    def cut(values):
        parts = [values]
        for count in pieces:
            parts = [chunk for part in parts for chunk in padded(part, count)]
        return parts

    def padded(part, count):
        chunks = list(part.chunk(count)) if len(part) else []
        return chunks + [part[:0]] * (count - len(chunks))

    of_elements = [
        [int(index) * elements + offset for index in part for offset in range(elements)]
        for part in cut(torch.arange(length))
    ]
    of_blocks = [part.tolist() for part in cut(torch.arange(blocks))]
    expected = all(
        sorted({at // BLOCK for at in held}) == absmaxes for held, absmaxes in zip(of_elements, of_blocks, strict=True)
    ) and sum(map(len, of_blocks)) == sum(len({at // BLOCK for at in held}) for held in of_elements)
    assert _cut_between_blocks(length, blocks, elements, pieces) == expected
