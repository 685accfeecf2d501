"""The launch recorder of tests/support/sanitizer.py: bytes that are counted, addresses past 2**33, chosen programs."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Recorder, Traffic  # noqa: E402
from sanitizer_kernels import (  # noqa: E402
    double,
    recorded,
    row_sums,
    stream,
    touch_rows,
    undefined_lanes,
)

pytestmark = pytest.mark.full


class TestBytes:
    def test_distinct_against_repeated_loads(self):
        x, y = torch.randn(4, 16), torch.zeros(4, 16)
        launch = recorded(row_sums, (4,), x, y, COLUMNS=16, PASSES=3)
        assert (launch.loaded, launch.loaded_once) == (3 * x.nbytes, x.nbytes)
        assert (launch.stored, launch.stored_once) == (y.nbytes, y.nbytes)

    def test_traffic_of_a_view_is_its_storages(self):
        both = torch.randn(2, 64)
        launch = recorded(double, (1,), both[0], both[1], 64, BLOCK=64)
        assert launch.traffic(both[0, :3]) == Traffic(256, 256, 256, 256)
        assert launch.traffic(torch.zeros(4)) == Traffic(0, 0, 0, 0)

    def test_masked_off_lanes_without_other_are_undefined(self):
        x, y = torch.ones(8), torch.zeros(8)
        recorded(undefined_lanes, (1,), x, y, 5, BLOCK=8)
        assert y[:5].eq(1).all()
        assert y[5:].isnan().all()
        recorded(undefined_lanes, (1,), x, y, 5, BLOCK=8, recorder=Recorder(poison=None))
        assert y[5:].eq(0).all()

    def test_large_launches_are_fast_enough(self):
        x, y = torch.randn(100 * 8192), torch.zeros(100 * 8192)
        launch = recorded(double, (100,), x, y, x.numel(), BLOCK=8192)
        assert (launch.loaded, launch.loaded_once) == (x.nbytes, x.nbytes)
        assert (launch.stored, launch.stored_once) == (y.nbytes, y.nbytes)
        assert launch.races == []


class TestPhantoms:
    START, ROWS, COLUMNS = 2**60, 10**9, 40_000

    def launch(self, rows, wide=True, columns=COLUMNS):
        phantom = [(self.START, self.ROWS * self.COLUMNS * 2)]
        recorder = Recorder(phantom=phantom, only=[(row,) for row in rows])
        with np.errstate(over="ignore"):
            return recorded(
                touch_rows, (self.ROWS,), torch.tensor([self.START]), columns, WIDE=wide, BLOCK=4, recorder=recorder
            )

    def test_addresses_past_two_to_the_33(self):
        rows = [0, 3, self.ROWS - 1]
        launch = self.launch(rows)
        assert (launch.programs, launch.grid) == (3, (self.ROWS, 1, 1))
        loaded, stored = launch.addresses(self.START, self.ROWS * self.COLUMNS * 2)
        expected = [(row * self.COLUMNS + column) * 2 for row in rows for column in range(4)]
        assert expected[-1] > 2**33
        assert loaded.dtype == np.int64
        assert loaded.tolist() == stored.tolist() == expected
        assert launch.strays == launch.races == []

    def test_int32_offsets_overflow(self):
        assert len(self.launch([60_000], wide=False).strays) == 2
        assert self.launch([60_000]).strays == []

    def test_races_and_strays_there(self):
        races = self.launch([1, 2], columns=2).races
        assert "byte 8 of phantom[80000000000000] is written by program (1, 0, 0) and written by program (2" in races[0]
        strays = self.launch([self.ROWS - 1], columns=self.COLUMNS + 1).strays
        assert "loads 4 elements of 2 bytes" in strays[0]
        assert "byte 80001999919998 of phantom[80000000000000]" in strays[0]

    def test_loads_give_zero_and_stores_are_dropped(self):
        y = torch.ones(8)
        table, n = torch.tensor([[self.START, y.data_ptr()], [y.data_ptr(), self.START]]), torch.tensor([8, 8])
        recorder = Recorder(phantom=[(self.START, 32)])
        launch = recorded(stream, (2, 1), table, n, DTYPE=tl.float32, BLOCK=8, recorder=recorder)
        assert y.eq(0).all()
        assert launch.strays == []
        assert launch.addresses(self.START, 16)[1].tolist() == [0, 4, 8, 12]

    def test_one_that_overlaps_a_tensor_is_refused(self):
        x = torch.ones(8)
        with pytest.raises(Exception, match="overlaps a live tensor"):
            recorded(double, (1,), x, x, 8, BLOCK=8, recorder=Recorder(phantom=[(x.data_ptr() + 28, 8)]))


class TestOnly:
    def test_a_predicate(self):
        x, y = torch.ones(32), torch.zeros(32)
        recorder = Recorder(only=lambda program: program[0] % 2 == 1)
        assert recorded(double, (4,), x, y, 32, BLOCK=8, recorder=recorder).programs == 2
        assert y.view(4, 8).eq(torch.tensor([[0], [2], [0], [2]])).all()

    def test_ids_and_those_outside_the_grid(self):
        x, y = torch.ones(32), torch.zeros(32)
        recorder = Recorder(only=iter([(1,), (7, 0, 0)]))
        assert recorded(double, (4,), x, y, 32, BLOCK=8, recorder=recorder).programs == 1
        assert y.view(4, 8).sum(1).tolist() == [0, 16, 0, 0]
