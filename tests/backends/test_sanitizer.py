"""The launch recorder of tests/support/sanitizer.py, on kernels with planted bugs: each is found, and nothing else."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if torch.cuda.is_available():
    pytest.skip("the recorder needs Triton's interpreter", allow_module_level=True)

from sanitizer import Recorder, Traffic  # noqa: E402


@triton.jit
def double(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n) * 2, mask=o < n)


@triton.jit
def double_unmasked(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o) * 2)


@triton.jit
def shift(p_x, BLOCK: tl.constexpr):
    """x[i] <- x[i + BLOCK] + 1, which the next program writes."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o + BLOCK) + 1)


@triton.jit
def overlap(p_x, STEP: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(p_x + tl.program_id(0) * STEP + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def publish(p_x, p_y, WRITER: tl.constexpr):
    """All programs read x[0], WRITER among them, which writes it too."""
    program = tl.program_id(0)
    tl.store(p_y + program, tl.load(p_x))
    if program == WRITER:
        tl.store(p_x, 1.0)


@triton.jit
def both(p_x, p_y):
    tl.store(p_x, 1.0)
    tl.store(p_y, 1.0)


@triton.jit
def mixed_sizes(p_words, p_bytes):
    """Program 0 writes an int32, program 1 the third of its bytes."""
    if tl.program_id(0) == 0:
        tl.store(p_words, 1)
    else:
        tl.store(p_bytes + 2, tl.full([], 7, tl.int8))


@triton.jit
def count(p_x, p_counter, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(p_counter + o, tl.load(p_x + o), mask=o < 3)


@triton.jit
def swap(p_x, OFFSET: tl.constexpr):
    tl.atomic_cas(p_x + OFFSET, 0, 5)


@triton.jit
def last_writer(p_x):
    tl.store(p_x, tl.program_id(0))


@triton.jit
def stream(p_table, p_sizes, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """table: int64 [matrices, 2], the addresses of a source and a destination; program (matrix, block)."""
    matrix = tl.program_id(0)
    p_x = tl.load(p_table + matrix * 2).to(tl.pointer_type(DTYPE))
    p_y = tl.load(p_table + matrix * 2 + 1).to(tl.pointer_type(DTYPE))
    n = tl.load(p_sizes + matrix)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n), mask=o < n)


@triton.jit
def row_sums(p_x, p_y, COLUMNS: tl.constexpr, PASSES: tl.constexpr):
    """Reads its row PASSES times, and writes its sum once."""
    row = tl.program_id(0)
    total = tl.zeros([COLUMNS], tl.float32)
    for _ in range(PASSES):
        total += tl.load(p_x + row * COLUMNS + tl.arange(0, COLUMNS))
    tl.store(p_y + row * COLUMNS + tl.arange(0, COLUMNS), total)


@triton.jit
def touch_rows(p_table, columns, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """x[row, :BLOCK] <- itself; where not WIDE, offsets are int32 and overflow."""
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    p_x = tl.load(p_table).to(tl.pointer_type(tl.bfloat16)) + row * columns
    o = tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o))


@triton.jit
def coordinates(p_y):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(p_y + (x * tl.num_programs(1) + y) * tl.num_programs(2) + z, x * 100 + y * 10 + z)


@triton.jit
def undefined_lanes(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n))


def recorded(kernel, grid, *arguments, recorder=None, **constants):
    with recorder or Recorder() as recorder:
        kernel[grid](*arguments, **constants)
    (launch,) = recorder.launches
    return launch


def guarded(count, dtype=torch.float32):
    """A tensor in the middle of memory that torch does not know, and that memory."""
    memory = np.full(count * 4 + 4096, 0xAB, np.uint8)
    # from_numpy of a slice: its storage is the slice, so its neighbourhood is mapped and yet belongs to no tensor.
    return torch.from_numpy(memory[2048 : 2048 + count * 4]).view(dtype), memory


class TestClean:
    def test_a_clean_kernel_is_reported_clean(self):
        x, y = torch.randn(100), torch.full([100], torch.nan)
        with Recorder() as recorder:
            double[(4,)](x, y, 100, BLOCK=32)
        recorder.assert_clean()
        (launch,) = recorder.launches
        assert (launch.kernel, launch.programs, launch.grid) == ("double", 4, (4, 1, 1))
        assert (launch.races, launch.strays, launch.atomics) == ([], [], 0)
        assert torch.equal(y, 2 * x)

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
    def test_read_of_what_another_program_writes(self):
        x = torch.arange(96.0)
        with Recorder() as recorder:
            shift[(2,)](x, BLOCK=32)
        assert recorder.launches[0].races == [
            "shift: byte 128 of p_x float32[96] is read by program (0, 0, 0) and written by program (1, 0, 0) "
            "(128 bytes in all)"
        ]
        with pytest.raises(AssertionError, match="shift: byte 128 of p_x"):
            recorder.assert_clean()

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

    def test_store_behind_the_end_leaves_the_memory_there_alone(self):
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


class TestBytes:
    @pytest.mark.parametrize(("dtype", "element"), [(torch.bfloat16, tl.bfloat16), (torch.float32, tl.float32)])
    def test_a_stream_with_a_masked_tail_through_a_pointer_table(self, dtype, element):
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
