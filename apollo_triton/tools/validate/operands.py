"""The kernels of a step from a linear layer's operands (``fused_operands``), for ``apollo-triton validate``.

Beside them the reference path is given G, formed in float64 and rounded to float32 once. Errors of sums are shares of
the sums of their terms' magnitudes, since tokens may cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.interface import Moment
from ...backends.reference import verbs as reference
from ...backends.reference.batch import Batch
from ...backends.triton import operands as fused_operands
from ...backends.triton import verbs as fused
from ...backends.triton.table import OperandTable
from ...core.operands import Operands
from ...core.philox import Stream
from ...core.scratch import Scratch
from ...params.member import Label, Member, find_piece
from ...params.state import make_state
from .float64 import ELEMENTWISE, NORM, UPDATE_GIVEN_S, Matrix, U, apply
from .paths import GRADIENT_SCALE, Errors, Path

TOKENS = 150  # more than a tile has, and no multiple of its 16, 32 or 64
# A sum of float32 products over tokens or width, of which each is rounded and each partial sum: in most orders 1 to 3 U
# of the terms' magnitudes. S is two sums, and a norm by the Gram matrix three, of which tensor cores cut off a unit for
# every 16 terms: 14 U of a norm at width 4096 (H100).
SUM = 24 * U
# Two bfloat16 parts hold 16 bits of S: 2**-17 of it is rounded off, in Triton's interpreter 2**-16 cut off.
TWO_PARTS = 2.0**-16


def run(path: Path, errors: Errors) -> None:
    """Three steps of a case's weight, each from the path's own state."""
    o, parameter, keeps_rows = path.settings, path.parameters[0], path.keeps_rows[0]
    label = Label(0, "", parameter)
    piece = find_piece(label, o)
    state = path.optimizer.state[parameter] = make_state(label, o, piece)
    member = Member(label, parameter, state, 0, piece)
    table = OperandTable(member, o, set()) if path.name == "kernels" else None
    for path.t in (1, 2, 3):
        before, operands = path.snapshot()[0][0], _drawn(path)
        X, dY = (each.double() for each in operands)
        kept, summed = (dY, X) if keeps_rows else (X, dY)
        G, P = kept.T @ summed, path.projections(0)[0].double()
        if table is None:
            batch = Batch(path.geometry(parameter), o, path.t, o.seed, Scratch())
            batch.add(parameter, (G if keeps_rows else G.T).float().contiguous(), state, P.float(), piece)
            sketch = reference.sketch(batch)
            R, norms = sketch.projected[0], sketch.squared_norms.flatten()
            results = reference.rescale(batch, sketch)
            reference.apply(batch, results)
            s, sums = results.channel, results.sums
            if o.scale_type == "channel":
                _add_norms(path, errors, "|G_c|^2", norms, kept, summed)
        else:
            moment = Moment(path.t, None, None)
            found = fused_operands.sketch(table, o, moment, operands, "exact")
            R = found.projected
            for name, way in (("|G_c|^2", fused_operands.tile_norms), ("by K", fused_operands.gram_norms)):
                _add_norms(path, errors, name, way(table, operands), kept, summed)
            factors = fused.rescale(table, o, moment, found)
            fused_operands.apply(table, o, moment, factors, operands)
            s, sums = factors.channel, factors.sums
        terms = kept.abs().T @ (summed @ P.T).abs()
        limit = TWO_PARTS if operands.inputs.dtype == torch.bfloat16 else SUM
        errors.add(path.name, "R", ((R - G @ P.T).abs() / terms).amax(), limit)
        totals = sums.double().sum(0)
        if s is None:
            factor = (totals[0].sqrt() / (totals[1].sqrt() + 1e-8)).reshape(1, 1)
            u = factor[0, 0] * totals[2].sqrt()
        else:
            factor, u = s.double().reshape(-1, 1), totals[0].sqrt()
        _add_weight(path, errors, before, G, kept.abs().T @ summed.abs(), factor, u)


def _drawn(path: Path) -> Operands:
    """X and dY of a step, the same on both paths."""
    rows, columns = path.parameters[0].shape
    X, dY = path.drawn((TOKENS, columns), 1.0), path.drawn((TOKENS, rows), GRADIENT_SCALE)
    return Operands(*(each.to(path.device, path.gradient_dtype) for each in (X, dY)))


def _add_norms(path: Path, errors: Errors, name: str, found: Tensor, kept: Tensor, summed: Tensor) -> None:
    terms = (kept.abs() * ((summed @ summed.T).abs() @ kept.abs())).sum(0)
    exact = (kept.T @ summed).square().sum(1)
    errors.add(path.name, name, ((found - exact).abs() / terms).amax(), SUM)


def _add_weight(
    path: Path, errors: Errors, before: Matrix, G: Tensor, terms: Tensor, factor: Tensor, u: Tensor
) -> None:
    """W and u_prev, given the path's own factors; ``terms`` are those of G."""
    o, parameter, got = path.settings, path.parameters[0], path.snapshot()[0][0]
    W, previous, step = apply(before.W, G, factor, u, before.previous, path.t, o)
    errors.add(path.name, "u_prev", (got.previous - previous).abs() / previous, NORM)
    decay = float(o.lr) * o.weight_decay
    scale = UPDATE_GIVEN_S * step.abs() + (1 + 3 * decay) * (before.W - step).abs() + W.abs()
    scale += SUM / U * terms * step.norm(dim=1, keepdim=True) / G.norm(dim=1, keepdim=True)
    if parameter.dtype == torch.float32:
        errors.add(path.name, "W", ((got.W - W).abs() / scale).amax(), ELEMENTWISE)
    else:
        stored = path.matrices(0, parameter.detach())[0]
        expected = path.rounded(W, parameter.dtype, Stream.WEIGHT, 0, not path.keeps_rows[0])
        errors.add_rounded(path.name, "W", stored, expected, ELEMENTWISE * scale)
