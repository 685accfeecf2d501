"""``scale="auto"``: updates of sqrt(8) times AdamW's norm, matrix by matrix, on both backends; what is refused or
warned of."""

from __future__ import annotations

import math

import pytest
import torch
from drawn_tensors import gradients_for, normals
from kernel_cases import kernels_everywhere
from oracle import OracleMatrix
from torch import nn
from warned import warnings_of

from apollo_triton import APOLLOAdamW
from apollo_triton.core import gpu
from apollo_triton.core.scale import auto_scale

# Both orientations, and widths from 16 to 128: with another one's scale a matrix is off by sqrt(1.3) at the least.
SHAPES = [(160, 16), (28, 120), (48, 200), (128, 128)]


def optimizer_of(weights, **keys):
    constructor = {key: keys.pop(key) for key in ("lr", "disable_nl", "scale_front", "backend") if key in keys}
    return APOLLOAdamW([{"params": weights, "scale": "auto", **keys}], **constructor)


def norms_of_updates(optimizer, weights, gradients):
    """The norm of each step of each weight."""
    norms = []
    for of_a_step in zip(*gradients, strict=True):
        before = [weight.detach().clone() for weight in weights]
        for weight, gradient in zip(weights, of_a_step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        norms.append([(weight.detach() - old).norm() for weight, old in zip(weights, before, strict=True)])
    return torch.tensor(norms)


@pytest.mark.parametrize(
    ("rank", "scale_type"), [(4, "channel"), (16, "channel"), (1, "tensor"), (4, "tensor"), (16, "tensor")]
)
def test_updates_have_sqrt_8_times_the_norm_of_adamws(rank, scale_type):
    """A law without the correction for channels (off by 1.41 at rank 4) or with it for tensors, one in rank instead of
    its root, or of the side that is not projected."""
    gradients = [gradients_for(shape, 10, seed) for seed, shape in enumerate(SHAPES)]
    found = []
    for kind in (APOLLOAdamW, torch.optim.AdamW):
        weights = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        if kind is APOLLOAdamW:
            # The limiter would hold the first steps back, in which Adam's uncorrected direction grows sixfold.
            # |P| of normal numbers scatters by 1 / sqrt(2 rank width): at rank 1 and width 16 by 18 %.
            law = {"distribution": "rademacher" if rank == 1 else "gaussian"}
            optimizer = optimizer_of(weights, lr=1.0, rank=rank, scale_type=scale_type, disable_nl=True, **law)
        else:
            optimizer = kind(weights, lr=1.0, betas=(0.9, 0.999), eps=1e-6, weight_decay=0)
        found.append(norms_of_updates(optimizer, weights, gradients))
    ratios = (found[0].square().mean(0) / found[1].square().mean(0)).sqrt() / math.sqrt(8)
    # Momentum makes N depend on R, so that means are a few per cent off; at rank 4 channels have no variance.
    assert ((ratios > 0.88) & (ratios < 1.15)).all(), ratios


@pytest.mark.parametrize("rank", [3, 5, 8, 40])
def test_the_correction_is_the_mean_of_inverse_norms(rank):
    """(rank - 2) / rank, which the law states, against normal numbers that are drawn."""
    R = torch.randn(200_000, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    inverse = (rank / R.square().sum(1)).mean()
    correction = auto_scale(64, rank, "channel") / auto_scale(64, rank, "tensor")
    assert correction * inverse == pytest.approx(1, rel=0.1 if rank == 3 else 0.02)  # at rank 3 without a variance


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("scale_type", "front", "proj_type"),
    [("channel", False, "std"), ("tensor", True, "std"), ("channel", True, "right")],
)
def test_each_matrix_has_the_scale_of_its_own_width(scale_type, front, proj_type):
    """Another matrix's scale, or one for the group; a scale on the wrong side of the limiter; the smaller side taken
    for the projected one. Experts and a convolution among them, the last ones in groups of launches of their own."""
    shapes = [(33, 16), (20, 48), (5, 24, 12), (30, 4, 2, 2), (21, 21)]
    options = {"scale_type": scale_type, "scale_front": front, "proj_type": proj_type}
    weights = [nn.Parameter(normals(shape, seed)) for seed, shape in enumerate(shapes)]
    gradients = [gradients_for(shape, 3, seed) for seed, shape in enumerate(shapes)]
    gradients = [[each * growth for growth, each in enumerate(of_a_weight, 1)] for of_a_weight in gradients]
    oracles = [
        [OracleMatrix(matrix, 4, scale="auto", **options) for matrix in as_matrices(weight.detach())]
        for weight in weights
    ]
    optimizer = optimizer_of(weights, lr=1e-3, rank=4, **options)
    norms_of_updates(optimizer, weights, gradients)
    for of_a_weight, weight, matrices in zip(gradients, weights, oracles, strict=True):
        for gradient in of_a_weight:
            for oracle, matrix in zip(matrices, as_matrices(gradient), strict=True):
                oracle.step(matrix)
        norms = optimizer.state[weight]["update_norm"].reshape(-1)
        for oracle, matrix, norm in zip(matrices, as_matrices(weight.detach()), norms, strict=True):
            torch.testing.assert_close(matrix.double(), oracle.weight, rtol=1e-5, atol=1e-6)
            assert float(norm) == pytest.approx(oracle.update_norm, rel=1e-4)


def as_matrices(tensor):
    return list(tensor) if tensor.dim() == 3 else [tensor.flatten(1)]


@pytest.mark.usefixtures("backend")
def test_a_scale_that_changes_between_steps_is_taken(tmp_path):
    """Launches that go on with the scales of the plan before; a string that does not survive a file."""
    weights = [nn.Parameter(normals(shape, 0)) for shape in [(24, 8), (12, 40)]]
    optimizer = optimizer_of(weights, rank=4, scale=1.0)
    oracles = [OracleMatrix(weight.detach(), 4) for weight in weights]
    gradients = [gradients_for(weight.shape, 6, seed) for seed, weight in enumerate(weights)]
    for step, of_a_step in enumerate(zip(*gradients, strict=True)):
        scale = [1.0, "auto", 9.0][step // 2]
        optimizer.param_groups[0]["scale"] = scale
        if step == 3:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            optimizer = optimizer_of(weights, rank=4, scale="auto")
            optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
            assert optimizer.param_groups[0]["scale"] == "auto"
        for weight, oracle, gradient in zip(weights, oracles, of_a_step, strict=True):
            weight.grad = gradient
            width = min(gradient.shape)
            oracle.scale = 8 * width / 4 / 2 if scale == "auto" else scale  # 4 / (4 - 2) = 2
            oracle.step(gradient)
        optimizer.step()
    for weight, oracle in zip(weights, oracles, strict=True):
        torch.testing.assert_close(weight.detach().double(), oracle.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches that are not made")
def test_widths_share_launches(monkeypatch):
    """A launch for each scale: a model of two orientations takes four, whatever its widths."""
    pytest.importorskip("triton")
    weights = [nn.Parameter(torch.zeros(shape)) for shape in [(40, 16), (16, 40), (48, 24), (24, 24), (24, 64)]]
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel.fn.__name__))
    optimizer = optimizer_of(weights, rank=1, scale_type="tensor", backend="triton")
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with kernels_everywhere(monkeypatch):
        optimizer.step()
    assert sorted(launched) == ["apply_kernel"] * 2 + ["sketch_kernel"] * 2


@pytest.mark.parametrize("rank", [1, 2])
def test_channels_of_ranks_without_a_mean_are_warned_of(rank):
    """Silence where some channels take 25 times AdamW's step; a correction below 0, or of infinity."""
    group = {"params": [nn.Parameter(torch.zeros(16, 16))], "rank": rank, "scale": "auto"}
    (text,) = warnings_of(APOLLOAdamW, [group])
    assert f"parameter group 0: scale='auto' with a factor for each channel at rank {rank}: " in text
    assert "no mean" in text
    assert text.endswith("take rank 3 or more, or scale_type='tensor'")
    for other in ({"rank": 3}, {"scale_type": "tensor"}, {"scale": 16.0}, {"rank": None}):
        assert not [text for text in warnings_of(APOLLOAdamW, [group | other]) if "no mean" in text]
    assert auto_scale(96, rank, "channel") == pytest.approx(8 * 96 / rank / 3)


def test_svd_is_refused_before_a_step_changes_anything():
    """A group that was changed by hand, trained on with a scale that has no ground."""
    weight = nn.Parameter(torch.ones(16, 16))
    optimizer = optimizer_of([weight], rank=4)
    weight.grad = torch.ones(16, 16)
    optimizer.param_groups[0]["proj"] = "svd"
    with pytest.raises(ValueError, match=r"parameter group 0: scale='auto' has no value for proj='svd'"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(weight.detach(), torch.ones(16, 16))
    optimizer.param_groups[0].update(scale=4.0)
    optimizer.step()
