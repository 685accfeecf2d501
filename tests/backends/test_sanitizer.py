"""The launch recorder of tests/support/sanitizer.py, on kernels with planted bugs: each is found, and nothing else."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Recorder  # noqa: E402
from sanitizer_kernels import (  # noqa: E402
    both,
    coordinates,
    count,
    double,
    double_unmasked,
    guarded,
    last_writer,
    mixed_sizes,
    overlap,
    publish,
    recorded,
    shift,
    stream,
    swap,
)

pytestmark = pytest.mark.full


class TestClean:
    def test_a_program_may_reread_and_rewrite_its_own_addresses(self):
        x = torch.ones(64)
        launch = recorded(double, (2,), x, x, 64, BLOCK=32)
        assert launch.races == []
        assert x.eq(2).all()

    def test_nothing_launched_is_not_clean(self):
        with Recorder() as recorder:
            pass
        with pytest.raises(AssertionError, match="no kernel was launched"):
            recorder.assert_clean()

    def test_launches_after_the_recorder_are_not_recorded_and_run_as_ever(self):
        x, y = torch.randn(8), torch.zeros(8)
        with Recorder() as recorder:
            double[(1,)](x, y, 8, BLOCK=8)
        double[(2,)](x, y, 8, BLOCK=4)
        assert len(recorder.launches) == 1
        assert torch.equal(y, 2 * x)

    def test_a_kernel_that_raises_leaves_the_interpreter_as_it_was(self):
        x, y = torch.randn(8), torch.zeros(8)
        with pytest.raises(Exception, match="planted"), Recorder(only=self.planted) as recorder:
            double[(1,)](x, y, 8, BLOCK=8)
        double[(1,)](x, y, 8, BLOCK=8)
        assert recorder.launches == []
        assert torch.equal(y, 2 * x)

    @staticmethod
    def planted(program):
        raise RuntimeError("planted")

    def test_three_axes_and_a_grid_that_depends_on_the_arguments(self):
        y = torch.zeros(2 * 3 * 4, dtype=torch.int32)
        launch = recorded(coordinates, lambda meta: (2, 3, 4), y, recorder=Recorder(shuffle=1))
        assert launch.programs == 24
        assert y.tolist() == [x * 100 + y * 10 + z for x in range(2) for y in range(3) for z in range(4)]

    def test_many_launches_and_a_readable_failure(self):
        x = torch.zeros(64)
        with Recorder() as recorder:
            for _ in range(30):
                last_writer[(2,)](x)
        assert len(recorder.launches) == 30
        with pytest.raises(AssertionError) as failure:
            recorder.assert_clean()
        assert len(str(failure.value).splitlines()) == 21
        assert "... and 10 more" in str(failure.value)


class TestRaces:
    def test_two_programs_that_write_one_address_even_the_same_value(self):
        x = torch.zeros(128)
        (race,) = recorded(overlap, (2,), x, STEP=24, BLOCK=32).races
        assert "byte 96 of p_x float32[128]" in race
        assert "written by program (0, 0, 0) and written by program (1, 0, 0) (32 bytes in all)" in race
        assert recorded(overlap, (4,), x, STEP=32, BLOCK=32).races == []

    @pytest.mark.parametrize("writer", [0, 1, 3])
    def test_one_writer_among_readers(self, writer):
        """The first, a middle and the last program to run: earlier readers as well as later ones count."""
        (race,) = recorded(publish, (4,), torch.zeros(1), torch.zeros(4), WRITER=writer).races
        assert f"written by program ({writer}, 0, 0) (4 bytes in all)" in race

    def test_reads_alone_are_no_race(self):
        assert recorded(publish, (4,), torch.zeros(1), torch.zeros(4), WRITER=9).races == []

    def test_a_line_for_each_tensor(self):
        races = recorded(both, (2,), torch.zeros(4), torch.zeros(5)).races
        assert sorted(race.split(" is ")[0] for race in races) == [
            "both: byte 0 of p_x float32[4]",
            "both: byte 0 of p_y float32[5]",
        ]

    def test_a_byte_of_another_programs_word(self):
        x = torch.zeros(2, dtype=torch.int32)
        (race,) = recorded(mixed_sizes, (2,), x, x.view(torch.int8)).races
        assert "byte 2 of p_" in race
        assert "(1 bytes in all)" in race

    def test_through_a_pointer_table(self):
        """Two rows of the table hold one destination; no argument of the launch is a float32."""
        x, y = torch.randn(2, 40), torch.zeros(40)
        table = torch.tensor([[x[0].data_ptr(), y.data_ptr()], [x[1].data_ptr(), y.data_ptr()]])
        sizes = torch.tensor([40, 40])
        (race,) = recorded(stream, (2, 2), table, sizes, DTYPE=tl.float32, BLOCK=32).races[:1]
        assert "stream: byte 0 of float32[40] is written by program (0, 0, 0)" in race
        assert "program (1, 0, 0) (128 bytes in all)" in race

    def test_programs_are_named_by_id_however_shuffled(self):
        races = [recorded(shift, (8,), torch.zeros(9 * 4), BLOCK=4, recorder=Recorder(shuffle=s)).races for s in (1, 2)]
        assert sorted(races[0]) == sorted(races[1])
        assert len(races[0]) == 7


class TestStrays:
    def test_load_behind_the_end(self):
        x, _ = guarded(40)
        x.fill_(1)
        y = torch.full([64], -1.0)
        launch = recorded(double_unmasked, (2,), x, y, BLOCK=32)
        (stray,) = launch.strays
        assert "double_unmasked: program (1, 0, 0) loads 24 elements of 4 bytes outside every tensor" in stray
        assert "byte 160 of p_x float32[40]" in stray
        assert y.tolist() == [2.0] * 40 + [0.0] * 24

    def test_before_the_start(self):
        (x, _), y = guarded(32), torch.zeros(32)
        table = torch.tensor([[x.data_ptr() - 4, y.data_ptr()]])
        (stray,) = recorded(stream, (1, 1), table, torch.tensor([32]), DTYPE=tl.float32, BLOCK=32).strays
        assert "loads 1 elements of 4 bytes" in stray
        assert "byte -4 of float32[32]" in stray

    def test_masked_off_lanes_may_point_anywhere(self):
        (x, _), (y, _) = guarded(40), guarded(40)
        assert recorded(double, (2,), x, y, 40, BLOCK=32).strays == []

    def test_an_element_that_only_begins_inside(self):
        memory = np.zeros(64, np.uint8)
        x = torch.from_numpy(memory[:30])
        table = torch.tensor([[x.data_ptr(), x.data_ptr()]])
        launch = recorded(stream, (1, 1), table, torch.tensor([8]), DTYPE=tl.float32, BLOCK=8)
        assert ["1 elements" in stray for stray in launch.strays] == [True, True]

    @pytest.mark.parametrize("address", [0, 8, 2**47, 2**63 - 2, -1, -(2**63)])
    def test_wild_pointers_do_not_crash(self, address):
        table = torch.tensor([[address, address]])
        with np.errstate(over="ignore"):
            launch = recorded(stream, (1, 1), table, torch.tensor([8]), DTYPE=tl.float32, BLOCK=8)
        assert len(launch.strays) == 2

    def test_a_dead_tensor_is_no_home(self):
        memory = np.zeros(64, np.uint8)
        x = torch.from_numpy(memory)
        table, sizes = torch.tensor([[x.data_ptr()] * 2]), torch.tensor([16])
        assert recorded(stream, (1, 1), table, sizes, DTYPE=tl.float32, BLOCK=16).strays == []
        del x
        assert len(recorded(stream, (1, 1), table, sizes, DTYPE=tl.float32, BLOCK=16).strays) == 2

    def test_parameters_and_gradients_that_only_autograd_holds_are_alive(self):
        parameter = torch.nn.Parameter(torch.ones(16))
        (parameter * 3).sum().backward()
        y = torch.zeros(16)
        for source, value in ((parameter.data_ptr(), 1), (parameter.grad.data_ptr(), 3)):
            table = torch.tensor([[source, y.data_ptr()]])
            assert recorded(stream, (1, 1), table, torch.tensor([16]), DTYPE=tl.float32, BLOCK=16).strays == []
            assert y.eq(value).all()

    def test_storages_may_nest(self):
        """Of one memory: the middle; and its start, before and after the whole."""
        memory = np.zeros(256, np.uint8)
        parts = [torch.from_numpy(memory[cut]) for cut in (slice(8, 16), slice(8), slice(None), slice(8))]
        table = torch.tensor([[memory.ctypes.data] * 2])
        assert recorded(stream, (1, 1), table, torch.tensor([64]), DTYPE=tl.float32, BLOCK=64).strays == []
        assert len(parts) == 4

    @pytest.mark.filterwarnings("error")
    def test_tensors_without_memory_are_passed_over(self):
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            fake = torch.empty(4)
        others = [fake, torch.eye(3).to_sparse(), torch.empty(4, device="meta"), torch.empty(0)]
        assert recorded(double, (1,), torch.ones(8), torch.ones(8), 8, BLOCK=8).strays == []
        assert len(others) == 4


class TestAtomics:
    def test_counted_and_not_clean(self):
        x, counter = torch.ones(4), torch.zeros(4)
        with Recorder() as recorder:
            count[(5,)](x, counter, BLOCK=4)
        assert recorder.launches[0].atomics == 15
        assert counter.tolist() == [5, 5, 5, 0]
        with pytest.raises(AssertionError, match="count: 15 atomics"):
            recorder.assert_clean()

    def test_stray_ones_are_found_and_dropped(self):
        (counter, memory), x = guarded(2), torch.ones(4)
        counter.zero_()
        (stray,) = recorded(count, (1,), x, counter, BLOCK=4).strays
        assert "atomically changes 1 elements of 4 bytes" in stray
        assert counter.tolist() == [1, 1]
        assert (memory[2048 + 8 :] == 0xAB).all()

    @pytest.mark.parametrize("offset", [0, 1])
    def test_compare_and_swap(self, offset):
        x, memory = guarded(1, torch.int32)
        memory[:] = 0
        launch = recorded(swap, (1,), x, OFFSET=offset)
        assert launch.atomics == 1
        assert len(launch.strays) == offset
        assert x.item() == (0 if offset else 5)
        assert (memory[2048 + 4 :] == 0).all()


class TestShuffle:
    def test_order_dependence_shows(self):
        def result(seed):
            x = torch.zeros(1, dtype=torch.int32)
            recorded(last_writer, (16,), x, recorder=Recorder(shuffle=seed))
            return x.item()

        assert result(None) == 15
        shuffled = [result(seed) for seed in range(8)]
        assert shuffled == [result(seed) for seed in range(8)]
        assert len(set(shuffled)) > 3

    def test_independent_programs_do_not_care(self):
        x, y = torch.randn(1000), torch.zeros(1000)
        launch = recorded(double, (16,), x, y, 1000, BLOCK=64, recorder=Recorder(shuffle=3))
        assert launch.races == []
        assert torch.equal(y, 2 * x)
