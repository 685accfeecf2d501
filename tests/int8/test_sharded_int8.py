"""Int8 weights under FSDP2, HSDP and tensor parallel: what is gathered and trained, and what is refused.

Beside each sharded model every rank keeps an int8 copy that is not sharded, which another optimizer moves by the
gathered gradients of the sharded one. So gradients are the same to the bit, and what differs is the shards' alone.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed as dist
from distributed_cases import Collectives, drawn, gradient_of, needs_fsdp_on_a_cpu, sharded, whole
from distributed_harness import run
from int8_models import bits, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from apollo_triton import APOLLOAdamW, attach_layerwise, dequantize_model, quantize_model
from apollo_triton.core.dtensors import local_slices
from apollo_triton.core.geometry import Geometry
from apollo_triton.int8.weight import Int8Weight, int8_weight_of
from apollo_triton.params.sharding import local_shard

GROUP = 8
# Without the limiter, whose sums over ranks are rounded in another order, nothing depends on the ranks where rows are
# kept and cut: not a bit.
LOW_RANK = {"rank": 4, "update_proj_gap": 2, "weight_decay": 0.1, "disable_nl": True}


class Net(nn.Module):
    """``up`` keeps its rows, so that FSDP2 leaves its sketch local; ``down`` keeps its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(x + self.down(self.up(x).relu()))


def floats(seed=0):
    model = Net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name, seed) * 0.3)
    return model


def net(group_size=GROUP, seed=0):
    return quantize_model(floats(seed), ["up", "down"], group_size=group_size)


def optimizer_of(model, backend="auto"):
    low_rank = {"params": [model.up.weight, model.down.weight], **LOW_RANK}
    rest = [each for name, each in model.named_parameters() if name not in ("up.weight", "down.weight")]
    return APOLLOAdamW([low_rank, {"params": rest}], lr=1e-2, backend=backend)


def with_fsdp(model, mesh, **options):
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def inputs(step, rank=0):
    return drawn((6, 16), "x", step, rank)


def full_bits(model):
    """The state_dict, gathered."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def floats_of(model):
    """The values of both int8 weights, from the gathered parts."""
    found = {}
    for name in ("up", "down"):
        layer = getattr(model, name)
        q, scale, zero = (whole(getattr(layer, part)) for part in ("weight_q", "weight_scale", "weight_zero"))
        group_size = q.numel() // scale.numel()
        found[name] = Int8Weight(q, scale.view(-1), zero.view(-1), group_size, torch.float32).dequantize()
    return found


def apart(ours, theirs):
    return {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}


def beside_a_plain_copy(model, plain, steps, backend, source):
    """Trains both, and returns by how much their weights differ."""
    optimizer, shadow = optimizer_of(model, backend), optimizer_of(plain, backend)
    for step in range(steps):
        model(inputs(step, source)).square().mean().backward()
        for parameter, copied in zip(model.parameters(), plain.parameters(), strict=True):
            copied.grad = whole(parameter.grad)
        optimizer.step()
        shadow.step()
        optimizer.zero_grad()
    return apart(floats_of(model), floats_of(plain))


def under_fsdp(steps=2):
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    with Collectives() as collectives:
        with_fsdp(net(), mesh)(inputs(0))
    results["gathered"] = collectives.total, sum(collectives.filled.values())
    for backend in ("reference", "triton"):
        plain = net()
        model = with_fsdp(copy.deepcopy(plain), mesh)
        results["bits", backend] = torch.equal(model(inputs(0)), plain(inputs(0)))
        results["apart", backend] = beside_a_plain_copy(model, plain, steps, backend, rank)
    plain = net()
    model = with_fsdp(copy.deepcopy(plain), mesh)
    with torch.inference_mode():
        results["inference mode"] = torch.equal(model(inputs(0)), plain(inputs(0)))
    one = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replica", "shard"))
    plain = net()
    model = with_fsdp(copy.deepcopy(plain), one)
    results["one shard"] = beside_a_plain_copy(model, plain, steps, "reference", rank) == {"up": 0, "down": 0}
    results["forward of one shard"] = torch.equal(model(inputs(0)), plain(inputs(0)))
    half = net().to(torch.bfloat16)
    for again in (True, False):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = with_fsdp(net(), mesh, mp_policy=policy, reshard_after_forward=again)
        outputs = [model(inputs(step)) for step in range(2)]  # the second looks at the first one's buffers
        sum(output.float().square().mean() for output in outputs).backward()
        results["bfloat16", again] = all(
            torch.equal(output, half(inputs(step).bfloat16())) for step, output in enumerate(outputs)
        )
        results["gradient", again] = model.up.weight.grad.dtype == model.up.weight.dtype == torch.float32
        results["same bits", again] = same(full_bits(model), bits(net()))
    return results


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_fsdp():
    """Floats that travel instead of codes; bits of rounding drawn as of a weight that begins at 0; an activation dtype
    that changes the weights; a view that ``inference_mode`` refuses; buffers that a second forward does not find
    filled; a mesh of one shard, of which FSDP2 copies the codes alone."""
    for results in run(under_fsdp, 2):
        # Codes, and 4 + 1 bytes of each of the 64 groups, of two weights; biases, and the head padded to 4 rows.
        assert results.pop("gathered") == (3, 2 * (512 + 64 * 5) + 4 * (32 + 16) + 4 * (4 * 16 + 4))
        for backend in ("reference", "triton"):
            found = results.pop(("apart", backend))
            assert found["up"] == 0
            assert found["down"] < 1e-6
        assert all(results.values()), results


CUTS = {1: ("0", "1", "r"), 2: ("00", "01", "10", "0r")}
SHAPES = (64, 32), (32, 64)  # of which the first keeps rows, and the second columns


def stepped(shape, mesh, cut, backend, stochastic, steps=2):
    """A weight on ``mesh`` that is trained beside a whole one: this rank's part, how far it is from the whole one's,
    where it lies, and by which elements its bits of rounding are drawn."""
    theirs = nn.Parameter(Int8Weight.of(drawn(shape, "start"), GROUP, stochastic))
    placements = [{"0": Shard(0), "1": Shard(1), "r": Replicate()}[letter] for letter in cut]
    ours = nn.Parameter(distribute_tensor(theirs.detach(), mesh, placements))
    optimizers = [APOLLOAdamW([{"params": [each], **LOW_RANK}], lr=1e-2, backend=backend) for each in (ours, theirs)]
    for step in range(steps):
        theirs.grad = gradient_of("w", shape, step)
        ours.grad = sharded(theirs.grad, mesh, cut)
        for optimizer in optimizers:
            optimizer.step()
    here, slices = int8_weight_of(ours), local_slices(ours)
    here.check()
    shard = local_shard(ours, Geometry.of(shape, "std"))
    first = shard.rounding_offsets[0] * shard.geometry.width
    values = here.dequantize()
    return (
        values,
        float((values - theirs.dequantize()[slices]).abs().max()),
        str(slices),
        (first, first + len(values.view(-1))),
    )


def on_four_ranks():
    rank = dist.get_rank()
    mesh = {1: init_device_mesh("cpu", (4,)), 2: init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))}
    steps = {
        (shape, cut, backend, stochastic): stepped(shape, mesh[dimensions], cut, backend, stochastic)
        for dimensions, cuts in CUTS.items()
        for cut in cuts
        for shape in SHAPES
        for backend, stochastic in (("reference", False), ("reference", True), ("triton", True))
        if backend == "reference" or cut in ("1", "10")
    }
    # Whole models: replicas of shards, tensor parallel, and both.
    plain = net()
    model = with_fsdp(copy.deepcopy(plain), mesh[2])
    hybrid = beside_a_plain_copy(model, plain, 2, "reference", rank), full_bits(model)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    cut = {}
    for source in (0, None):
        for device in ("cpu", "meta"):
            model = net(seed=rank % 2 if source == 0 else 0).to(device)  # rank 0 sends its own, or all have the same
            parallelize_module(model, mesh[2]["shard"], plan, src_data_rank=source)
            shapes = [tuple(int8_weight_of(each.weight).shape) for each in (model.up, model.down)]
            cut[source, device] = shapes == [(16, 16), (16, 16)]
            if device == "cpu":
                ours, expected = full_bits(model), bits(net())
                cut[source, "bits"] = all(
                    torch.equal(ours[name], expected[name]) for name in ours if "head" not in name
                )
    model, plain = parallelize_module(net(), mesh[2]["shard"], plan), net()
    with torch.inference_mode():
        cut["inference mode"] = torch.allclose(model(inputs(0)), plain(inputs(0)), atol=1e-6)
    model = with_fsdp(parallelize_module(net(), mesh[2]["shard"], plan), mesh[2]["replica"])
    cut["both"] = same(full_bits(model), bits(net()))
    return steps, hybrid, cut


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_replicas_and_tensor_parallel():
    """Columns that are cut as rows are; codes of one rank with scales of another; bits of rounding that two ranks
    share, so that their errors do not cancel."""
    everywhere = run(on_four_ranks, 4)
    for rank, (steps, (hybrid, ours), cut) in enumerate(everywhere):
        assert hybrid["up"] == 0
        assert hybrid["down"] < 1e-6
        assert same(ours, everywhere[0][1][1])
        assert all(cut.values()), cut
        for (shape, kind, backend, stochastic), (values, difference, place, drawn_by) in steps.items():
            what = f"{shape} {kind} {backend} {stochastic}"
            same_bits = "1" not in kind  # whole rows are rounded as in the whole weight, columns by other bits
            if same_bits or not stochastic:
                is_local = shape[0] > shape[1] or kind == "r"
                assert difference == 0 if same_bits and is_local else difference < 1e-6, what
            assert (values - steps[shape, kind, "reference", stochastic][0]).abs().max() < 1e-6, what
            for other, (theirs, _, _) in enumerate(everywhere):
                _, _, other_place, other_drawn_by = theirs[shape, kind, backend, stochastic]
                if place == other_place:
                    assert drawn_by == other_drawn_by, what
                else:
                    assert drawn_by[1] <= other_drawn_by[0] or other_drawn_by[1] <= drawn_by[0], (what, rank, other)


REFUSED = {
    "uneven rows": (5, 16, 16, r"up\.weight of shape \(5, 16\) cannot be cut into 2 equal pieces along its 5 rows"),
    "a row": (1, 16, 16, r"cannot be cut into 2 equal pieces along its 1 rows"),
    "groups over ranks": (6, 16, 32, r"up\.weight .* groups of 32, .* 2 pieces of 3 rows; use .*group_size=16\)"),
    "groups over columns": (8, 16, 16, r"up\.weight .* groups of 16, .* 2 pieces of 8 columns; use .*group_size=8\)"),
    "uneven columns": (8, 15, 8, r"cannot be cut into 2 equal pieces along its 15 columns"),
}


def refused():
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name, (rows, columns, group_size, _) in REFUSED.items():
        for is_meta in (False, True):
            model = nn.ModuleDict({"up": nn.Linear(columns, rows)}).to("meta" if is_meta else "cpu")
            quantize_model(model, ["up"], group_size=group_size)
            before = model["up"].weight
            with Collectives() as collectives:
                try:
                    if "columns" in name:
                        parallelize_module(model, mesh, {"up": RowwiseParallel()})
                    else:
                        fully_shard(model["up"], mesh=mesh)
                    found[name, is_meta] = "taken"
                except ValueError as error:
                    found[name, is_meta] = str(error)
            assert collectives.total == 0
            assert model["up"].weight is before
    model = fully_shard(net(), mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    for name, call in {"placement": lambda: model(inputs(0)), "floats": lambda: dequantize_model(model)}.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    model = quantize_model(floats(), ["up", "down"], group_size=GROUP, stochastic_rounding=dist.get_rank() == 1)
    with_fsdp(model, mesh)
    model(inputs(0)).sum().backward()
    try:
        optimizer_of(model).step()
    except ValueError as error:
        found["ranks that differ"] = str(error)
    return found


@needs_fsdp_on_a_cpu
def test_what_cannot_be_cut_is_refused_on_all_ranks_before_anything_is_sent():
    """PyTorch's own assertion comes on the ranks that have padding alone, and the others wait for them."""
    found, other = run(refused, 2)
    assert found == other
    for name, (*_, text) in REFUSED.items():
        for is_meta in (False, True):
            assert re.search(text, found[name, is_meta]), found[name, is_meta]
    assert re.search(
        r"up\.weight of shape .* equal numbers of whole rows: leave shard_placement_fn out", found["placement"]
    )
    assert re.search(
        r"ranks 0 and 1 differ: .* stochastic_rounding=False.* on rank 0, .*=True", found["ranks that differ"]
    )
    assert re.search(r"up is sharded, .* torch\.distributed\.checkpoint", found["floats"])


def without_gradients(steps=2):
    """Tensor parallel layers that are updated from their operands, on both backends and beside a plain copy."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    plans = {
        "plain": {},
        "rows": {"up": ColwiseParallel(output_layouts=Replicate())},
        "both": {"up": ColwiseParallel(), "down": RowwiseParallel()},
    }
    for backend in ("reference", "triton"):
        for kind, plan in plans.items():
            model = net()
            if plan:
                parallelize_module(model, mesh, plan)
            optimizer = optimizer_of(model, backend)
            attach_layerwise(model, optimizer, gradients="none")
            for step in range(steps):
                model(inputs(step)).square().mean().backward()
                optimizer.step()
            found[backend, kind] = floats_of(model)
    return found


@pytest.mark.slow
def test_steps_without_gradients_draw_the_same_bits():
    """An index of rounding that counts from each shard's beginning, in the kernels that take X and dY."""
    (found, _) = run(without_gradients, 2)
    for backend in ("reference", "triton"):
        assert max(apart(found[backend, "plain"], found[backend, "rows"]).values()) < 1e-6
    assert max(apart(found["reference", "both"], found["triton", "both"]).values()) < 1e-6
