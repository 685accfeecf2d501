"""The int8 step as launches: exact bytes, no race, no stray access, the same bits whatever the order of programs."""

from __future__ import annotations

import pytest
import torch
from distributed_cases import drawn
from torch import nn

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Recorder

from apollo_triton import APOLLOAdamW
from apollo_triton.int8.weight import Int8Weight

MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}


def weights_of(shapes, group_size, dtype=torch.bfloat16):
    weights = [
        nn.Parameter(Int8Weight.of(drawn(shape, "w", i).to(dtype), group_size)) for i, shape in enumerate(shapes)
    ]
    for number, weight in enumerate(weights):
        weight.grad = drawn(tuple(weight.shape), "g", number).to(dtype)
    return weights


def second_step(weights, recorder=None, **group):
    """The launches of a step that is not the first, when no state is made."""
    optimizer = APOLLOAdamW([{"params": weights, **group}], lr=1e-2, backend="triton")
    optimizer.step()
    with recorder or Recorder() as recorder:
        optimizer.step()
    recorder.assert_clean()
    return recorder.launches


@pytest.mark.parametrize("shape", [(512, 384), (384, 512)])
def test_a_step_of_rank_one_moves_less_than_6_3_bytes_a_parameter(shape):
    """bfloat16 gradients, groups of 128: G twice, q read and written, five bytes a group likewise; no float copy
    of the weight goes through memory."""
    (weight,) = weights_of([shape], 128)
    launches = second_step([weight], **MINI)
    assert [launch.kernel for launch in launches] == ["sketch_kernel", "apply_int8_kernel"]
    count, groups = weight.numel(), weight.numel() // 128
    for tensor, expected in (
        (weight.grad, 4 * count),
        (weight.q, 2 * count),
        (weight.scale, 8 * groups),
        (weight.zero, 2 * groups),
    ):
        traffic = [launch.traffic(tensor) for launch in launches]
        assert sum(each.loaded + each.stored for each in traffic) == expected
    assert sum(launch.loaded + launch.stored for launch in launches) <= 6.3 * count


def test_one_launch_serves_all_shapes_of_a_kind():
    weights = weights_of([(64, 128), (128, 128), (256, 128)] * 3, 128)
    launches = second_step(weights, **MINI)
    assert len(launches) == 4  # two orientations of two launches
    launches = second_step([*weights, *weights_of([(64, 128)], 64)], **MINI)
    assert len(launches) == 6  # another group size is another kernel


@pytest.mark.parametrize("group_size", [16, 48, 12])
@pytest.mark.parametrize("group", [MINI, {"rank": 3}], ids=["mini", "apollo"])
def test_programs_in_any_order_leave_the_same_bits(group, group_size):
    """A program that reads what another writes, groups that two programs own, accesses beyond the end."""
    ends = []
    for order in (None, 1, 2):
        weights = weights_of([(33, 48), (48, 288), (6, 48)], group_size, torch.float32)
        recorder = Recorder(shuffle=order)
        second_step(weights, recorder, **group)
        ends.append([part.clone() for weight in weights for part in (weight.q, weight.scale, weight.zero)])
    for other in ends[1:]:
        assert all(torch.equal(*pair) for pair in zip(ends[0], other, strict=True))
