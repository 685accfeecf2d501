"""APOLLOAdamW against a second implementation in float64: every option, dtype, orientation and shape."""

from __future__ import annotations

import itertools

import pytest
import torch
from drawn_tensors import gradients_for, normals
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import OracleMatrix, oracle_adamw
from tiers import pairs

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.reference import verbs as reference

pytestmark = pytest.mark.usefixtures("backend")
# Hypothesis' examples, of ``make test`` and of ``make test-all``: Triton's interpreter takes about a second for one.
FEW = {"reference": 60, "interpreter": 8, "cuda": 60}
MANY = {"reference": 200, "interpreter": 60, "cuda": 200}
EXAMPLES = pytest.mark.parametrize(
    "count", [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.full)]
)

GROUP = st.fixed_dictionaries(
    {
        "proj_type": st.sampled_from(["std", "reverse_std", "right", "left"]),
        "scale_type": st.sampled_from(["channel", "tensor"]),
        "scale": st.sampled_from([1.0, 0.25, 128.0, "auto"]),
        "scale_front": st.booleans(),
        "disable_nl": st.booleans(),
        "correct_bias": st.booleans(),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "distribution": st.sampled_from(["gaussian", "rademacher"]),
        "update_proj_gap": st.integers(1, 4),
        "seed": st.integers(0, 2**32 - 1),
        "lr": st.sampled_from([1e-2, 1e-4]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.95, 0.95)]),
        "eps": st.sampled_from([1e-6, 1e-3]),
    }
)


def strided(values, layout):
    """The same values, laid out row by row, column by column, or with gaps."""
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "gaps":
        return values.repeat_interleave(2, dim=1)[:, ::2]
    return values.contiguous()


@EXAMPLES
@pytest.mark.slow
def test_trajectory_is_the_oracles(backend, count):
    """An option, a shape, a dtype or a layout that one of the two implementations takes otherwise than the paper."""
    is_short = backend == "interpreter" and count is FEW
    side = st.integers(1, 24 if is_short else 70)
    examples = given(
        shape=st.tuples(side, side),
        steps=st.just(3 if is_short else 6),
        rank=st.integers(1, 20),
        options=GROUP,
        layouts=st.tuples(*[st.sampled_from(["rows", "transposed", "gaps"])] * 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        seed=st.integers(0, 10**6),
    )
    settings(max_examples=count[backend], deadline=None)(examples(follow_the_oracle))()


def follow_the_oracle(shape, steps, rank, options, layouts, dtype, seed):
    gradients = [gradient.to(dtype) for gradient in gradients_for(shape, steps, seed)]
    start = normals(shape, seed + 1).to(dtype)
    keeps_rows = {"std": shape[0] >= shape[1], "reverse_std": shape[0] < shape[1], "right": True, "left": False}
    rank = min(rank, shape[1] if keeps_rows[options["proj_type"]] else shape[0])
    oracle = OracleMatrix(start, rank, **options)
    weight = torch.nn.Parameter(strided(start.clone(), layouts[0]))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": rank, **options}])
    for gradient in gradients:
        oracle.step(gradient)
        if dtype != torch.float32:
            oracle.weight = oracle.weight.to(dtype).double()  # rounded once, at the store
        weight.grad = strided(gradient, layouts[1])
        optimizer.step()
    moved = (oracle.weight - start.double()).norm()
    # float32 rounding of w itself (2**-24 of |w| a step, twice with decay); of the update's sums, 1e-5 of it; and of R,
    # 2**-24 of |G| |P|, which is a large part of s where R nearly cancels.
    allowed = 6 * 2 * 2**-24 * start.double().norm() + (1e-5 + 2**-21 * oracle.conditioning) * moved
    if dtype != torch.float32:  # where float32 falls to the other side of a rounding boundary: an ulp, and rarely
        ulp = torch.finfo(dtype).eps * oracle.weight.abs().clamp(min=torch.finfo(dtype).tiny)
        wrong = (weight.detach().double() - oracle.weight).abs() > allowed
        assert wrong.double().mean() <= 0.02 + 1 / weight.numel()
        allowed = allowed + 2 * ulp.norm()
    assert (weight.detach().double() - oracle.weight).norm() <= allowed


@pytest.mark.parametrize(
    ("shape", "scale_type"),
    [
        ((96, 64), "channel"),
        ((64, 96), "tensor"),
        ((1, 40), "channel"),
        ((40, 1), "tensor"),
        *(pytest.param(shape, "channel", marks=pytest.mark.full) for shape in [(64, 96), (344, 128), (40, 1)]),
        *(pytest.param(shape, "tensor", marks=pytest.mark.full) for shape in [(96, 64), (344, 128), (1, 40)]),
    ],
)
def test_one_float32_step_is_exact_to_rounding(shape, scale_type):
    """From the same state, the update differs from float64's by at most 2e-6 of its norm."""
    start = torch.zeros(shape)  # so that w holds the update alone
    rank = min(8, *shape)
    options = {"lr": 1.0, "scale_type": scale_type, "proj_type": "std"}
    oracle = OracleMatrix(start, rank, **options)
    weight = torch.nn.Parameter(start.clone())
    optimizer = APOLLOAdamW([{"params": [weight], "rank": rank, **options}])
    for gradient in gradients_for(shape, 5, 0):
        before, exact_before = weight.detach().clone(), oracle.weight.clone()
        oracle.step(gradient)
        weight.grad = gradient
        optimizer.step()
        exact = oracle.weight - exact_before
        error = (weight.detach().double() - before.double() - exact).norm()
        # 2e-6 for the update, 2**-24 for the rounding of the sum w.
        assert error <= 2e-6 * exact.norm() + 2**-24 * before.double().norm()


@pytest.mark.parametrize(
    ("dtype", "scale_type", "weight_decay", "shape"),
    pairs([torch.bfloat16, torch.float16], ["channel", "tensor"], [0.0, 0.1], [(130, 64), (64, 130)]),
)
def test_half_weights_are_the_float64_update_rounded_once(dtype, scale_type, weight_decay, shape):
    start = normals(shape, 0).to(dtype)
    options = {"lr": 3e-2, "scale_type": scale_type, "weight_decay": weight_decay}
    oracle = OracleMatrix(start, 16, **options)
    weight = torch.nn.Parameter(start.clone())
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 16, **options}])
    for gradient in gradients_for(shape, 4, 1):
        oracle.weight = weight.detach().double()  # the same weights before each step; the state runs on
        oracle.step(gradient.to(dtype))
        weight.grad = gradient.to(dtype)
        optimizer.step()
        wrong = (weight.detach() != oracle.weight.to(dtype)).double().mean()
        assert wrong <= 1e-3  # float32 arithmetic crosses a rounding boundary now and then, and no oftener
        assert (weight.detach().double() - oracle.weight).abs().max() <= torch.finfo(dtype).eps * 4


@pytest.mark.parametrize(
    ("dtype", "correct_bias", "second_moment", "shape"),
    pairs(
        [torch.float32, torch.bfloat16],
        [True, False],
        ["element", "row"],
        [(7,), (5, 3), (), (2, 3, 4), (0, 4), (5, 4, "gaps"), (5, 4, "transposed")],
    ),
)
def test_dense_rest_is_adamw_in_the_papers_convention(dtype, correct_bias, second_moment, shape):
    *shape, layout = shape if "gaps" in shape or "transposed" in shape else (*shape, "rows")
    start = normals(shape, 0).to(dtype)
    gradients = [g.to(dtype) for g in gradients_for(shape, 7, 2)]
    weight = torch.nn.Parameter(strided(start.clone(), layout))
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1, "correct_bias": correct_bias}
    optimizer = APOLLOAdamW([{"params": [weight], "second_moment": second_moment}], **options)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    exact = oracle_adamw(start, gradients, second_moment=second_moment, **options)
    # float32: rounding of w, twice a step. bfloat16: half an ulp (2**-8 of |w|) a step.
    allowed = 7 * (2**-8 if dtype == torch.bfloat16 else 2**-23)
    assert torch.all((weight.detach().double() - exact).abs() <= allowed * exact.abs().clamp(min=start.abs().double()))


def test_dense_rest_equals_torch_adamw_where_the_conventions_meet():
    """Without eps and decay the two conventions are the same formula."""
    start = torch.randn(50)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [
        APOLLOAdamW([ours], lr=1e-2, eps=1e-30),
        torch.optim.AdamW([theirs], lr=1e-2, eps=1e-30, weight_decay=0.0),
    ]
    for gradient in gradients_for((50,), 20, 3):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_svd_projects_on_the_top_singular_vectors_of_the_refresh_gradient(shape, proj_type):
    weight = torch.nn.Parameter(torch.randn(shape))
    group = {"params": [weight], "rank": 5, "proj": "svd", "proj_type": proj_type, "update_proj_gap": 3}
    optimizer = APOLLOAdamW([group], lr=1e-2)
    oracle = OracleMatrix(weight.detach(), 5, lr=1e-2, proj_type=proj_type)
    seen = []
    for step, gradient in enumerate(gradients_for(shape, 7, 4)):
        weight.grad = gradient
        optimizer.step()
        P = optimizer.state[weight]["projection"].double()
        seen.append(P)
        if step % 3 == 0:
            G = gradient.double() if oracle.keeps_rows else gradient.double().T
            exact = torch.linalg.svd(G).Vh[:5]
            torch.testing.assert_close(P @ P.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
            # Signs and order aside, the same subspace: the projectors agree.
            torch.testing.assert_close(P.T @ P, exact.T @ exact, rtol=0, atol=1e-4)
        else:
            assert torch.equal(P, seen[-2])
        oracle.step(gradient, P)
    moved = (oracle.weight - weight.detach().double()).norm() / oracle.weight.norm()
    assert moved < 1e-5


@pytest.mark.parametrize(
    ("factor", "scale_type"),
    [
        (2.0**-10, "channel"),
        (2.0**10, "tensor"),
        *(pytest.param(2.0**power, "channel", marks=pytest.mark.full) for power in (-3, 1, 10)),
        *(pytest.param(2.0**power, "tensor", marks=pytest.mark.full) for power in (-10, -3, 1)),
    ],
)
def test_the_update_does_not_depend_on_the_gradients_scale(factor, scale_type):
    """Adam's ratio, and so s_c G, is the same for c G (eps aside); a power of two commutes with rounding."""
    weights = [torch.nn.Parameter(torch.zeros(24, 16)) for _ in range(2)]
    for weight, c in zip(weights, (1.0, factor), strict=True):
        group = {"params": [weight], "rank": 4, "scale_type": scale_type}
        optimizer = APOLLOAdamW([group], lr=1e-2, eps=1e-30)
        for gradient in gradients_for((24, 16), 5, 5, scale=1.0):
            weight.grad = c * gradient
            optimizer.step()
    # |R| + 1e-8 breaks the symmetry by 1e-8 / |R|, and |R| is at least 1e-3 here.
    torch.testing.assert_close(weights[0], weights[1], rtol=5e-5, atol=1e-7)


@EXAMPLES
@pytest.mark.slow
def test_the_limiter_never_lets_the_norm_grow_by_more_than_a_hundredth(backend, count):
    examples = given(
        scales=st.lists(st.floats(1e-4, 1e4), min_size=2, max_size=8 if backend == "reference" else 4),
        scale_type=st.sampled_from(["channel", "tensor"]),
    )
    settings(max_examples=count[backend] // 2, deadline=None)(examples(check_the_limiter))()


def check_the_limiter(scales, scale_type):
    weight = torch.nn.Parameter(torch.zeros(20, 12))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 3, "scale_type": scale_type}], lr=1.0, correct_bias=False)
    norms = []
    for scale, gradient in zip(scales, gradients_for((20, 12), len(scales), 6, scale=1.0), strict=False):
        before = weight.detach().clone()
        weight.grad = scale * gradient
        optimizer.step()
        norms.append((weight.detach() - before).double().norm().item())
    for previous, current in itertools.pairwise(norms):
        assert current <= previous * 1.01 * (1 + 1e-4) + 1e-6
    # u_prev is the norm of the update before the learning rate and the scale, which are 1 here.
    assert optimizer.state[weight]["update_norm"].item() == pytest.approx(norms[-1], rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 24, 40), (1, 24, 40)])
def test_expert_tensors_are_one_matrix_an_expert(shape):
    whole = torch.nn.Parameter(torch.randn(shape))
    experts = [torch.nn.Parameter(matrix.clone()) for matrix in whole.detach()]
    for optimizer in (APOLLOAdamW([{"params": [whole], "rank": 4}]), APOLLOAdamW([{"params": experts, "rank": 4}])):
        for gradient in gradients_for(shape, 4, 7):
            whole.grad = gradient * torch.arange(1, shape[0] + 1).view(-1, 1, 1)
            for expert, part in zip(experts, whole.grad, strict=True):
                expert.grad = part.clone()
            optimizer.step()
    assert torch.equal(whole.detach(), torch.stack([expert.detach() for expert in experts]))


@pytest.mark.parametrize(
    ("dtype", "scale_type", "poison"),
    pairs([torch.float32, torch.bfloat16], ["channel", "tensor"], [None, torch.nan, torch.inf]),
)
def test_masking_as_accelerators_do_equals_skipping_as_a_cpu_does(monkeypatch, dtype, scale_type, poison):
    """Where flags are not host memory every matrix runs through the same operations, masked."""
    results = []
    for masked in (False, True):
        if masked:
            monkeypatch.setattr(reference, "_on_host", lambda values: None)
        weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((24, 10), (24, 10), (10, 24))]
        group = {"params": weights, "rank": 3, "scale_type": scale_type}
        optimizer = APOLLOAdamW([group], lr=1e-2, weight_decay=0.1)
        for step in range(4):
            for index, weight in enumerate(weights):
                weight.grad = gradients_for(weight.shape, 1, 10 * step + index)[0].to(dtype)
            if poison is not None and step == 2:
                weights[1].grad[4, 7] = poison
            optimizer.step()
        assert optimizer.skipped_updates.item() == (poison is not None)
        tensors = [optimizer.state[w][name] for w in weights for name in ("exp_avg", "exp_avg_sq", "update_norm")]
        results.append([weight.detach() for weight in weights] + tensors)
    for skipped, masked in zip(*results, strict=True):
        assert masked.isfinite().all()
        torch.testing.assert_close(skipped, masked, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-9)
