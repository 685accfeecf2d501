"""Sharded weights follow the single process on plain tensors: trajectories, state, memory, number of collectives.

Every run holds many weights of many placements in one optimizer, of sizes that leave uneven and empty shards.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from distributed_cases import (
    Collectives,
    Weights,
    assert_close,
    assert_ranks_agree,
    assert_same_bits,
    gradient_of,
    local,
    needs_uneven_strides,
    sharded,
)
from distributed_harness import run
from torch.distributed.device_mesh import init_device_mesh

from apollo_triton.core.geometry import Geometry

APOLLO = {"rank": 2, "update_proj_gap": 4, "weight_decay": 0.05}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 16.0, "update_proj_gap": 4, "distribution": "rademacher"}
SIGNS = {"rank": 2, "distribution": "rademacher", "update_proj_gap": 5, "scale": 2.0, "proj_type": "left"}
RIGHT = {"rank": 2, "proj_type": "right", "update_proj_gap": 4, "disable_nl": True}
REVERSED = {"rank": 3, "proj_type": "reverse_std", "scale_type": "tensor", "update_proj_gap": 4, "weight_decay": 0.1,
            "scale": "auto"}  # fmt: skip
LARGE = {"rank": 16, "scale": "auto", "update_proj_gap": 4, "seed_per_param": True}

SHAPES = {
    "tall": ((10, 3), APOLLO),
    "wide": ((3, 10), APOLLO),
    "square": ((7, 7), MINI),
    "flat": ((2, 7), MINI),
    "narrow": ((7, 2), MINI),
    "column": ((9, 1), {**MINI, "rank": 1}),
    "left": ((10, 3), SIGNS),
    "left_wide": ((3, 10), SIGNS),
    "right": ((3, 10), RIGHT),
    "reversed": ((10, 5), REVERSED),
    "reversed_odd": ((9, 5), REVERSED),  # the first of two shards has the shape of the other's, and not its width
    "large": ((33, 18), LARGE),
    "large_wide": ((18, 21), LARGE),
    "experts": ((3, 6, 4), APOLLO),
    "experts_wide": ((2, 3, 7), MINI),
    "one_expert": ((1, 5, 4), APOLLO),
    "conv": ((6, 3, 2, 2), APOLLO),
    "bias": ((5,), {}),
    "gain": ((1,), {}),
    "embedding": ((33, 6), {"weight_decay": 0.1}),
}
SHORT, LONG = 12, 30  # steps: across the first refresh, and across two or more


# Of each kind one: what ``make test`` looks at where a shape matters little.
FEW = ("tall", "wide", "flat", "left", "large_wide", "experts", "bias", "embedding")
FEW_CUTS = ("0r", "r1", "01", "11", "00")


def few_cases_of(dims: int) -> dict:
    """Those of ``cases_of`` for the shapes in FEW; on a mesh of two dimensions all shapes at the cuts in FEW_CUTS."""
    if dims == 1:
        return {name: case for name, case in cases_of(1).items() if name.rsplit("_", 1)[0] in FEW}
    return {name: case for name, case in cases_of(2).items() if case[2] in (*FEW_CUTS, "plain")}


def cases_of(dims: int) -> dict:
    """Every shape at every placement on a mesh of so many dimensions, and as a plain tensor."""
    cases = {}
    for name, (shape, group) in SHAPES.items():
        letters = [str(dim) for dim in range(1 if name == "conv" else len(shape))] + ["r"]
        cuts = letters if dims == 1 else [first + second for first in letters for second in letters]
        if dims == 2 and len(shape) == 3:  # 16 of them; the pairs that differ in kind are enough
            cuts = ["0r", "r1", "r2", "01", "02", "12", "21", "11", "00"]
        if name == "one_expert":  # cut along its dimension of length 1 it may be refused: see the test of that
            cuts = [cut for cut in cuts if "0" not in cut]
        cases |= {f"{name}_{cut}": (shape, group, cut) for cut in [*cuts, "plain"]}
    return cases


def placed(mesh_shape, cases, steps, options):
    """On a rank: the gathered end, and what this rank itself holds."""
    model = Weights(cases, init_device_mesh("cpu", mesh_shape), **options).train_for(steps)
    kinds, sizes = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in model.optimizer.state[parameter].items():
            kinds[f"{name}.{key}"] = type(value).__name__, getattr(value, "device", None), getattr(value, "dtype", None)
            if isinstance(value, torch.Tensor):
                sizes[f"{name}.{key}"] = tuple(value.shape), local(value).numel()
    return {"values": model.everything(), "kinds": kinds, "sizes": sizes, "norm": model.optimizer.gradient_norm}


def cases_for(mesh_shape, steps):
    """All cases; of a mesh of two dimensions in ``make test`` few."""
    return few_cases_of(2) if len(mesh_shape) == 2 and steps == SHORT else cases_of(len(mesh_shape))


@cache
def alone(dims, steps):
    """The single process on plain tensors: what everything here must be equal to."""
    return Weights(cases_for((1,) * dims, steps)).train_for(steps).everything()


full, slow = pytest.mark.full, pytest.mark.slow
MESHES = [
    pytest.param((2,), SHORT, marks=slow),
    pytest.param((2, 2), SHORT, marks=[slow, needs_uneven_strides]),
    *(pytest.param(mesh_shape, LONG, marks=full) for mesh_shape in [(1,), (2,), (3,), (4,), (1, 3)]),
    pytest.param((2, 2), LONG, marks=[full, needs_uneven_strides]),
]


@pytest.mark.parametrize(("mesh_shape", "steps"), MESHES, ids=str)
def test_a_mesh_follows_the_single_process(mesh_shape, steps):
    """Geometry or the width of an auto scale from a local shape, P sliced at a wrong offset, a sum left out or taken
    twice, padding of uneven or empty shards counted, a refresh at another step, one weight's part taken for another's;
    and what the checks name."""
    cases = cases_for(mesh_shape, steps)
    results = run(
        placed, torch.Size(mesh_shape).numel(), mesh_shape=mesh_shape, cases=cases, steps=steps, options={}, timeout=200
    )
    check_ranks_agree(results)
    assert_close(results[0]["values"], alone(len(mesh_shape), steps), 1e-6, f"mesh {mesh_shape}")
    check_kinds(results, cases)
    check_memory(results, cases, mesh_shape)


def check_ranks_agree(results):
    """Replicas that sum in another order, or each decide alone, and drift apart over a long run."""
    assert_ranks_agree([result["values"] for result in results])


def check_kinds(results, cases):
    """Moments in a dtype or on a device of their own, or plain tensors, of which torch.distributed.checkpoint would
    save a different one under the same name from each rank."""
    for result in results:
        for name, (shape, group, cut) in cases.items():
            kind = "Tensor" if cut == "plain" else "DTensor"
            keys = ["exp_avg", "exp_avg_sq", *(["update_norm"] if group.get("rank") else [])]
            for key in keys:
                assert result["kinds"][f"{name}.{key}"] == (kind, torch.device("cpu"), torch.float32), f"{name}.{key}"
            assert result["kinds"][f"{name}.step"] == ("Tensor", torch.device("cpu"), torch.float32), name
            if group.get("rank"):
                assert result["kinds"][f"{name}.seed"][0] == "int", name
                geometry = Geometry.of(shape, group.get("proj_type", "std"))
                experts = (geometry.matrices,) if geometry.matrices > 1 else ()
                full = (*experts, geometry.channels, group["rank"])
                assert result["sizes"][f"{name}.exp_avg"][0] == full, name
                assert result["sizes"][f"{name}.exp_avg_sq"][0] == full, name


def check_memory(results, cases, mesh_shape):
    """Moments of a weight that is cut along its projected dimension, whole on every rank: the memory APOLLO saves."""
    for name, (shape, group, cut) in cases.items():
        if not group.get("rank"):
            continue
        letters = cut if cut != "plain" else "r" * len(mesh_shape)
        cuts = [size for size, letter in zip(mesh_shape, letters, strict=True) if letter != "r"]
        ranks = torch.Size(cuts).numel()
        replicas = torch.Size(mesh_shape).numel() // ranks
        geometry = Geometry.of(shape, group.get("proj_type", "std"))
        share = geometry.matrices * -(-geometry.channels // ranks)
        if len(shape) == 3 and "0" in cut:  # the experts are shared out, by one mesh dimension or by both
            sizes = [size for size, letter in zip(mesh_shape, cut, strict=True) if letter == "0"]
            parts = torch.Size(sizes).numel()
            share = -(-geometry.matrices // parts) * -(-geometry.channels // (ranks // parts))
        for key in ("exp_avg", "exp_avg_sq"):
            held = [result["sizes"][f"{name}.{key}"][1] for result in results]
            assert max(held) <= share * group["rank"], f"{name}.{key}: {held}"
            everything = geometry.matrices * geometry.channels * group["rank"]
            assert sum(held) == replicas * everything, f"{name}.{key}: {held}"


OPTIONS = [
    {"max_grad_norm": 0.05},
    {"max_grad_norm": 1e6, "scale_front": True, "correct_bias": False},
    {"state_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "mesh_shape", [pytest.param((2,), marks=slow), pytest.param((2, 2), marks=[full, needs_uneven_strides])], ids=str
)
def test_options_of_the_constructor(mesh_shape, options):
    """A norm over local shards alone, a replica counted twice in it, options that the sharded path forgets."""
    cases = cases_of(2) if len(mesh_shape) == 2 else few_cases_of(1)
    world = torch.Size(mesh_shape).numel()
    results = run(placed, world, mesh_shape=mesh_shape, cases=cases, steps=12, options=options)
    assert_ranks_agree([result["values"] | {"norm": result["norm"]} for result in results])
    expected = Weights(cases, **options).train_for(12)
    if "state_dtype" in options:  # the random bits of a rounding may belong to a place in the local shard
        dtypes = {name: kind[2] for name, kind in results[0]["kinds"].items() if name.endswith(".exp_avg")}
        assert set(dtypes.values()) == {torch.bfloat16}
        assert_close(dict(list(results[0]["values"].items())[: len(cases)]), expected.weights(), 2e-3, str(options))
        return
    assert_close(results[0]["values"], expected.everything(), 1e-6, str(options))
    total = sum(parameter.grad.double().square().sum() for parameter in expected.parameters()).sqrt()
    torch.testing.assert_close(results[0]["norm"].double(), total, rtol=1e-6, atol=0)


def rounded_on_a_mesh(mesh_shape, backend):
    options = {"backend": backend, "state_dtype": torch.bfloat16, "stochastic_rounding": True}
    model = Weights(ROUNDED_CASES, init_device_mesh("cpu", mesh_shape), **options)
    return model.bfloat16().train_for(3).everything()


ROUNDED_CASES = {"rows": ((16, 64), {}, "0"), "vector": ((24,), {}, "0"), "experts": ((3, 6, 4), APOLLO, "0")}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_shard_rounds_as_its_place_in_the_whole_does(backend):
    """Random bits that belong to a place in the local shard: ranks would round alike."""
    pytest.importorskip("triton")
    results = run(rounded_on_a_mesh, 3, mesh_shape=(3,), backend=backend)
    options = {"backend": backend, "state_dtype": torch.bfloat16, "stochastic_rounding": True}
    expected = Weights(ROUNDED_CASES, **options).bfloat16().train_for(3).everything()
    for name, value in results[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected[name])), name


def through_the_kernels(mesh_shape, cases, steps):
    model = Weights(cases, init_device_mesh("cpu", mesh_shape), backend="triton").train_for(steps)
    return model.everything()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, and do not take CPU tensors")
@pytest.mark.parametrize(
    "mesh_shape",
    [pytest.param((2,), marks=slow), pytest.param((2, 2), marks=[full, needs_uneven_strides]),
     pytest.param((3,), marks=full)],
    ids=str,
)  # fmt: skip
def test_kernels_follow_the_reference_of_a_single_process(mesh_shape):
    """Strides, addresses or widths of local shards taken for those of the whole weight, P made from index 0 on every
    rank."""
    pytest.importorskip("triton")
    gap = {"update_proj_gap": 2}
    cuts = {1: ["0", "1"], 2: ["01", "10", "r0"]}[len(mesh_shape)]
    steps = 3 if mesh_shape == (2,) else 4  # a refresh at the third
    cases = {
        f"{name}_{cut}": (shape, group | gap, cut)
        for name, shape, group in [
            ("tall", (10, 3), APOLLO),
            ("flat", (2, 7), MINI),
            ("signs", (3, 10), SIGNS),
            ("large", (19, 18), LARGE),
            ("experts", (3, 4, 3), APOLLO),
        ]
        for cut in cuts
    } | {"bias": ((5,), {}, "0" * len(mesh_shape)), "plain": ((10, 3), APOLLO | gap, "plain")}
    world = torch.Size(mesh_shape).numel()
    results = run(through_the_kernels, world, mesh_shape=mesh_shape, cases=cases, steps=steps, timeout=240)
    assert_ranks_agree(results)
    assert_close(results[0], Weights(cases, backend="reference").train_for(steps).everything(), 2e-6, str(mesh_shape))


def counted(mesh_shape, cases, options):
    """Collectives by group in each of eight steps, a refresh among them."""
    model = Weights(cases, init_device_mesh("cpu", mesh_shape), **options)
    counts = []
    for _ in range(8):
        model.set_gradients()
        with Collectives() as collectives:
            model.optimizer.step()
        model.steps += 1
        counts.append(dict(collectives.counts))
    return counts


@pytest.mark.parametrize(
    ("mesh_shape", "options"),
    [
        pytest.param((2,), {"max_grad_norm": 0.1}, marks=slow),
        pytest.param((2, 2), {}, marks=slow),
        pytest.param((2,), {}, marks=full),
        pytest.param((2, 2), {"max_grad_norm": 0.1}, marks=full),
    ],
    ids=str,
)
def test_two_collectives_a_step_and_mesh_dimension(mesh_shape, options):
    """A collective a weight or a group: latency that grows with the model. An agreement check at every step."""
    cases = {name: case for name, case in few_cases_of(len(mesh_shape)).items() if name.rsplit("_", 1)[0] in FEW}
    for counts in run(counted, torch.Size(mesh_shape).numel(), mesh_shape=mesh_shape, cases=cases, options=options):
        assert sum(counts[0].values()) > 0, "the harness saw nothing"
        for step, groups in enumerate(counts[1:], 2):
            assert sum(groups.values()) <= 2 * len(mesh_shape), f"step {step}: {groups}"
            assert max(groups.values()) <= 2, f"step {step}: {groups}"


@pytest.mark.parametrize("cut", ["0", "1"])
def test_a_weight_that_is_whole_in_one_place_needs_nothing(cut):
    """Collectives for weights that no rank shares: a mesh of one rank, and plain tensors beside DTensors."""
    alone_in_mesh = run(counted, 1, mesh_shape=(1,), cases={"w": ((7, 3), APOLLO, cut)}, options={})[0]
    assert [sum(step.values()) for step in alone_in_mesh[1:]] == [0] * 7


def one_matrix_cut_along_its_experts():
    try:
        model = Weights({"w": ((1, 5, 4), APOLLO, "0")}, init_device_mesh("cpu", (2,)))
    except ValueError as error:
        return str(error)
    return model.train_for(12).everything()


def test_one_expert_cut_along_the_experts_works_or_is_refused():
    """A weight [1, rows, columns] whose whole matrix lies on one rank: state for it on a rank without elements."""
    results = run(one_matrix_cut_along_its_experts, 2)
    if isinstance(results[0], str):
        assert all("parameter 0 ('w') of shape (1, 5, 4)" in result for result in results)
    else:
        assert_close(results[0], Weights({"w": ((1, 5, 4), APOLLO, "plain")}).train_for(12).everything(), 1e-6, "one")


def stopped_and_changed(cases):
    """A weight frozen for some steps, then trained again; another one gets new keys in its group."""
    model = Weights(cases, init_device_mesh("cpu", (2,)))
    return _changing(model)


def _changing(model):
    model.train_for(3)
    frozen = next(iter(model.cases))
    for _ in range(3):
        model.set_gradients()
        getattr(model, frozen).grad = None
        model.optimizer.step()
        model.steps += 1
    model.optimizer.param_groups[0]["lr"] = 3e-3
    model.train_for(6)
    return model.everything()


@pytest.mark.slow
def test_missing_gradients_and_schedules_keep_the_sharing_right():
    """A plan of what is sent where, kept while a gradient is gone: parts of one weight added to another's."""
    cases = few_cases_of(1)
    results = run(stopped_and_changed, 2, cases=cases)
    assert_ranks_agree(results)
    assert_close(results[0], _changing(Weights(cases)), 1e-6, "after a pause")


def summands(full, cut, mesh):
    """``full`` as a DTensor of one placement a mesh dimension; where it is partial, the ranks' parts are unequal."""
    for dim, letter in enumerate(cut):
        if letter == "p":
            size = mesh.size(dim)
            full = full * (mesh.get_local_rank(dim) + 1) / (size * (size + 1) / 2)
    return sharded(full, mesh, cut)


def gradients_elsewhere(mesh_shape, cases, cut, steps):
    """Weights whose gradients have placements of their own; and the collectives of each step, one group's at most."""
    mesh = init_device_mesh("cpu", mesh_shape)
    model, counts = Weights(cases, mesh), []
    for _ in range(steps):
        model.set_gradients()
        for name, parameter in model.named_parameters():
            parameter.grad = summands(gradient_of(name, cases[name][0], model.steps + 1), cut, mesh)
        with Collectives() as collectives:
            model.optimizer.step()
        counts.append(max(collectives.counts.values(), default=0))
        model.steps += 1
    return model.everything(), counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh_shape", "weight_cut", "cut"),
    [
        ((2,), "0", "r"),
        pytest.param((2,), "r", "p", marks=full),
        pytest.param((3,), "1", "p", marks=full),
        ((2, 2), "0r", "pp"),
        pytest.param((2, 2), "01", "rp", marks=needs_uneven_strides),
    ],
)
def test_gradients_of_other_placements_are_brought_into_line(mesh_shape, weight_cut, cut):
    """A replicated gradient taken for a local shard's; partial sums (norms between sequence-parallel activations) taken
    for the whole, added twice on the second step, or reduced by a collective a weight."""
    shapes = {"tall": ((10, 3), APOLLO), "wide": ((3, 10), APOLLO), "square": ((7, 7), MINI), "table": ((9, 4), {})}
    cases = {name: (shape, group, weight_cut) for name, (shape, group) in shapes.items()}
    world = torch.Size(mesh_shape).numel()
    results = run(gradients_elsewhere, world, mesh_shape=mesh_shape, cases=cases, cut=cut, steps=8)
    assert_ranks_agree([values for values, _ in results])
    assert_close(results[0][0], Weights(cases).train_for(8).everything(), 1e-6, cut)
    for _, counts in results:
        assert max(counts[1:]) <= 2 + ("p" in cut), counts  # the all-reduce that backward left out


def gradients_of_another_mesh():
    cases = {"w": ((8, 3), APOLLO, "0")}
    model = Weights(cases, init_device_mesh("cpu", (2,)))
    model.w.grad = sharded(torch.ones(8, 3), init_device_mesh("cpu", (2, 1)), "0r")
    try:
        model.optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def test_gradients_of_another_mesh_are_refused():
    """Local shards of two meshes, which may be of the same shape and of different rows."""
    for text in run(gradients_of_another_mesh, 2, patience=20):
        assert "parameter 0 ('w')" in text
        assert "another device mesh" in text


def cut_and_gathered():
    mesh = init_device_mesh("cpu", (2, 2))
    full = torch.arange(33 * 6, dtype=torch.float32).view(33, 6)
    return {cut: sharded(full, mesh, cut).full_tensor() for cut in ("00", "01", "10", "0r", "r1", "rr")}


def test_the_harness_cuts_like_pytorch():
    """Placements of the harness that are not PyTorch's would make every test above prove something else."""
    full = torch.arange(33 * 6, dtype=torch.float32).view(33, 6)
    for result in run(cut_and_gathered, 4):
        assert_same_bits(result, dict.fromkeys(result, full), "gathered")


@pytest.mark.parametrize("steps", [SHORT, pytest.param(LONG, marks=full)])
def test_the_steps_cross_refreshes_and_move_far(steps):
    """Tolerances that are wide beside what the weights moved, or a run that never refreshes, prove nothing."""
    start, end = Weights(cases_of(1)).weights(), alone(1, steps)
    far = Weights({name: (shape, {**group, "update_proj_gap": 200} if group.get("rank") else group, cut)
                   for name, (shape, group, cut) in cases_of(1).items()}).train_for(steps).weights()  # fmt: skip
    for name, (_, group, _) in cases_of(1).items():
        assert (end[name] - start[name]).norm() > 1e-2 * start[name].norm(), name
        if group.get("rank"):
            assert (end[name] - far[name]).norm() > 1e-4 * end[name].norm(), name
