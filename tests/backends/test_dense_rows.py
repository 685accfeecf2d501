"""Dense parameters with one second moment a row: on both backends, at any width, in any layout, and as launches."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    assert_same_bits,
    drawn,
    new_gradients,
    optimizer_of,
    parameters_of,
    state_tensors,
    train,
)
from tiers import tiers, values
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.reference import dense_rows as reference
from apollo_triton.core.moments_8bit import dequantize_blockwise

ROW = {"second_moment": "row"}
EIGHT = {"state_bits": 8, "min_8bit_size": 2}
FORMS = {
    "floats": {},
    "bfloat16": {"state_dtype": torch.bfloat16, "stochastic_rounding": True},
    "8-bit": EIGHT,
    "clipped": {"max_grad_norm": 0.05, "weight_decay": 0.1},
}


def floats_of(optimizer, parameter):
    """M and V, float32."""
    state = optimizer.state[parameter]
    M = state["exp_avg"].float() if "exp_avg" in state else None
    if M is None:
        M = dequantize_blockwise(state["exp_avg_q"], state["exp_avg_absmax"].view(-1), signed=True)
    return M, state["exp_avg_sq"]


# --- both backends


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("form", ["floats", "bfloat16", "8-bit"])  # the norm for clipping is added up in another order
def test_a_row_has_one_float32_and_vectors_keep_one_an_element(form):
    """Bytes that are not saved, a vector that is taken for a row, a summary that counts another state."""
    shapes = [(5, 600), (3, 2, 40), (7,), ()]
    weights = [nn.Parameter(drawn(shape, 1)) for shape in shapes]
    optimizer = APOLLOAdamW([{"params": weights, **ROW}], **FORMS[form])
    counted = [row.state_bytes for row in optimizer.summary().rows]
    new_gradients(weights, 3)
    optimizer.step()
    for weight, nbytes in zip(weights, counted, strict=True):
        state = state_tensors(optimizer, weight)
        assert sum(value.nbytes for value in state.values()) == nbytes
        if weight.dim() > 1:
            assert state["exp_avg_sq"].shape == (len(weight), *[1] * (weight.dim() - 1))
            assert state["exp_avg_sq"].dtype == torch.float32
            first = state["exp_avg_q" if form == "8-bit" else "exp_avg"]
            assert first.itemsize == {"8-bit": 1, "bfloat16": 2}.get(form, 4)
        else:
            assert state["exp_avg_sq"].shape == weight.shape
    alone = [nn.Parameter(drawn(shape, 1)) for shape in shapes]
    other = APOLLOAdamW([{"params": alone}], **FORMS[form])
    for weight, given_ in zip(alone, weights, strict=True):
        weight.grad = given_.grad.clone()
    other.step()
    assert_same_bits(weights[2:], alone[2:], (optimizer, other))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_not_finite_moves_nothing(form):
    """Codes that are rounded anew, a V that one row moves, a skip that is not counted or counted twice."""
    weights = [nn.Parameter(drawn(shape, 1)) for shape in ((20, 300), (9, 33))]
    optimizer = APOLLOAdamW([{"params": weights, **ROW}], **FORMS[form])
    new_gradients(weights, 1)
    optimizer.step()
    before = [{name: value.clone() for name, value in state_tensors(optimizer, each).items()} for each in weights]
    starts = [each.detach().clone() for each in weights]
    new_gradients(weights, 2)
    weights[0].grad[-1, -1] = math.inf
    optimizer.step()
    assert torch.equal(weights[0], starts[0])
    assert not torch.equal(weights[1], starts[1])
    for name, value in state_tensors(optimizer, weights[0]).items():
        assert name == "step" or torch.equal(value, before[0][name]), name
    assert optimizer.skipped_updates == 1


@pytest.mark.parametrize("chunk", [256, 1024])
def test_8_bit_codes_do_not_depend_on_the_parts_in_which_they_are_made(chunk, monkeypatch):
    """A part that begins within a row takes the factors of other rows, or within a block another absmax."""
    runs = []
    for size in (reference.CHUNK, chunk):
        monkeypatch.setattr(reference, "CHUNK", size)
        weights = [nn.Parameter(drawn(shape, 1)) for shape in ((40, 130), (3, 700), (900, 1))]
        optimizer = APOLLOAdamW([{"params": weights, **ROW}], backend="reference", **EIGHT)
        for step in range(2):
            new_gradients(weights, step)
            optimizer.step()
        runs.append((weights, optimizer))
    assert_same_bits(runs[0][0], runs[1][0], (runs[0][1], runs[1][1]))


@pytest.mark.parametrize("form", ["floats", "8-bit"])
def test_8_bit_moments_follow_those_of_floats(form):
    """M of one row under the absmax of another; a first step is that of floats, up to the rounding of M."""
    weight, plain = (nn.Parameter(drawn((30, 200), 1)) for _ in range(2))
    coded = APOLLOAdamW([{"params": [weight], **ROW}], lr=1e-2, **FORMS[form])
    floats = APOLLOAdamW([{"params": [plain], **ROW}], lr=1e-2)
    for step in range(3):
        weight.grad = plain.grad = drawn((30, 200), 10 + step) * torch.logspace(-3, 0, 30, device=DEVICE)[:, None]
        coded.step()
        floats.step()
        torch.testing.assert_close(coded.state[weight]["exp_avg_sq"], floats.state[plain]["exp_avg_sq"])
    assert (weight - plain).abs().max() <= 0.1 * (plain - drawn((30, 200), 1)).abs().max()


# --- the kernels


def small_sums(monkeypatch):
    """Rows that are added up in segments of 256 columns, at most 4, by 4 programs."""
    from apollo_triton.backends.triton import dense_rows

    for module, name, value in (
        (dense_rows.kernels, "SEGMENT", 256),
        (dense_rows.kernels, "SEGMENTS", 4),
        (dense_rows.dense_kernels, "NORM_PROGRAMS", 4),
    ):
        monkeypatch.setattr(module, name, value)
        monkeypatch.setitem(dense_rows._SUMS, name, value)


LAYOUTS = ("rows", "transposed", "gaps", "unaligned")
FAST_LAYOUTS = [("8-bit", "rows", "rows"), ("bfloat16", "transposed", "unaligned"), ("clipped", "gaps", "rows")]
# Narrow, odd, several turns of 256 columns and several segments, more rows than a tile, four dimensions.
WIDTHS = [(2, 1), (70, 1), (3, 7), (33, 40), (5, 256), (2, 700), (9, 2, 3, 5), (2, 5000)]


def laid_out(values, layout):
    """The same values in another layout."""
    if layout == "transposed" and values.dim() == 2:
        return values.t().contiguous().t()
    if layout == "transposed" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "gaps":
        return values.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "unaligned":
        return torch.cat((values.new_zeros(3), values.reshape(-1)))[3:].view(values.shape)
    return values


def run(shapes, dtype, layouts, form, backend, steps=2, seed=0):
    weights = [
        nn.Parameter(laid_out(drawn(shape, seed + index, dtype), layouts[0])) for index, shape in enumerate(shapes)
    ]
    optimizer = optimizer_of(weights, backend=backend, constructor={"weight_decay": 0.1, **FORMS[form]}, **ROW)
    for step in range(steps):
        for index, weight in enumerate(weights):
            gradient = drawn(weight.shape, 100 * step + index + seed, dtype, 1e-2)
            weight.grad = laid_out(gradient, layouts[1])
        optimizer.step()
    return weights, optimizer


def compare(shapes, dtype, layouts, form, seed):
    pytest.importorskip("triton")
    weights, optimizer = run(shapes, dtype, layouts, form, "triton", seed=seed)
    exact, other = run(shapes, dtype, layouts, form, "reference", seed=seed)
    for index, (ours, theirs) in enumerate(zip(weights, exact, strict=True)):
        M, V = floats_of(optimizer, ours)
        expected_M, expected_V = floats_of(other, theirs)
        torch.testing.assert_close(V, expected_V, rtol=2e-6, atol=0)
        coarse = {"8-bit": 2e-2, "bfloat16": 2**-8}.get(form, 1e-6)  # a code or a rounding more or less
        torch.testing.assert_close(M, expected_M, rtol=coarse, atol=coarse * expected_M.abs().max().item() + 1e-12)
        moved = (theirs.float() - laid_out(drawn(theirs.shape, seed + index, dtype), "rows").float()).abs().max().item()
        spacing = torch.finfo(dtype).eps * theirs.abs().max().item()
        assert (ours.float() - theirs.float()).abs().max() <= 2e-2 * moved + 2 * spacing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "weight", "gradient"), tiers(product(FORMS, LAYOUTS, LAYOUTS), lambda *case: case in FAST_LAYOUTS)
)
def test_kernels_are_the_reference_at_any_width(form, weight, gradient, monkeypatch):
    """An element that is given the moment of another row, a segment or a tile that is left out or counted twice, a
    stride of the weight's taken for the gradient's."""
    pytest.importorskip("triton")
    small_sums(monkeypatch)
    compare(WIDTHS, torch.float32, (weight, gradient), form, 0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.full)])
def test_kernels_are_the_reference_on_drawn_shapes(count):
    """What the table above has no row for."""
    shape = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)
    shapes = st.lists(
        st.tuples(st.integers(1, 90), shape).map(lambda pair: (pair[0], *pair[1])), min_size=1, max_size=3
    )
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    layout = st.sampled_from(LAYOUTS)
    examples = given(shapes, dtypes, st.tuples(layout, layout), st.sampled_from([*FORMS]), st.integers(0, 99))
    settings(max_examples=count, deadline=None)(examples(compare))()


@pytest.mark.slow
def test_step_and_rate_may_be_on_the_device():
    """Step size and decay of another step, as ``capturable`` reads them."""
    pytest.importorskip("triton")
    runs = []
    for options in ({}, {"capturable": True}):
        weights = parameters_of([(33, 40), (3, 700)])
        optimizer = optimizer_of(weights, constructor={"weight_decay": 0.1, **options}, **ROW)
        for step in range(3):
            new_gradients(weights, step)
            optimizer.step()
        runs.append(weights)
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# --- the launches


@pytest.fixture
def recorder_of():
    """The recorder of launches, which needs Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the recorder needs Triton's interpreter")
    from sanitizer import Recorder

    return Recorder


RUNS = {
    f"{form}, {str(dtype)[6:]}, {name}": (form, dtype, shapes)
    for form in FORMS
    for dtype in (torch.float32, torch.bfloat16)
    for name, shapes in {
        "aligned": [(33, 40), (20, 264), (2, 1704)],
        "odd": [(33, 41), (3, 1501)],
        "narrow": [(100, 1)],  # more tiles than programs
    }.items()
}
FAST_RUNS = ("8-bit, bfloat16, aligned", "floats, float32, odd", "clipped, bfloat16, narrow")


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers(RUNS, FAST_RUNS.__contains__))
def test_programs_in_any_order_leave_the_same_bits(name, recorder_of, monkeypatch):
    """A second moment that is read where it may have been written, rows that two programs own, atomics."""
    small_sums(monkeypatch)
    (form, dtype, shapes), ends = RUNS[name], []
    for shuffle in (None, 1):
        with recorder_of(shuffle=shuffle) as recorder:
            weights, optimizer = train(parameters_of(shapes, dtype), constructor=FORMS[form], **ROW)
        recorder.assert_clean()
        assert [launch.kernel for launch in recorder.launches] == ["row_sums_kernel", "dense_rows_kernel"] * 2
        ends.append((weights, optimizer))
    assert_same_bits(ends[0][0], ends[1][0], (ends[0][1], ends[1][1]))


@pytest.mark.slow
@pytest.mark.parametrize("form", tiers(FORMS, ("8-bit", "floats").__contains__))
def test_scratch_is_written_before_it_is_read(form, monkeypatch):
    """A part of a sum that a program leaves out, a V that is not put aside."""
    pytest.importorskip("triton")
    from apollo_triton.backends.triton.channels import Channels

    small_sums(monkeypatch)
    weights = parameters_of([(33, 40), (3, 1501), (2, 1700), (70, 3)])
    expected, optimizer = train(weights, constructor=FORMS[form], **ROW)
    scratch = Channels.scratch
    monkeypatch.setattr(Channels, "scratch", lambda self, *shape: scratch(self, *shape).fill_(float("nan")))
    ours, poisoned = train(weights, constructor=FORMS[form], **ROW)
    assert_same_bits(expected, ours, (optimizer, poisoned))


@pytest.mark.slow
@pytest.mark.parametrize("form", tiers(FORMS, ("8-bit",).__contains__))
def test_a_parameter_alone_and_in_company_gets_the_same_bits(form):
    """Row sums, V or absmaxes taken by a parameter's place in the table."""
    pytest.importorskip("triton")
    shapes = [(33, 40), (5, 256), (2, 1704), (70, 8)]
    together, optimizer = train(
        parameters_of(shapes), steps=1, constructor=FORMS[form] | {"max_grad_norm": None}, **ROW
    )
    for index, weight in enumerate(parameters_of(shapes)):
        alone = nn.Parameter(weight.detach().clone())
        alone.grad = together[index].grad
        single = optimizer_of([alone], constructor=FORMS[form] | {"max_grad_norm": None}, **ROW)
        single.step()
        assert_same_bits([together[index]], [alone], (optimizer, single))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [8, 3])
def test_nothing_outside_of_a_buffer_is_touched(offset):
    """Weights, gradients and moments between sentinels, at aligned and at odd addresses."""
    pytest.importorskip("triton")
    buffers = []

    def guarded(tensor):
        whole = torch.full((tensor.numel() + offset + 64,), 77.0, dtype=tensor.dtype, device=DEVICE)
        buffers.append((whole, tensor.numel()))
        return whole[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)

    weights = [nn.Parameter(guarded(each.detach())) for each in parameters_of([(33, 40), (3, 701)])]
    optimizer = optimizer_of(weights, **ROW)
    for step in range(2):
        for index, weight in enumerate(weights):
            weight.grad = guarded(drawn(weight.shape, 10 * step + index))
        optimizer.step()
        for weight in weights:
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][name] = guarded(optimizer.state[weight][name])
    for whole, numel in buffers:
        assert torch.all(whole[:offset] == 77)
        assert torch.all(whole[offset + numel :] == 77)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype", "form"), values([(40, 264), (264, 40)], [torch.bfloat16, torch.float32], ["floats", "8-bit"])
)
def test_bytes_moved(shape, dtype, form, recorder_of):
    """G twice, W and M read and written once, and of V a few bytes a row: a temporary that goes through memory, or an
    element that reads a V of its own."""
    (weight,) = parameters_of([shape], dtype)
    optimizer = optimizer_of([weight], constructor=FORMS[form], **ROW)
    optimizer.step()
    with recorder_of() as recorder:
        optimizer.step()
    recorder.assert_clean()
    assert [launch.kernel for launch in recorder.launches] == ["row_sums_kernel", "dense_rows_kernel"]
    state = optimizer.state[weight]
    first = state["exp_avg_q" if form == "8-bit" else "exp_avg"]
    for tensor, loaded, stored in (
        (weight, 1, 1),
        (weight.grad, 2, 0),
        (first, 1, 1),
        (state["exp_avg_sq"], 1, 1),
        *([(state["exp_avg_absmax"], 1, 1)] if form == "8-bit" else []),
    ):
        traffic = [launch.traffic(tensor) for launch in recorder.launches]
        assert sum(each.loaded for each in traffic) == loaded * tensor.nbytes
        assert sum(each.stored for each in traffic) == stored * tensor.nbytes
    once = sum(launch.loaded_once + launch.stored_once for launch in recorder.launches)
    programs = sum(launch.programs for launch in recorder.launches)
    codes = 4 * 511 * (form == "8-bit")
    # Of a row V, its copy and its sum, each written and read; a line of the table a launch; 256 parts of the norm.
    most = 4 * weight.nbytes + 2 * first.nbytes + 8 * first.numel() // 256 + 24 * shape[0] + 8 * 256 + codes
    assert once <= most + 2 * 128 + 64 * programs


@pytest.mark.parametrize(
    ("shapes", "form", "most"),
    [
        ([(64, 48), (300, 8), (2, 3, 8)], "floats", 2),
        ([(64, 48), (300, 8), (2, 3, 8)], "8-bit", 2),
        ([(64, 48), (300, 7)], "floats", 4),  # rows that are not aligned
        ([(64, 48), (48,)], "floats", 4),  # a vector has one an element
    ],
)
def test_launches_do_not_grow_with_parameters(shapes, form, most, monkeypatch):
    pytest.importorskip("triton")
    from apollo_triton.core import gpu

    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    optimizer = optimizer_of(parameters_of(shapes, torch.bfloat16), constructor=FORMS[form], **ROW)
    optimizer.step()
    assert len(launched) == most
