"""8-bit moments of sharded weights: the codes of a single process, saved on some ranks and loaded on others."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import Weights, assert_close, assert_ranks_agree, assert_same_bits, local, needs_uneven_strides
from distributed_harness import run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from apollo_triton.backends.reference import dense_8bit
from apollo_triton.core.moments_8bit import dequantize_blockwise

pytestmark = pytest.mark.skipif(
    dense_8bit.obstacle(torch.device("cpu")) is not None, reason="bitsandbytes cannot update 8-bit moments here"
)

EIGHT = {"state_bits": 8, "min_8bit_size": 1}
APOLLO = {"rank": 16, "update_proj_gap": 3, "weight_decay": 0.05}  # 16 channels a block
RANK_24 = {"rank": 24, "update_proj_gap": 3}  # 32 channels fill 3 blocks
CHANNEL_A_BLOCK = {"rank": 256, "proj_type": "right", "scale_type": "tensor", "update_proj_gap": 3}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 16.0}

# Shape, group, and for each mesh: the cut, and whether shards are whole blocks (16 channels, 256 elements).
CASES = {
    "rows": ((192, 20), APOLLO, {1: ("0", "yes"), 2: ("01", "yes")}),
    "width": ((192, 20), APOLLO, {1: ("1", "yes"), 2: ("11", "yes")}),
    "both": ((20, 192), APOLLO, {1: ("0", "yes"), 2: ("00", "yes")}),
    "rank_24": ((384, 30), RANK_24, {1: ("0", "yes"), 2: ("r0", "yes")}),
    "few": ((4, 260), CHANNEL_A_BLOCK, {1: ("0", "yes"), 2: ("10", "yes")}),  # on 3 ranks one has none
    "experts": ((3, 48, 20), APOLLO, {1: ("0", "yes"), 2: ("0r", "yes")}),
    "experts_rows": ((2, 192, 20), APOLLO, {1: ("1", "yes"), 2: ("01", "yes")}),
    "table": ((33, 256), {}, {1: ("0", "yes"), 2: ("00", "yes")}),  # uneven rows
    "columns": ((6, 3072), {}, {1: ("1", "yes"), 2: ("01", "yes")}),
    "stacked": ((3, 4, 256), {}, {1: ("1", "yes"), 2: ("01", "yes")}),
    "flat": ((384, 12), {}, {1: ("0", "yes"), 2: ("0r", "yes")}),  # a block has parts of 22 rows
    "ragged": ((63, 20), APOLLO, {1: ("0", "on 2"), 2: ("0r", "yes")}),  # 32 and 31, 21 each
    "ragged_flat": ((127, 12), {}, {1: ("0", "on 2"), 2: ("0r", "yes")}),  # 64 and 63 rows, 43 each
    "spanning": ((40, 20), APOLLO, {1: ("0", "no"), 2: ("0r", "no")}),
    "spanning_table": ((33, 24), {"weight_decay": 0.1}, {1: ("0", "no"), 2: ("1r", "no")}),
    "mini": ((300, 7), MINI, {1: ("0", "never"), 2: ("01", "never")}),
    "bias": ((512,), {}, {1: ("0", "never"), 2: ("0r", "never")}),
}
HEALTHY = {f"{name}_again": CASES[name] for name in ("rows", "width", "table")}


def is_8bit(fits, mesh_shape):
    """Whether a case's moments are 8-bit, as its entry says. A single process has whole blocks of any matrix."""
    world = max(1, torch.Size(mesh_shape).numel())
    return fits == "yes" or (fits != "never" and world == 1) or fits == f"on {world}"


def build(mesh_shape, names=None, **options):
    """Weights on a mesh; an empty shape means plain tensors."""
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None
    all_cases = CASES | HEALTHY
    cases = {
        name: (shape, group, cuts[len(mesh_shape)][0] if mesh_shape else "plain")
        for name, (shape, group, cuts) in all_cases.items()
        if names is None or name in names
    }
    return Weights(cases, mesh, **(EIGHT | options))


def in_floats(values):
    """State in which codes are the numbers that they stand for."""
    result = {}
    for key, value in values.items():
        if key.endswith("_q"):
            name = key.removesuffix("_q")
            absmax = values[f"{name}_absmax"]
            matrices = len(value) if value.dim() == 3 and absmax.dim() == 2 and len(absmax) == len(value) else 1
            parts = zip(value.reshape(matrices, -1), absmax.reshape(matrices, -1), strict=True)
            floats = [dequantize_blockwise(*part, signed=name.endswith("exp_avg")) for part in parts]
            result[name] = torch.stack(floats).view(value.shape)
        elif not key.endswith("_absmax"):
            result[key] = value
    return result


def spoil(name, step, gradient):
    """One element, on one rank, at the fourth step."""
    if step == 4 and not name.endswith("_again"):
        gradient.view(-1)[-1] = float("nan")


def trained(mesh_shape, names=None, **options):
    """Everything after three steps, after one with NaN on one rank, and after one more; and what is held here."""
    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(mesh_shape, names, **options)
        predicted = {row.name: row.state_bytes for row in model.optimizer.summary().rows}
        model.train_for(3)
        told += [str(each.message) for each in caught if "state_bits" in str(each.message)]
    three, held = model.everything(), {}
    for name, parameter in model.named_parameters():
        state = model.optimizer.state[parameter]
        held[name] = sum(local(value).nbytes for value in state.values() if isinstance(value, torch.Tensor))
    model.train_for(1, spoil)
    four = model.everything()
    five = model.train_for(1).everything()
    return {"three": three, "four": four, "five": five, "held": held, "predicted": predicted, "told": told}


full, slow = pytest.mark.full, pytest.mark.slow
MESHES = [
    pytest.param((2,), marks=slow),
    pytest.param((3,), marks=full),
    pytest.param((2, 2), marks=[full, needs_uneven_strides]),
]
LOCAL_SKETCH = ("rows", "rank_24", "experts", "experts_rows", "table", "columns", "stacked", "flat", "ragged")


@pytest.mark.parametrize("mesh_shape", MESHES, ids=str)
def test_a_mesh_holds_the_codes_of_a_single_process(mesh_shape):
    """Blocks that begin with each shard, absmaxes cut at other places than codes, bytes of the whole weight, a form
    that a rank chooses by its own shard, a NaN that only one rank sees, codes that are rounded anew where nothing
    moves."""
    results = run(trained, torch.Size(mesh_shape).numel(), mesh_shape=mesh_shape, timeout=200)
    expected = trained(())
    floats = [name for name, (_, _, cuts) in CASES.items() if not is_8bit(cuts[len(mesh_shape)][1], mesh_shape)]
    in_state_dtype = trained((), names=floats, state_bits=32)
    for result in results:
        check_forms(result["three"], mesh_shape)
        assert result["held"] == result["predicted"]
        check_nan(result)
        assert len(result["told"]) == 1, result["told"]
        assert "spanning" in result["told"][0]
    for steps in ("three", "four", "five"):
        assert_ranks_agree([result[steps] for result in results])
        values = in_floats(expected[steps]) | in_state_dtype[steps]
        assert_close(in_floats(results[0][steps]), values, 2e-3, f"{mesh_shape}, {steps}")
    if len(mesh_shape) == 1:
        for name in LOCAL_SKETCH:
            if is_8bit(CASES[name][2][1][1], mesh_shape):
                of_name = [
                    {key: value for key, value in result["five"].items() if key.startswith(f"{name}.exp_avg")}
                    for result in (results[0], expected)
                ]
                assert_same_bits(*of_name, name)


def check_forms(values, mesh_shape):
    for name, (shape, group, cuts) in CASES.items():
        fits = cuts[max(1, len(mesh_shape))][1]
        keys = {key.removeprefix(f"{name}.") for key in values if key.startswith(f"{name}.exp_avg")}
        moments = ("exp_avg", "exp_avg_sq")
        wanted = {f"{each}_{part}" for each in moments for part in ("q", "absmax")}
        assert keys == (wanted if is_8bit(fits, mesh_shape) else set(moments)), (name, mesh_shape)
        if "exp_avg_q" in keys:
            assert values[f"{name}.exp_avg_q"].dtype == torch.uint8
            codes = values[f"{name}.exp_avg_q"].shape
            assert codes == shape if "rank" not in group else codes[-1] == group["rank"], name


def check_nan(result):
    """The fourth step leaves the broken matrices: low-rank ones except for other channels' moments."""
    for name, (_, group, _) in CASES.items():
        before, after = ({k: v for k, v in result[at].items() if k.split(".")[0] == name} for at in ("three", "four"))
        last = -1 if name.startswith("experts") else slice(None)  # others are matrices of their own
        assert torch.equal(before[name][last], after[name][last]), name
        for key, value in after.items():
            if "exp_avg" in key and "rank" not in group:
                assert torch.equal(value, before[key]), key
            elif key.endswith("absmax"):
                assert value.isfinite().all(), key
    for name in HEALTHY:
        assert not torch.equal(result["three"][name], result["four"][name]), name


SMALL = {  # the interpreter is slow
    "width": ((32, 17), APOLLO, "1"),
    "experts_rows": ((2, 32, 17), APOLLO, "1"),
    "ragged": ((17, 31), APOLLO, "1"),
}
LARGER = {
    name: (*CASES[name][:2], CASES[name][2][1][0]) for name in ("rows", "width", "few", "experts", "experts_rows")
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, and do not take CPU tensors")
@pytest.mark.parametrize(
    ("world", "cases"), [pytest.param(2, SMALL, marks=slow), pytest.param(3, LARGER, marks=full)], ids=["2", "3"]
)
def test_kernels_hold_the_codes_of_a_single_process(world, cases):
    """Addresses of absmaxes that are those of the whole weight, or of ``DTensor``s; sums over ranks that go into
    moments of other channels; an empty shard's absmaxes, read from address 0."""
    pytest.importorskip("triton")
    results = run(kernel_steps, world, mesh_shape=(world,), backend="triton", cases=cases, timeout=240)
    expected = kernel_steps((), "reference", cases)
    assert {key.rpartition(".")[2] for key in results[0] if "exp_avg" in key} == PARTS
    assert_ranks_agree(results)
    assert_close(in_floats(results[0]), in_floats(expected), 2e-3, f"{world} ranks")


PARTS = {"exp_avg_q", "exp_avg_sq_q", "exp_avg_absmax", "exp_avg_sq_absmax"}


def kernel_steps(mesh_shape, backend, cases):
    mesh = init_device_mesh("cpu", mesh_shape) if mesh_shape else None
    return Weights(cases, mesh, **EIGHT, backend=backend).train_for(2).everything()


# --- checkpoints

SAVED, END = 3, 5
FITTING = tuple(
    name for name, (_, _, cuts) in CASES.items() if all(fits in ("yes", "never") for _, fits in cuts.values())
)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(mesh_shape, folder):
    """Train, save sharded and as one file, and go on."""
    model = build(mesh_shape).train_for(SAVED)
    fitting = build(mesh_shape, FITTING).train_for(SAVED)
    dcp.save(state_of(fitting), checkpoint_id=f"{folder}/fitting")
    dcp.save(state_of(model), checkpoint_id=f"{folder}/all")
    whole = get_model_state_dict(model, options=FULL), get_optimizer_state_dict(model, model.optimizer, options=FULL)
    part = get_optimizer_state_dict(fitting, fitting.optimizer, options=FULL)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save({"model": whole[0], "optimizer": whole[1], "fitting": part}, f"{folder}/full.pt")
    return model.everything(), fitting.everything(), model.train_for(END - SAVED).everything()


def state_of(model):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, model.optimizer)}


def load(mesh_shape, folder):
    """Fresh weights that take each kind of checkpoint, and what came of it."""
    file = torch.load(f"{folder}/full.pt", weights_only=True)
    found = {}
    model = build(mesh_shape, FITTING)
    state = state_of(model)
    dcp.load(state, checkpoint_id=f"{folder}/fitting")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, model.optimizer, state["optimizer"])
    found["dcp"] = model.everything()
    for how, options in {
        "full": StateDictOptions(full_state_dict=True),
        "broadcast": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    }.items():
        if how == "broadcast" and not mesh_shape:
            continue
        model = build(mesh_shape, FITTING)
        given_ = file["fitting"]
        if how == "flattened":  # of this run itself, as torchtitan saves it
            model.train_for(1)
            given_ = get_optimizer_state_dict(model, model.optimizer, options=options)
            found["own"] = model.state()
            other = build(mesh_shape, FITTING)
            set_optimizer_state_dict(other, other.optimizer, given_, options=options)
            found["flattened"] = other.state()
            continue
        if how == "broadcast" and dist.get_rank() > 0:
            given_ = {}
        set_optimizer_state_dict(model, model.optimizer, given_, options=options)
        found[how] = model.state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(mesh_shape)
        model.optimizer.load_state_dict(file["optimizer"])
        set_model_state_dict(model, file["model"], options=StateDictOptions(full_state_dict=True))
    found["told"] = [str(each.message) for each in caught if "load_state_dict" in str(each.message)]
    model.steps = SAVED
    found["ours"] = model.everything()
    found["end"] = model.train_for(END - SAVED).everything()
    for error, state in {
        "full of another form": lambda other: set_optimizer_state_dict(
            other, other.optimizer, file["optimizer"], options=StateDictOptions(full_state_dict=True)
        ),
        "sharded of another form": lambda other: dcp.load(state_of(other), checkpoint_id=f"{folder}/all"),
    }.items():
        found[error] = ""
        try:
            state(build(mesh_shape))
        except BaseException as refused:  # CheckpointException is no Exception
            found[error] = f"{type(refused).__name__}: {refused}"
    return found


@pytest.mark.parametrize(
    ("origin", "destinations"),
    [
        pytest.param((2,), [(3,), ()], marks=slow),
        pytest.param((), [(2,)], marks=full),
        pytest.param((3,), [(2,), (2, 2)], marks=[full, needs_uneven_strides]),
        pytest.param((2, 2), [(2,), (2, 2)], marks=[full, needs_uneven_strides]),
    ],
    ids=str,
)
def test_codes_survive_another_number_of_ranks(origin, destinations, tmp_path):
    """Codes read as numbers or numbers as codes, absmaxes of other blocks, a form that stays as it was saved and breaks
    the next save, moments of one form beside those of the other."""
    folder = str(tmp_path)
    results = run(save, size(origin), mesh_shape=origin, folder=folder, timeout=120)
    saved, fitting, end = results[0]
    fitting_state = {key: value for key, value in fitting.items() if "." in key}
    for destination in destinations:
        results = run(load, size(destination), mesh_shape=destination, folder=folder, timeout=200)
        for result in results:
            assert_same_bits(result["dcp"], fitting, f"sharded, on {destination}")
            for how in ("full", "broadcast"):
                if how in result:
                    assert_same_bits(result[how], fitting_state, f"{how}, on {destination}")
            assert_same_bits(result["flattened"], result["own"], f"flattened, on {destination}")
            check_forms(result["ours"], destination)
            lost, gained = changes(origin, destination)
            assert_close(in_floats(result["ours"]), in_floats(saved), 0.03 if gained else 0, f"ours, on {destination}")
            exact = {key: value for key, value in saved.items() if key.split(".")[0] not in lost | gained}
            assert_same_bits({key: result["ours"][key] for key in exact}, exact, f"ours, on {destination}")
            assert_close(in_floats(result["end"]), in_floats(end), 0.03, f"resumed on {destination}")
            assert len(result["told"]) == bool(lost) + bool(gained), result["told"]
            assert all(any(name in text for text in result["told"]) for name in sorted(lost)[:1])
            for error in ("full of another form", "sharded of another form"):
                assert bool(result[error]) == bool(lost | gained), (error, destination, result[error])
            if lost | gained:
                assert "optimizer.load_state_dict(...) on every rank" in result["full of another form"]
                assert "exp_avg" in result["sharded of another form"]
        assert_ranks_agree([result["end"] for result in results])


def size(mesh_shape):
    return max(1, torch.Size(mesh_shape).numel())


def changes(origin, destination):
    """Which weights have 8-bit moments on the one and floats on the other."""
    forms = {}
    for mesh_shape in (origin, destination):
        forms[mesh_shape] = {
            name for name, (_, _, cuts) in CASES.items() if is_8bit(cuts[max(1, len(mesh_shape))][1], mesh_shape)
        }
    return forms[origin] - forms[destination], forms[destination] - forms[origin]
