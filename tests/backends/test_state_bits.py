"""8-bit moments (``state_bits=8``): the low-rank ones on both backends, the dense ones that bitsandbytes updates."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, drawn, new_gradients, optimizer_of, parameters_of
from tiers import tiers
from torch import nn

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model
from apollo_triton.backends.reference import dense_8bit
from apollo_triton.backends.reference import verbs as reference
from apollo_triton.core import gpu
from apollo_triton.core.moments_8bit import BLOCK, Blockwise, dequantize_blockwise, quantize_blockwise

EIGHT_BITS = {"state_bits": 8, "min_8bit_size": 257}  # the interpreter takes a second for 4096
EIGHT = {"constructor": EIGHT_BITS}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(optimizer, parameter):
    """Both in float32."""
    state = optimizer.state[parameter]
    if "exp_avg" in state:
        return [state[name].float() for name in MOMENTS]
    return [
        torch.stack(
            [
                dequantize_blockwise(q, absmax, name == "exp_avg")
                for q, absmax in zip(
                    state[f"{name}_q"].view(-1, *state[f"{name}_q"].shape[-2:]),
                    state[f"{name}_absmax"].view(-1, state[f"{name}_absmax"].shape[-1]),
                    strict=True,
                )
            ]
        ).view(state[f"{name}_q"].shape)
        for name in MOMENTS
    ]


def integers(shape, seed):
    """Small whole numbers, of which sums are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed), device="cpu").float().to(DEVICE)


# --- low rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((387, 20), {"rank": 17}),  # sketched in quarters of the 256 channels that a program owns; a ragged end
        pytest.param((20, 387), {"rank": 17}, marks=pytest.mark.full),
        ((150, 18), {"rank": 18, "scale_type": "tensor"}),
        ((130, 24), {"rank": 20}),
        ((24, 150), {"rank": 16}),
        ((2, 70, 24), {"rank": 20}),  # experts, whose blocks are their own
        ((70, 64), {"rank": 64}),
        pytest.param((5, 260), {"rank": 256, "proj_type": "right"}, marks=pytest.mark.full),
        # Sketched in four blocks of ranks.
        pytest.param((1, 1026), {"rank": 1024, "proj_type": "right"}, marks=pytest.mark.full),
    ],
)
def test_both_backends_store_the_bits_of_the_formula(shape, group, backend):
    """R is exact (whole numbers, signs, roots of powers of four), and so are steps of betas of 3/4."""
    weight = nn.Parameter(drawn(shape, 1))
    optimizer = optimizer_of(
        [weight],
        backend="auto",
        distribution="rademacher",
        **group,
        constructor={**EIGHT_BITS, "betas": (0.75, 0.75)},
    )
    exact = optimizer_of(
        [nn.Parameter(weight.detach().clone())],
        backend="reference",
        distribution="rademacher",
        **group,
        betas=(0.5, 0.5),
    )
    (other,) = exact.param_groups[0]["params"]
    M = V = None
    for step in range(2):
        gradient = integers(shape, step)
        weight.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        # M of betas 0 is R itself: half of it with betas of 1/2 and no history.
        exact.state.clear()
        exact.step()
        R = 2 * exact.state[other]["exp_avg"]
        held = optimizer.state[weight]
        if M is None:
            M, V = torch.zeros_like(R), torch.zeros_like(R)
        M, V = M + 0.25 * (R - M), V + 0.25 * (R * R - V)
        for name, values in (("exp_avg", M), ("exp_avg_sq", V)):
            signed = name == "exp_avg"
            matrices = values if values.dim() == 3 else values[None]
            expected = [quantize_blockwise(matrix, signed) for matrix in matrices]
            q, absmax = (torch.stack(each) for each in zip(*expected, strict=True))
            assert torch.equal(held[f"{name}_q"].view(q.shape), q)
            if backend == "cuda":  # which multiplies and adds in one rounding
                torch.testing.assert_close(held[f"{name}_absmax"].view(absmax.shape), absmax, rtol=2**-23, atol=0)
            else:
                assert torch.equal(held[f"{name}_absmax"].view(absmax.shape), absmax)
        M, V = moments(optimizer, weight)


@pytest.mark.slow
@pytest.mark.parametrize("rank", tiers([16, 17, 18, 36, 100, 260], (16, 17, 100).__contains__))
def test_any_rank_moves_the_weight_as_float_moments_do(rank, backend):
    """For one step, whose moments were zeros: what is stored does not enter yet. Then within 8 bits."""
    shape = (-(-300 // rank) + 60, max(rank, 20))
    (weight,) = parameters_of([shape])
    found, other = (nn.Parameter(weight.detach().clone()) for _ in range(2))
    ours = optimizer_of([found], backend="auto", rank=rank, proj_type="right", **EIGHT)
    float32 = optimizer_of([other], backend="auto", rank=rank, proj_type="right")
    assert ours.state == {}
    for step in range(2):
        gradient = drawn(shape, step)
        found.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        float32.step()
        assert ours.state[found]["exp_avg_q"].dtype == torch.uint8
        moved = (other - weight).norm()
        assert (found - other).norm() <= (1e-5 if step == 0 else 0.03) * moved
        for mine, theirs, signed in zip(moments(ours, found), moments(float32, other), (True, False), strict=True):
            absmax = theirs.abs().max()
            error = (mine - theirs).abs().max() / absmax
            assert error <= 0.02 * (step + 1), signed


@pytest.mark.slow
def test_state_is_that_of_bitsandbytes(backend, bitsandbytes):
    """Its own dequantiser reads it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    (weight,) = parameters_of([(300, 30)])
    optimizer = optimizer_of([weight], backend="auto", rank=17, **EIGHT)
    optimizer.step()
    new_gradients([weight], 5)
    optimizer.step()
    state = optimizer.state[weight]
    for name, values in zip(MOMENTS, moments(optimizer, weight), strict=True):
        code = functional.create_dynamic_map(signed=name == "exp_avg").to(DEVICE)
        read = functional.dequantize_blockwise(
            state[f"{name}_q"], absmax=state[f"{name}_absmax"], code=code, blocksize=BLOCK
        )
        assert torch.equal(read, values)


def test_small_tensors_vectors_and_low_ranks_keep_float_moments(backend, bitsandbytes, monkeypatch):
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)  # what the state is made of is enough
    shapes = [(4096, 2), (300, 17), (256, 17), (255, 17)]
    weights = parameters_of(shapes)
    dense = parameters_of([(4096,), (64, 64), (63, 65)])
    optimizer = APOLLOAdamW(
        [
            {"params": weights[:1], "rank": 1},
            {"params": weights[1:2], "rank": 15},
            {"params": weights[2:], "rank": 16, "state_dtype": torch.bfloat16},
            {"params": dense},
        ],
        state_bits=8,
    )
    optimizer.step()
    states = [optimizer.state[each] for each in weights + dense]
    dtypes = [state.get("exp_avg", state.get("exp_avg_q")).dtype for state in states]
    float32, bfloat16, uint8 = torch.float32, torch.bfloat16, torch.uint8
    assert dtypes == [float32, float32, uint8, bfloat16, float32, uint8, float32]
    for state in states:
        parts = {name for name in state if name.startswith("exp_avg") and name not in MOMENTS}
        assert len(parts) == (4 if "exp_avg_q" in state else 0)


@pytest.mark.slow
def test_gradients_that_are_not_finite_leave_blocks_as_they_are(backend):
    """A channel keeps its moments, a block of such channels its bits; a block with others is rounded anew."""
    (weight,) = parameters_of([(288, 20)])  # rank 16: 16 channels a block
    optimizer = optimizer_of([weight], backend="auto", rank=16, lr=0.1, **EIGHT)
    for seed in range(2):
        new_gradients([weight], seed)
        optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    held = moments(optimizer, weight)
    start = weight.detach().clone()
    new_gradients([weight], 9)
    weight.grad[64:192, 3] = math.nan  # eight whole blocks
    weight.grad[200, 5] = math.inf  # and one channel
    optimizer.step()
    assert torch.equal(weight, start)
    assert optimizer.skipped_updates == 1
    state = optimizer.state[weight]
    for name, old, new in zip(MOMENTS, held, moments(optimizer, weight), strict=True):
        assert torch.equal(state[f"{name}_q"][64:192], before[f"{name}_q"][64:192])
        assert torch.equal(state[f"{name}_absmax"][4:12], before[f"{name}_absmax"][4:12])
        assert not torch.equal(state[f"{name}_q"][192:208], before[f"{name}_q"][192:208])
        scale = state[f"{name}_absmax"][12]
        assert (old[200] - new[200]).abs().max() <= 0.02 * scale
        assert new.isfinite().all()
    weight.grad.fill_(math.nan)
    before = copy.deepcopy(state)
    optimizer.step()
    for name in MOMENTS:
        assert torch.equal(state[f"{name}_q"], before[f"{name}_q"])
        assert torch.equal(state[f"{name}_absmax"], before[f"{name}_absmax"])


@given(
    channels=st.integers(1, 700),
    rank=st.integers(1, 40),
    start=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_parts_of_a_moment_are_stored_as_the_whole(channels, rank, start, seed):
    """Some channels, which begin with a block, whatever the rank and the end."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(channels, rank, generator=generator)
    changed = torch.rand(channels, generator=generator) > 0.3
    q, absmax = quantize_blockwise(torch.randn(channels, rank, generator=generator), True)
    whole, parts = Blockwise(q.clone(), absmax.clone(), True), Blockwise(q.clone(), absmax.clone(), True)
    whole.store(slice(0, channels), values, changed)
    step = BLOCK // math.gcd(rank, BLOCK) * (start + 1)
    for first in range(0, channels, step):
        cut = slice(first, first + step)
        parts.store(cut, values[cut], changed[cut])
        assert torch.equal(parts.floats(cut), whole.floats(slice(0, channels))[cut])
    assert torch.equal(parts.q, whole.q)
    assert torch.equal(parts.absmax, whole.absmax)
    expected, expected_absmax = quantize_blockwise(values, True)
    elements = changed[:, None].expand(channels, rank).reshape(-1)
    for number, block in enumerate(elements.split(BLOCK)):
        cut = slice(number * BLOCK, (number + 1) * BLOCK)
        want, wanted = (expected, expected_absmax) if block.any() else (q, absmax)
        assert torch.equal(whole.q.view(-1)[cut], want.view(-1)[cut])
        assert whole.absmax[number] == wanted[number]


def test_the_reference_path_cuts_large_moments_between_their_blocks(monkeypatch):
    ends = []
    for elements in (reference.BLOCK_ELEMENTS, 300):  # the latter less than a block's channels
        monkeypatch.setattr(reference, "BLOCK_ELEMENTS", elements)
        (weight,) = parameters_of([(700, 20)])
        optimizer = optimizer_of([weight], backend="reference", rank=17, **EIGHT)
        optimizer.step()
        optimizer.step()
        held = optimizer.state[weight]
        ends.append([held[name] for name in ("exp_avg_q", "exp_avg_sq_q", "exp_avg_absmax", "exp_avg_sq_absmax")])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


# --- the optimizer


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(50, 128), "mlp": nn.Linear(128, 320), "head": nn.Linear(320, 50, bias=False)}
    return nn.ModuleDict(layers).to(DEVICE, dtype)


def losses(model, optimizer, count, first=0):
    found = []
    for step in range(first, first + count):
        tokens = torch.randint(50, (6,), generator=torch.Generator().manual_seed(step), device="cpu").to(DEVICE)
        hidden = torch.relu(model["mlp"](model["embed"](tokens)))
        loss = nn.functional.cross_entropy(model["head"](hidden), (tokens * 7) % 50)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_resumes_bit_for_bit(int8, backend, bitsandbytes):
    def make():
        model = model_of()
        if int8:
            quantize_model(model, ["mlp"])
        return model, APOLLOAdamW.apollo(model, 16, lr=1e-2, target_modules=["mlp"], **EIGHT_BITS)

    model, optimizer = make()
    losses(model, optimizer, 2)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    expected = losses(model, optimizer, 2, first=2)
    other, resumed = make()
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True, map_location=DEVICE)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert losses(other, resumed, 2, first=2) == expected
    for mine, theirs in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype if isinstance(value, torch.Tensor) else value == theirs[name]
            assert not isinstance(value, torch.Tensor) or torch.equal(value, theirs[name])
    for parameter, state in optimizer.state.items():
        assert ("exp_avg_q" in state) == (parameter.dim() > 1)


@pytest.mark.slow
def test_layer_by_layer_is_the_same_bit_for_bit(backend, bitsandbytes):
    ends = []
    for layerwise in (False, True):
        model = model_of()
        optimizer = APOLLOAdamW.apollo(model, 16, lr=1e-2, target_modules=["mlp"], **EIGHT_BITS)
        if layerwise:
            attach_layerwise(model, optimizer)
        ends.append(losses(model, optimizer, 2))
        ends[-1] += [parameter.detach().double().sum().item() for parameter in model.parameters()]
    assert ends[0] == ends[1]


def test_training_ends_where_float_moments_end(bitsandbytes):
    ends = []
    for bits in (32, 8):
        model = model_of()
        optimizer = APOLLOAdamW.apollo(model, 16, lr=3e-3, target_modules=["mlp"], **EIGHT_BITS | {"state_bits": bits})
        found = losses(model, optimizer, 40)
        ends.append((found[0], sum(found[-5:]) / 5))
    assert ends[0][0] == ends[1][0]
    assert ends[0][1] < 0.8 * ends[0][0]
    assert ends[1][1] == pytest.approx(ends[0][1], rel=0.1)


def test_backend_for_says_who_updates_it(bitsandbytes):
    weights = parameters_of([(64, 80), (64,)])
    optimizer = APOLLOAdamW([{"params": weights}], **EIGHT_BITS)
    assert optimizer.backend_for(weights[0]) == (
        "reference",
        "bitsandbytes updates it: its moments are 8-bit and it is not projected",
    )
    assert "bitsandbytes" not in optimizer.backend_for(weights[1]).reason
    with pytest.raises(ValueError, match=r"parameter 0 .*capturable=True needs the Triton kernels.*bitsandbytes"):
        APOLLOAdamW([{"params": weights}], **EIGHT_BITS, capturable=True).step()


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match=r"Invalid state_bits: 4 \(allowed: 32 or 8\)"):
        APOLLOAdamW(parameters_of([(4, 4)]), state_bits=4)
    (weight,) = parameters_of([(64, 80)])
    optimizer = APOLLOAdamW([weight], **EIGHT_BITS)
    monkeypatch.setattr(dense_8bit, "obstacle", lambda device: "RuntimeError: no kernel")
    with pytest.raises(ValueError, match=r"parameter 0 .*bitsandbytes' to update.*no kernel.*0\.50.*'state_bits': 32"):
        optimizer.step()
    assert optimizer.state[weight] == {}


def test_a_broken_state_is_refused():
    (weight,) = parameters_of([(300, 20)])
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 16}], **EIGHT_BITS)
    optimizer.step()
    saved = optimizer.state_dict()
    for change, problem in (
        (lambda state: state.pop("exp_avg_absmax"), r"'exp_avg_absmax' is missing"),
        (lambda state: state.update(exp_avg_sq_absmax=torch.zeros(5)), r"'exp_avg_sq_absmax' has shape \(5,\), not"),
    ):
        broken = copy.deepcopy(saved)
        change(broken["state"][0])
        with pytest.raises(ValueError, match=problem):
            optimizer.load_state_dict(broken)


def test_bits_of_a_state_are_its_own_whatever_the_group_says_later(backend):
    (weight,) = parameters_of([(300, 20)])
    optimizer = optimizer_of([weight], backend="auto", rank=16)
    optimizer.step()
    optimizer.param_groups[0]["state_bits"] = 8
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32


@pytest.mark.slow
def test_bitsandbytes_is_imported_for_dense_8bit_moments_alone():
    program = """
import sys, torch
from apollo_triton import APOLLOAdamW
weight, vector = (torch.nn.Parameter(torch.ones(s)) for s in ((256, 16), (4096,)))
weight.grad, vector.grad = torch.ones(256, 16), torch.ones(4096)
optimizer = APOLLOAdamW([{"params": [weight], "rank": 16}, {"params": [vector]}], state_bits=8)
optimizer.step()
assert "exp_avg_q" in optimizer.state[weight]
assert "bitsandbytes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
