"""8-bit moments as launches: exact bytes, no race, no stray access, the same bits whatever the order of programs."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_same_bits, optimizer_of, parameters_of

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Recorder

EIGHT = {"constructor": {"state_bits": 8, "min_8bit_size": 257}}  # the interpreter takes a second for 4096


def second_step(parameters, recorder=None, **options):
    optimizer = optimizer_of(parameters, **options, **EIGHT)
    optimizer.step()
    with recorder or Recorder() as recorder:
        optimizer.step()
    recorder.assert_clean()
    return recorder.launches, optimizer


def test_moments_are_read_twice_and_written_once_a_byte_each():
    (weight,) = parameters_of([(192, 96)], torch.bfloat16)
    launches, optimizer = second_step([weight], rank=16)
    assert [launch.kernel for launch in launches] == ["sketch_kernel", "rescale_blockwise_kernel", "apply_kernel"]
    held = optimizer.state[weight]
    for name in ("exp_avg", "exp_avg_sq"):
        traffic = [launch.traffic(held[name]) for launch in launches]
        assert sum(each.loaded for each in traffic) == 2 * held[name].numel()
        assert sum(each.stored for each in traffic) == held[name].numel()
        stored = sum(launch.traffic(held[f"{name}_absmax"]).stored for launch in launches)
        assert stored == 4 * held[f"{name}_absmax"].numel()
    gradient = [launch.traffic(weight.grad) for launch in launches]
    assert sum(each.loaded for each in gradient) == 4 * weight.numel()


def test_one_launch_serves_all_matrices_of_a_kind():
    launches, _ = second_step(parameters_of([(64, 32), (96, 32), (128, 40)] * 2), rank=16)
    assert len(launches) == 3
    # A matrix whose moments are too small is float32, and goes by itself.
    launches, _ = second_step(parameters_of([(64, 32), (96, 32), (16, 16)]), rank=16)
    assert len(launches) == 3 + 2


@pytest.mark.parametrize(("rank", "scale_type"), [(1, "tensor"), (3, "channel"), (24, "channel")])
def test_programs_in_any_order_leave_the_same_bits(rank, scale_type):
    """A program that reads what another writes, blocks that two programs own, accesses beyond the end."""
    ends = []
    for order in (None, 1):
        weights = parameters_of([(301, 30), (30, 270), (2, 290, 25)])
        _, optimizer = second_step(weights, Recorder(shuffle=order), rank=rank, scale_type=scale_type)
        ends.append((weights, optimizer))
    (weights, optimizer), (others, shuffled) = ends
    assert_same_bits(weights, others, (optimizer, shuffled))


def test_a_matrix_moves_alike_alone_and_among_others():
    shapes = [(301, 30), (40, 30), (290, 25)]
    together = parameters_of(shapes)
    _, optimizer = second_step(together, rank=2)
    for index in range(len(shapes)):
        alone = parameters_of(shapes)[index : index + 1]
        _, own = second_step(alone, rank=2)
        assert_same_bits(alone, together[index : index + 1], (own, optimizer))
