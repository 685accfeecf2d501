"""Linear layers whose weight is cut over ranks, int8 and float: output and all gradients against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_cases import drawn, local, whole
from distributed_harness import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from apollo_triton.core.tensor_parallel import local_linear
from apollo_triton.int8.layers import Int8Linear
from apollo_triton.int8.weight import Int8Weight

OUT, IN, GROUP = 24, 32, 8
R, P, OUTPUTS, INPUTS, LAST, TOKENS = Replicate(), Partial(), Shard(0), Shard(1), Shard(2), Shard(1)
# The weight's placements, the input's as they are given, and those of the output and of all gradients: of the weight,
# the bias and the input, whose gradient ``DTensor`` brings back to the input's own placements, sums excepted.
CASES = {
    "columns": ([OUTPUTS], [R], [LAST], [OUTPUTS], [OUTPUTS], [P]),
    "rows": ([INPUTS], [LAST], [P], [INPUTS], [R], [LAST]),
    "neither": ([R], [R], [R], [R], [R], [R]),
    "tokens": ([R], [TOKENS], [TOKENS], [P], [P], [TOKENS]),
    # What sequence parallel brings: the input is gathered first, and its gradient cut again.
    "gathered": ([OUTPUTS], [TOKENS], [LAST], [OUTPUTS], [OUTPUTS], [TOKENS]),
    "cut": ([INPUTS], [R], [P], [INPUTS], [R], [R]),
}
ON_TWO = {
    "one by all, columns": ([R, OUTPUTS], [R, R], [R, LAST], [R, OUTPUTS], [R, OUTPUTS], [R, P]),
    "one by all, rows": ([R, INPUTS], [R, LAST], [R, P], [R, INPUTS], [R, R], [R, LAST]),
    "two by two": ([OUTPUTS, INPUTS], [R, LAST], [LAST, P], [OUTPUTS, INPUTS], [OUTPUTS, R], [P, LAST]),
    "rows twice": ([INPUTS, INPUTS], [LAST, LAST], [P, P], [INPUTS, INPUTS], [R, R], [LAST, LAST]),
    "data": ([R, OUTPUTS], [Shard(0), R], [Shard(0), LAST], [P, OUTPUTS], [P, OUTPUTS], [Shard(0), P]),
}


def int8_part(part, shape, strides):
    return DTensor.from_local(
        Int8Weight.of(local(part), GROUP), part.device_mesh, part.placements, shape=shape, stride=strides
    )


def layers(mesh, placements, has_bias, is_int8):
    """A layer of the whole weight, and one of its parts."""
    W, b = drawn((OUT, IN), "weight"), drawn((OUT,), "bias")
    bias_placements = [OUTPUTS if each.is_shard(0) else R for each in placements]
    part = distribute_tensor(W, mesh, placements)
    if is_int8:
        part = int8_part(part, W.shape, W.stride())
        W = Int8Weight.of(W, GROUP).dequantize()
    plain, cut = (nn.Linear(IN, OUT, bias=has_bias) for _ in range(2))
    plain.weight = nn.Parameter(W)
    cut.weight = nn.Parameter(part)
    if has_bias:
        plain.bias, cut.bias = nn.Parameter(b), nn.Parameter(distribute_tensor(b, mesh, bias_placements))
    return plain, Int8Linear(cut, cut.weight)


def one_case(mesh, case, has_bias, is_int8):
    placements, given, of_y, of_W, of_b, of_x = case
    plain, cut = layers(mesh, placements, has_bias, is_int8)
    x, dY = drawn((2, 8, IN), "x"), drawn((2, 8, OUT), "dY")
    expected_x = x.clone().requires_grad_()
    expected = plain(expected_x)
    (expected * dY).sum().backward()
    ours = distribute_tensor(x, mesh, given).requires_grad_()
    y = cut(ours)
    assert list(y.placements) == of_y
    assert y.shape == expected.shape
    assert ours.grad is cut.weight.grad is None
    (y.full_tensor() * dY).sum().backward()
    pairs = {"y": (y, expected), "x": (ours.grad, expected_x.grad), "weight": (cut.weight.grad, plain.weight.grad)}
    assert list(ours.grad.placements) == of_x
    assert list(cut.weight.grad.placements) == of_W
    assert type(local(cut.weight.grad)) is torch.Tensor
    if has_bias:
        pairs["bias"] = cut.bias.grad, plain.bias.grad
        assert list(cut.bias.grad.placements) == of_b
    for name, (one, other) in pairs.items():
        error = (whole(one) - other).norm() / other.norm()
        assert error < 1e-6, (name, float(error))


def all_cases(of_each):
    """The names of what was tried, each with as many of these: int8 and a bias, int8, a bias."""
    world = dist.get_world_size()
    tried = []
    meshes = [(init_device_mesh("cpu", (world,)), CASES), (init_device_mesh("cpu", (world // 2, 2)), ON_TWO)]
    for mesh, cases in meshes:
        for name, case in cases.items():
            for has_bias, is_int8 in ((True, True), (False, True), (True, False))[:of_each]:
                try:
                    one_case(mesh, case, has_bias, is_int8)
                except Exception as error:
                    raise AssertionError(f"{name}, bias {has_bias}, int8 {is_int8}, {mesh}: {error}") from error
                tried.append(name)
    return tried


FULL = pytest.mark.full


@pytest.mark.slow
@pytest.mark.parametrize(("world", "of_each"), [pytest.param(2, 3, marks=FULL), (4, 1), pytest.param(4, 3, marks=FULL)])
def test_a_cut_layer_computes_what_the_whole_one_does(world, of_each):
    """Two ranks have a mesh dimension of size 1 beside the one that cuts."""
    tried = run(all_cases, world, of_each=of_each)
    assert len(tried[0]) == of_each * (len(CASES) + len(ON_TWO))


def uneven_floats():
    """How far ``local_linear`` is from DTensor's own operations, of parts of unlike and no size: the output and all
    gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for rows, columns in ((10, 7), (3, 9)):
        for name in ("columns", "rows", "neither"):
            placements, given, *_ = CASES[name]
            results = []
            for product in (nn.functional.linear, lambda x, W, b: local_linear(x, W, b, nn.functional.linear)):
                W = distribute_tensor(drawn((rows, columns), "W"), mesh, placements).requires_grad_()
                b = distribute_tensor(drawn((rows,), "b"), mesh, [OUTPUTS if name == "columns" else R]).requires_grad_()
                x = distribute_tensor(drawn((2, 5, columns), "x"), mesh, given).requires_grad_()
                y = product(x, W, b)
                (y.full_tensor() * drawn((2, 5, rows), "dY")).sum().backward()
                results.append([whole(each) for each in (y, x.grad, W.grad, b.grad)])
            found[rows, columns, name] = [
                float((one - other).norm() / other.norm()) for one, other in zip(*results, strict=True)
            ]
    return found


def test_uneven_parts_of_floats_agree_with_dtensors_own_products():
    """A shape that is guessed from the local one would be wrong. What differs is the order of sums."""
    for found in run(uneven_floats, 4):
        assert len(found) == 6
        assert {name: errors for name, errors in found.items() if max(errors) > 3e-7} == {}


def refused():
    """What is said of layouts that have no local product, and of what is no DTensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    other = init_device_mesh("cpu", (dist.get_world_size(), 1))
    x, W = drawn((5, IN), "x"), drawn((OUT, IN), "W")
    cut, given = distribute_tensor(W, mesh, [OUTPUTS]), distribute_tensor(x, mesh, [R])
    short = DTensor.from_local(x[:, : IN // 2 - 1], mesh, [INPUTS])
    tried = {
        "plain input": (x, cut, None),
        "plain bias": (given, cut, drawn((OUT,), "b")),
        "another mesh": (distribute_tensor(x, other, [R, R]), cut, None),
        "sums": (given, DTensor.from_local(W, mesh, [P]), None),
        "features": (short, distribute_tensor(W, mesh, [INPUTS]), None),
    }
    found = {}
    for name, arguments in tried.items():
        try:
            local_linear(*arguments, nn.functional.linear)
        except RuntimeError as error:
            found[name] = str(error)
    return found


def test_what_has_no_local_product_is_refused():
    for found in run(refused, 2):
        words = {
            "plain input": "its input is a plain tensor",
            "plain bias": "its bias is a plain tensor",
            "another mesh": "bring both to one mesh",
            "sums": "a product knows Shard(0), Shard(1) and Replicate()",
            "features": "its input's part here is (5, 15)",
        }
        assert found.keys() == words.keys()
        for name, text in found.items():
            assert "weight of shape (24, 32)" in text
            assert words[name] in text


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(IN, 48), nn.Linear(48, IN)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


def styles():
    """A block under ``parallelize_module``, in bfloat16, under autocast, recomputed, and with sequences that are cut;
    its weights are made int8 afterwards."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name in ("plain", "sequence", "bfloat16", "autocast", "recomputed"):
        results = []
        for parallel in (False, True):
            dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
            block = Block()
            for key, each in block.named_parameters():
                each.data = drawn(tuple(each.shape), key).to(dtype)
            layouts = [Shard(1)] if name == "sequence" else [R]
            if parallel:
                plan = {
                    "up": ColwiseParallel(input_layouts=layouts[0]),
                    "down": RowwiseParallel(output_layouts=layouts[0]),
                }
                parallelize_module(block, mesh, plan)
            for layer in (block.up, block.down):
                W = layer.weight
                part = int8_part(W, W.shape, W.stride()) if parallel else Int8Weight.of(W, GROUP)
                layer.weight = nn.Parameter(part)
                layer.__class__ = Int8Linear
            x = drawn((2, 8, IN), "x").to(dtype)
            if parallel and name == "sequence":
                x = x.chunk(world, 1)[dist.get_rank()].clone()
            x.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
                y = checkpoint(block, x, use_reentrant=False) if name == "recomputed" else block(x)
            dY = drawn((2, 8, IN), "dY")
            if parallel and name == "sequence":
                dY = dY.chunk(world, 1)[dist.get_rank()]
            (y * dY).sum().backward()
            ours = {key: whole(each.grad) for key, each in block.named_parameters()} | {"y": y, "x": x.grad}
            if parallel and name == "sequence":
                for key in ("y", "x"):
                    ours[key] = DTensor.from_local(ours[key], mesh, [Shard(1)]).full_tensor()
            results.append(ours)
        plain, parts = results
        assert plain.keys() == parts.keys()
        found[name] = max(float((parts[key] - plain[key]).norm() / plain[key].norm()) for key in plain)
    return found


def test_int8_layers_under_parallelize_module():
    bounds = {"plain": 1e-6, "sequence": 1e-6, "recomputed": 1e-6, "bfloat16": 8e-3, "autocast": 8e-3}
    for found in run(styles, 2):
        assert found.keys() == bounds.keys()
        assert {name: error for name, error in found.items() if error > bounds[name]} == {}
