"""The fused step as a whole: any layout and dtype, plans kept and given up in time, mixed backends, torch.compile."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from kernel_cases import (
    DEVICE,
    MINI,
    drawn,
    kernels_everywhere,
    new_gradients,
    optimizer_of,
    parameters_of,
    state_tensors,
    train,
)
from tiers import pairs, tiers, values
from torch import nn

pytest.importorskip("triton")

from apollo_triton import APOLLOAdamW
from apollo_triton.core import gpu
from apollo_triton.core.device_backend import Backend

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


def assert_close_to_reference(ours, theirs, start):
    """Both are one rounding of the same float32 arithmetic, up to the order of sums."""
    for mine, other, first in zip(ours, theirs, start, strict=True):
        if mine.dtype == torch.float32:
            moved = (other - first).norm()
            assert (mine - other).norm() <= 1e-5 * moved + 2**-23 * first.norm()
        else:  # where the two fall to different sides of a rounding boundary, one ulp and rarely
            differ = mine != other
            assert differ.double().mean() <= 0.005 + 1 / mine.numel()
            ulp = torch.finfo(mine.dtype).eps * other.abs().float().clamp(min=1e-3)
            assert torch.all((mine.float() - other.float()).abs() <= 2 * ulp)


def both(parameters, **options):
    start = [each.detach().clone() for each in parameters]
    ours, optimizer = train(parameters, **options)
    theirs, reference = train(parameters, backend="reference", **options)
    assert_close_to_reference([x.detach() for x in ours], [x.detach() for x in theirs], start)
    for mine, other in zip(ours, theirs, strict=True):
        states = state_tensors(optimizer, mine), state_tensors(reference, other)
        assert states[0].keys() == states[1].keys()
        for name, value in states[0].items():
            assert value.dtype == states[1][name].dtype
            tolerance = 2**-7 if value.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(value, states[1][name], rtol=tolerance, atol=1e-6)
    return optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtypes", "group"),
    values(
        [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.bfloat16),
        ],
        [MINI, {"rank": 17}, {"rank": 3, "weight_decay": 0.1}, {"rank": 2, "proj": "svd"}],
    ),
)
def test_dtypes_and_mixtures(dtypes, group):
    """A tensor read or written as another's dtype."""
    weight_dtype, gradient_dtype = dtypes
    both(parameters_of([(72, 40), (40, 72), (33, 21)], weight_dtype, gradient_dtype=gradient_dtype), **group)


def test_norms_of_columns_as_sums_of_squares(monkeypatch):
    """As sm_80 adds them up: squares in half precision, which overflow, or those of the other side."""
    monkeypatch.setattr(gpu, "capability", lambda device: (8, 0))
    norms = []
    for backend in ("triton", "reference"):
        weight = nn.Parameter(drawn((20, 72), 0, torch.float16))
        weight.grad = drawn((20, 72), 1, torch.float16, 500.0)
        optimizer = optimizer_of([weight], backend=backend, rank=17, proj_type="left")
        optimizer.step()
        norms.append(optimizer.state[weight]["update_norm"])
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", tiers([19, 70, 300], (19, 70).__contains__))
def test_ranks_above_the_width(rank):
    """Blocks of ranks that are masked by the width, a projection cut to it."""
    both(parameters_of([(24, 18), (18, 24), (5, 1)]), rank=rank, rank_above_width=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "scale_type", "turned"),
    tiers(
        itertools.product((256, 257, 320), ("channel", "tensor"), (False, True)),
        lambda *case: case in ((256, "tensor", True), (257, "channel", False)),
    ),
)
def test_large_ranks(rank, scale_type, turned):
    """On both sides of the largest rank that one launch takes."""
    width = max(264, rank + 16)
    both(
        parameters_of([(width, 3) if turned else (5, width)]), rank=rank, proj_type="reverse_std", scale_type=scale_type
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 18])
def test_stochastic_rounding_takes_the_references_bits(rank):
    constructor = {"stochastic_rounding": True, "state_dtype": torch.bfloat16}
    parameters = parameters_of([(72, 40), (40, 72), (2, 33, 21)], torch.bfloat16)
    ours, _ = train(
        parameters, [parameters_of([(600,)], torch.bfloat16)[0]], steps=1, rank=rank, constructor=constructor
    )
    theirs, _ = train(
        parameters,
        [parameters_of([(600,)], torch.bfloat16)[0]],
        steps=1,
        rank=rank,
        constructor=constructor,
        backend="reference",
    )
    for mine, other in zip(ours, theirs, strict=True):
        # A float32 sum that differs in its last bit changes one rounding in 2**16.
        assert (mine != other).double().mean() <= 2e-3


LAYOUTS = {
    "transposed": lambda values: values.t().contiguous().t(),
    "every second column": lambda values: values.repeat_interleave(2, dim=1)[:, ::2],
    "rows of a wider matrix": lambda values: torch.cat((values, values), 1)[:, : values.shape[1]],
    "at an odd address": lambda values: torch.cat((values.new_zeros(3), values.flatten()))[3:].view(values.shape),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "group", "of"), pairs(LAYOUTS, [MINI, {"rank": 3}, {"rank": 17}, {}], ["weight", "gradient", "both"])
)
def test_any_layout_gives_the_result_of_a_plain_one(layout, group, of):
    for shape in ((70, 40), (40, 72)):
        start, gradients = drawn(shape, 0), [drawn(shape, 1, scale=1e-2)]
        results = []
        for change in (LAYOUTS[layout], torch.clone):
            weight = nn.Parameter(change(start) if of != "gradient" else start.clone())
            optimizer = optimizer_of([weight], **group) if group else optimizer_of([], [weight])
            for gradient in gradients:
                weight.grad = change(gradient) if of != "weight" else gradient.clone()
                optimizer.step()
            results.append(weight.detach())
        if DEVICE == "cpu":
            assert torch.equal(*results)
        else:  # loads of another width are added up in another order
            moved = (results[1] - start).norm()
            assert (results[0] - results[1]).norm() <= 1e-6 * moved


@pytest.mark.parametrize(
    ("shape", "memory_format", "group"),
    tiers(
        [
            (shape, memory_format, group)
            for shape in ((3, 24, 16), (8, 3, 2, 2), (8, 2, 2, 1, 2))
            for memory_format in ("rows", "channels last", "permuted")
            for group in ({"rank": 2}, {})
        ],
        lambda shape, memory_format, group: "rank" in group or memory_format == "permuted",
    ),
)
def test_experts_and_convolutions(shape, memory_format, group):
    def changed(values):
        if memory_format == "rows":
            return values
        if memory_format == "permuted":
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats[values.dim()]) if values.dim() in formats else values

    results = []
    for backend in ("triton", "reference"):
        weight = nn.Parameter(changed(drawn(shape, 0)))
        optimizer = (
            optimizer_of([weight], backend=backend, **group) if group else optimizer_of([], [weight], backend=backend)
        )
        for step in (1, 2):
            weight.grad = changed(drawn(shape, step, scale=1e-2))
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (1, 7), (7, 1), (1,), (), (0,)])
def test_empty_and_tiny_parameters(shape):
    rest = parameters_of([(24, 16)])
    tiny = nn.Parameter(drawn(shape, 0))
    group = [{"params": [tiny, *rest], "rank": 1}]
    optimizers = []
    for backend in ("triton", "reference"):
        copies = [nn.Parameter(each.detach().clone()) for each in group[0]["params"]]
        optimizers.append((copies, APOLLOAdamW([{"params": copies, "rank": 1}], lr=1e-2, backend=backend)))
        for step in range(2):
            new_gradients(copies, step)
            optimizers[-1][1].step()
        assert optimizers[-1][1].state[copies[0]]["step"] == 2
    for mine, other in zip(optimizers[0][0], optimizers[1][0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_nothing_to_do():
    optimizer = optimizer_of(parameters_of([(8, 8)]), rank=1)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.skipped_updates == 0
    assert optimizer.gradient_norm is None


def test_a_step_keeps_no_gradient_alive():
    weights, dense = parameters_of([(24, 16), (8, 3, 2, 2)]), parameters_of([(8,)])
    optimizer = optimizer_of(weights, dense, rank=2)
    optimizer.step()
    watched = [weakref.ref(each.grad) for each in weights + dense]
    optimizer.zero_grad()
    gc.collect()
    assert all(each() is None for each in watched)


def events():
    """What may happen between steps, each on (parameters, optimizer, step)."""

    def new_address(parameters, optimizer, step):
        new_gradients(parameters, step)

    def same_address(parameters, optimizer, step):
        for offset, parameter in enumerate(parameters):
            parameter.grad.copy_(drawn(parameter.shape, step * 1000 + offset, scale=1e-2))

    def weight_moves(parameters, optimizer, step):
        new_gradients(parameters, step)
        parameters[0].data = parameters[0].data.clone()

    def state_moves(parameters, optimizer, step):
        new_gradients(parameters, step)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameters[1]][name] = optimizer.state[parameters[1]][name].clone()

    def state_is_cleared(parameters, optimizer, step):
        new_gradients(parameters, step)
        optimizer.state.clear()

    def weight_turns_where_it_is(parameters, optimizer, step):
        parameters[3].data = parameters[3].data.t()
        new_gradients(parameters, step)

    def state_is_another_dictionary(parameters, optimizer, step):
        new_gradients(parameters, step)
        optimizer.state[parameters[0]] = dict(optimizer.state[parameters[0]])

    def steps_memory_is_another(parameters, optimizer, step):
        new_gradients(parameters, step)
        state = optimizer.state[parameters[0]]
        assert state["step"] == step + 1
        optimizer.__dict__.setdefault("kept", []).append(state["step"].data)  # which a plan could go on writing to
        state["step"].data = state["step"].data.clone()

    def step_is_set(parameters, optimizer, step):
        new_gradients(parameters, step)
        optimizer.state[parameters[0]]["step"].fill_(40)

    def one_has_no_gradient(parameters, optimizer, step):
        new_gradients(parameters, step)
        if step % 2:
            parameters[0].grad = None

    def a_group_joins(parameters, optimizer, step):
        if step == 1:
            parameters.append(nn.Parameter(drawn((24, 16), 5)))
            optimizer.add_param_group({"params": [parameters[-1]], "rank": 2, "update_proj_gap": 2})
        new_gradients(parameters, step)

    def options_change(parameters, optimizer, step):
        new_gradients(parameters, step)
        optimizer.param_groups[0].update(lr=0.1 / (step + 1), weight_decay=0.1 * step, disable_nl=bool(step % 2))

    def gradient_is_transposed(parameters, optimizer, step):
        new_gradients(parameters, step)
        if step % 2:
            parameters[0].grad = parameters[0].grad.t().contiguous().t()

    def checkpoint(parameters, optimizer, step):
        new_gradients(parameters, step)
        optimizer.load_state_dict(optimizer.state_dict())

    return {name: value for name, value in locals().items() if callable(value)}


# At rank 16 P is in memory as well: what moves a weight, its state, or the epoch.
AT_RANK_16 = ("state_is_cleared", "step_is_set")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "rank"),
    tiers(
        [(event, rank) for rank in (2, 16) for event in events()], lambda event, rank: rank == 2 or event in AT_RANK_16
    ),
)
def test_a_plan_is_given_up_when_it_no_longer_holds(event, rank):
    """Against the reference path, which has no tables."""
    results = []
    for backend in ("triton", "reference"):
        parameters = [
            nn.Parameter(each.detach().clone())
            for each in parameters_of([(24, 16), (24, 16), (16, 24), (16, 16), (5,)])
        ]
        optimizer = APOLLOAdamW(
            [{"params": parameters[:4], "rank": rank, "update_proj_gap": 2}, {"params": parameters[4:]}],
            lr=1e-2,
            backend=backend,
        )
        new_gradients(parameters, 99)
        optimizer.step()
        for step in range(3):
            events()[event](parameters, optimizer, step)
            optimizer.step()
        results.append([*parameters, *(optimizer.state[each]["step"] for each in parameters)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=1e-6)


def test_a_plan_is_kept_and_tables_are_left_alone_while_gradients_stay(monkeypatch):
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    weights, dense = parameters_of([(24, 16), (16, 24)]), parameters_of([(8,)])
    optimizer = optimizer_of(weights, dense, rank=2)
    optimizer.step()
    plan = optimizer._engine._plan
    copied = []
    tables = plan.tables
    for table in tables:
        monkeypatch.setattr(table, "_pinned", lambda values: copied.append(values) or values)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert optimizer._engine._plan is plan
    assert copied == []
    old = weights[0].grad
    weights[0].grad = old.clone()
    optimizer.step()
    assert optimizer._engine._plan is plan
    assert len(copied) == 1  # one vector of addresses, of the one table


@pytest.mark.slow
def test_a_step_inside_torch_compile(monkeypatch):
    with kernels_everywhere(monkeypatch):
        results = []
        for compiled in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).to(DEVICE)
            low_rank = [model[0].weight, model[2].weight]
            optimizer = optimizer_of(low_rank, [model[0].bias, model[2].bias], rank=4)
            inputs = drawn((4, 16), 0)

            def training_step(model=model, optimizer=optimizer, inputs=inputs):
                optimizer.zero_grad()
                loss = model(inputs).square().mean()
                loss.backward()
                optimizer.step()
                return loss

            step = torch.compile(training_step, backend="eager") if compiled else training_step
            losses = [step().item() for _ in range(4)]
            assert losses[-1] < losses[0]
            results.append([*losses, *(each.detach() for each in model.parameters())])
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [3, 16])
def test_groups_of_one_seed_and_rank_have_the_projection_of_their_own_distribution(rank):
    """They would share what is in memory, were it known by seed, rank and width alone."""
    ends = []
    for backend in ("triton", "reference"):
        weights = parameters_of([(40, 24)] * 2)
        kinds = ("gaussian", "rademacher")
        groups = [{"params": [w], "rank": rank, "distribution": kind} for w, kind in zip(weights, kinds, strict=True)]
        optimizer = APOLLOAdamW(groups, lr=0.01, backend=backend)
        for step in range(3):
            new_gradients(weights, step)
            optimizer.step()
        ends.append([each.detach() for each in weights])
    assert_close_to_reference(*ends, [each.detach() for each in parameters_of([(40, 24)] * 2)])


def test_backends_can_be_mixed_in_one_optimizer():
    weights = parameters_of([(24, 16), (24, 16), (8,)])
    groups = [
        {"params": weights[:1], "rank": 2, "backend": "triton"},
        {"params": weights[1:2], "rank": 2, "backend": "reference"},
        {"params": weights[2:], "backend": "triton"},
    ]
    optimizer = APOLLOAdamW(groups, lr=1e-2, max_grad_norm=0.05)
    reference = APOLLOAdamW(
        [{**group, "backend": "reference", "params": [nn.Parameter(each.detach().clone()) for each in group["params"]]}
         for group in groups],
        lr=1e-2,
        max_grad_norm=0.05,
    )  # fmt: skip
    theirs = [each for group in reference.param_groups for each in group["params"]]
    for step in range(3):
        new_gradients(weights, step)
        new_gradients(theirs, step)
        weights[0].grad[0, 0] = theirs[0].grad[0, 0] = float("nan") if step == 1 else 0.0
        optimizer.step()
        reference.step()
    for mine, other in zip(weights, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.gradient_norm, reference.gradient_norm, rtol=1e-6, atol=0)
    assert optimizer.skipped_updates == reference.skipped_updates == 1


def test_asking_for_kernels_where_there_are_none_says_why(monkeypatch):
    monkeypatch.setattr("apollo_triton.core.device_backend.interpreting", lambda: False)
    (weight,) = [nn.Parameter(torch.ones(8, 8, device="cpu"))]
    weight.grad = torch.ones(8, 8, device="cpu")
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 1}], backend="triton")
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(8, 8\): backend=\"triton\" .*it is on cpu"):
        optimizer.step()
    assert not optimizer.state
    with pytest.raises(ValueError, match="it is on cpu"):
        optimizer.backend_for(weight)
    assert APOLLOAdamW([weight]).backend_for(weight) == Backend(
        "reference", "it is on cpu, and the kernels need a CUDA, ROCm or XPU device"
    )
