"""The sketch and rows of a gradient that is never formed, in plain PyTorch, against float64."""

from __future__ import annotations

import pytest
import torch
from no_gradient_cases import operands

from apollo_triton import APOLLOAdamW, projection_matrix
from apollo_triton.backends.interface import Sketch, StepScalars
from apollo_triton.backends.reference import implicit, verbs
from apollo_triton.backends.reference.matrices import Batch
from apollo_triton.core import scratch
from apollo_triton.core.geometry import Geometry
from apollo_triton.core.implicit_gradient import ImplicitGradient
from apollo_triton.core.scratch import Scratch
from apollo_triton.core.settings import Settings

BLOCK = 100  # elements: three tokens, two rows


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(scratch, "BLOCK_ELEMENTS", BLOCK)


def drawn(tokens, rows, columns, dtype):
    X, dY = operands(1, tokens, rows, columns, dtype)
    return ImplicitGradient(X, dY), dY.double().T @ X.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_rows_of_the_gradient(dtype, tokens):
    """Blocks of tokens that overwrite each other, a slice of the wrong operand; memory that held something else."""
    factors, G = drawn(tokens, 24, 33, dtype)
    buffers = Scratch()
    buffers.empty((BLOCK,), G.device, 1).fill_(torch.nan)
    for rows in (slice(0, 3), slice(21, 24)):
        found = factors.rows(rows, buffers)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), G[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "by_gram"), [(5, True), (40, False)])
@pytest.mark.parametrize(("rows", "columns"), [(33, 24), (24, 33)])
def test_the_sketch(dtype, tokens, by_gram, rows, columns):
    """Both ways to the norms, in blocks; R of the wrong operand's projection."""
    factors, G = drawn(tokens, rows, columns, dtype)
    assert implicit.gram_is_cheaper(tokens, rows, columns) == by_gram
    geometry = Geometry.of((rows, columns), "std")
    group = APOLLOAdamW([{"params": [torch.nn.Parameter(torch.zeros(rows, columns))], "rank": 6}]).param_groups[0]
    settings, scalars = Settings.of(group), StepScalars(1)
    batch = Batch(geometry, 1.0, 0, Scratch())
    P = projection_matrix(0, 0, 6, geometry.width)
    batch.projections, batch.weights = [P], [torch.zeros(rows, columns)]
    channels = G if geometry.keeps_rows else G.T
    R, norms = channels @ P.double().T, channels.square().sum(1)
    for limiter_norm, expected in (("exact", norms), ("sketch", R.square().sum(1))):
        batch.gradients = [factors._replace(limiter_norm=limiter_norm)]
        found = verbs.sketch(batch, settings, scalars)
        assert isinstance(found, Sketch)
        torch.testing.assert_close(found.projected[0].double(), R, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.squared_norms[0].double(), expected, rtol=1e-5, atol=1e-4)


def test_factors_go_into_an_operand_or_into_the_product():
    factors, G = drawn(5, 24, 33, torch.float32)
    assert factors.can_be_scaled
    assert not drawn(24, 24, 33, torch.float32)[0].can_be_scaled
    assert not drawn(5, 24, 33, torch.bfloat16)[0].can_be_scaled
    for shape in ((1, 1), (24, 1), (1, 33)):
        c, weight = torch.rand(shape), torch.ones(24, 33)
        factors.subtract_from(weight, c)
        torch.testing.assert_close(weight.double(), 1 - c.double() * G, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "keeps_rows"), [((0, 5), True), ((0, 5), False), ((5, 0), True), ((5, 0), False)])
def test_an_empty_shard_has_norms_of_zero_in_pytorch(shape, keeps_rows):
    """A rank that has nothing of a small weight raises, and the others wait for it in their collective."""
    rows, columns = shape
    gradient = ImplicitGradient(torch.ones(3, columns), torch.ones(3, rows))
    norms = implicit.squared_norms(gradient, keeps_rows, Scratch())
    assert norms.tolist() == [0.0] * (rows if keeps_rows else columns)
