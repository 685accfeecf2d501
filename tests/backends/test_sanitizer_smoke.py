"""The launch recorder of tests/support/sanitizer.py finds a race, a stray store and the bytes that a kernel moves.

What else it finds is in test_sanitizer.py and test_sanitizer_bytes.py, which ``make test-all`` runs.
"""

import pytest
import torch

pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Recorder, Traffic  # noqa: E402
from sanitizer_kernels import (  # noqa: E402
    double,
    double_unmasked,
    guarded,
    recorded,
    shift,
    stream,
)


def test_a_clean_kernel_is_reported_clean():
    x, y = torch.randn(100), torch.full([100], torch.nan)
    with Recorder() as recorder:
        double[(4,)](x, y, 100, BLOCK=32)
    recorder.assert_clean()
    (launch,) = recorder.launches
    assert (launch.kernel, launch.programs, launch.grid) == ("double", 4, (4, 1, 1))
    assert (launch.races, launch.strays, launch.atomics) == ([], [], 0)
    assert torch.equal(y, 2 * x)


def test_read_of_what_another_program_writes():
    x = torch.arange(96.0)
    with Recorder() as recorder:
        shift[(2,)](x, BLOCK=32)
    assert recorder.launches[0].races == [
        "shift: byte 128 of p_x float32[96] is read by program (0, 0, 0) and written by program (1, 0, 0) "
        "(128 bytes in all)"
    ]
    with pytest.raises(AssertionError, match="shift: byte 128 of p_x"):
        recorder.assert_clean()


def test_store_behind_the_end_leaves_the_memory_there_alone():
    (y, memory), x = guarded(40), torch.ones(64)
    with Recorder() as recorder:
        double_unmasked[(2,)](x, y, BLOCK=32)
    with pytest.raises(AssertionError, match="stores 24 elements"):
        recorder.assert_clean()
    (stray,) = recorder.launches[0].strays
    assert "program (1, 0, 0) stores 24 elements" in stray
    assert y.eq(2).all()
    assert (memory[:2048] == 0xAB).all()
    assert (memory[2048 + 160 :] == 0xAB).all()


@pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, tl.bfloat16), (torch.float32, tl.float32)])
def test_a_stream_with_a_masked_tail_through_a_pointer_table(dtype, element):
    sizes = [130, 7]
    sources, targets = ([torch.randn(n).to(dtype) for n in sizes] for _ in range(2))
    table = torch.tensor([[x.data_ptr(), y.data_ptr()] for x, y in zip(sources, targets, strict=True)])
    n = torch.tensor(sizes, dtype=torch.int32)
    launch = recorded(stream, (2, 3), table, n, DTYPE=element, BLOCK=64)
    size = dtype.itemsize
    # Each of six programs reads two addresses and a length.
    assert launch.loaded == 137 * size + 6 * (2 * 8 + 4)
    assert launch.stored == launch.stored_once == 137 * size
    assert launch.loaded_once == 137 * size + 2 * (2 * 8 + 4)
    assert launch.traffic(table) == Traffic(6 * 16, 0, 2 * 16, 0)
    assert launch.traffic(n) == Traffic(6 * 4, 0, 2 * 4, 0)
    for x, y in zip(sources, targets, strict=True):
        assert launch.traffic(x) == Traffic(x.nbytes, 0, x.nbytes, 0)
        assert launch.traffic(y) == Traffic(0, y.nbytes, 0, y.nbytes)
        assert torch.equal(x, y)
    assert launch.races == launch.strays == []
