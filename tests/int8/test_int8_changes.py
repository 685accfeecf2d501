"""Int8 weights that are changed from outside: assigned, copied into, moved, cast, unpickled, or given parts by hand."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from int8_models import drawn, int8
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.int8.weight import Int8Weight

PARTS = ("q", "scale", "zero")


def weight(seed=0):
    return int8(seed)["mlp"].weight


def parts(held):
    return [getattr(held, part).clone() for part in PARTS]


def equal(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_assigning_data_changes_the_parts():
    """PyTorch's own changed what the weight showed, and the layer went on with the old values."""
    held, values = weight(), drawn((40, 24), "values")
    held.data = values
    assert equal(parts(held), parts(Int8Weight.of(values, 8)))
    other = weight(1)
    held.data = other.data
    assert held.q.data_ptr() == other.q.data_ptr()
    held.data = held.data.bfloat16()
    assert (held.dtype, held.detach().dtype, held.scale.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert equal(parts(held), parts(other))
    assert isinstance(held, nn.Parameter)
    held = weight()
    before = parts(held)
    for value in (torch.zeros(3), values * float("nan"), values.to(torch.complex64)):
        with pytest.raises(ValueError, match="an int8 weight"):
            held.data = value
    assert equal(parts(held), before)
    torch.nn.utils.vector_to_parameters(values.flatten(), [held])
    assert equal(parts(held), parts(Int8Weight.of(values, 8)))


def test_copying_takes_what_can_be_held_and_nothing_else():
    held = weight()
    before = parts(held)
    for value, error in (
        (torch.full((40, 24), float("inf")), ValueError),
        (torch.full((40, 24), 1e300, dtype=torch.float64), ValueError),
        (torch.zeros(40, 24, dtype=torch.complex64), ValueError),
        (torch.zeros(39), RuntimeError),
        (Int8Weight.of(torch.ones(3, 24), 8), RuntimeError),
    ):
        with torch.no_grad(), pytest.raises(error):
            held.copy_(value)
    assert equal(parts(held), before)
    row = drawn((24,), "row")
    with torch.no_grad():
        held.copy_(row)
        assert equal(parts(held), parts(Int8Weight.of(row.expand(40, 24), 8)))
        coarse = Int8Weight.of(drawn((40, 24), "values").bfloat16(), 60)  # groups across rows, and no common blocks
        held.copy_(coarse)
    # From its float32 values, not by way of its bfloat16.
    assert equal(parts(held), parts(Int8Weight.of(coarse.float().dequantize(), 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_that_of_activations_alone(dtype):
    model = int8()
    before = parts(model["mlp"].weight)
    model.to(dtype)
    assert model["mlp"](torch.ones(2, 24, dtype=dtype)).dtype == dtype
    assert equal(parts(model["mlp"].weight), before)
    assert [getattr(model["mlp"].weight, part).dtype for part in PARTS] == [torch.uint8, torch.float32, torch.uint8]
    for other in (torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(NotImplementedError, match="cannot be"):
            model["mlp"].weight.to(other)


def unpickled(held, **options):
    buffer = io.BytesIO()
    torch.save(held, buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([Int8Weight]):
        return torch.load(buffer, **options)


def test_a_pickle_is_checked_where_it_is_read():
    """Its fields bypass the constructor, and kernels read as many scales as group_size says."""
    held = weight()
    held.tag = "mine"
    for other in (unpickled(held, weights_only=True), unpickled(held, weights_only=False), copy.copy(held)):
        assert equal(parts(other), parts(held))
        assert other.tag == "mine"
    for field, value in (
        ("scale", held.scale[:3]),
        ("scale", held.scale.bfloat16()),
        ("scale", held.scale * float("nan")),
        ("scale", -held.scale),
        ("scale", held.scale.to_sparse()),
        ("zero", held.zero.int()),
        ("q", held.q[:, :3]),
        ("q", held.q.T.contiguous().T),
        ("q", None),
        ("group_size", 7),
        ("group_size", 0),
        ("group_size", "8"),
        ("group_size", 4),
        ("group_size", True),
    ):
        hostile = weight()
        vars(hostile)[field] = value
        with pytest.raises(ValueError, match=r"group_size=|needs a contiguous|not all finite and above 0"):
            unpickled(hostile, weights_only=True)
    hostile = weight()
    del vars(hostile)["zero"]
    with pytest.raises(ValueError, match="needs the fields"):
        unpickled(hostile, weights_only=True)


def test_parts_set_by_hand_are_checked_before_they_are_used(backend):
    """Kernels take addresses and sizes as they are, and a kept plan had the address of scales that were gone."""
    model = int8()
    held = model["mlp"].weight
    optimizer = APOLLOAdamW([{"params": [held], "rank": 4}], lr=1e-2)
    held.grad = torch.ones(40, 24)
    optimizer.step()
    good = {part: getattr(held, part) for part in PARTS}
    moments = optimizer.state[held]["exp_avg"].clone()
    for part, value in (("scale", good["scale"].bfloat16()), ("scale", good["scale"][:3]), ("zero", good["zero"].int()),
                        ("q", good["q"].T.contiguous().T), ("q", "text")):  # fmt: skip
        setattr(held, part, value)
        with pytest.raises(ValueError, match=f"needs a contiguous {part} of"):
            model["mlp"](torch.ones(2, 24))
        if value != "text":
            with pytest.raises(ValueError, match=rf"parameter 0 .*needs a contiguous {part} of"):
                optimizer.step()
        setattr(held, part, good[part])
    assert torch.equal(optimizer.state[held]["exp_avg"], moments)
    held.scale = good["scale"].clone()
    left = good["scale"].clone()
    optimizer.step()
    assert torch.equal(good["scale"], left), "the scales that are gone were written"
    assert not torch.equal(held.scale, left)
