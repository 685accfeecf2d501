"""``torch.compile`` of models with int8 weights: the numbers of eager, in one graph, which is compiled once."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from compile_cases import WIDTH, batch, bits, graphs, loss_of, model_of, optimizer_of, same, start_counting, train

from apollo_triton.int8.products import int8_input_gradient, int8_linear
from apollo_triton.int8.weight import Int8Weight


@pytest.fixture
def counters():
    yield start_counting()
    torch._dynamo.reset()


CASES = {
    "checkpointed, some frozen": {"checkpointed": True, "frozen": True},
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, without a bias": {"dtype": torch.float16, "bias": False},
    "autocast": {"autocast": True},
    "inductor": {"compiler": "inductor"},
    "inductor, bfloat16": {"compiler": "inductor", "dtype": torch.bfloat16},
    "inductor, checkpointed": {"compiler": "inductor", "checkpointed": True},
}
FAST = "checkpointed, some frozen"


@pytest.mark.slow
@pytest.mark.parametrize("case", [FAST, *(pytest.param(n, marks=pytest.mark.full) for n in CASES if n != FAST)])
def test_a_compiled_model_trains_as_in_eager(case, counters):
    """Weights that the graph keeps as they once were, or a graph for every step; the derivative of one argument for
    another's; a cast left out. The same bits, except where inductor rounds what it fuses between the products."""
    options = dict(CASES[case])
    compiler, dtype = options.pop("compiler", "aot_eager"), options.get("dtype", torch.float32)
    autocast, frozen = options.pop("autocast", False), options.pop("frozen", False)
    if compiler == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        pytest.skip("inductor needs a C++ compiler here")
    ends, gradients = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Int8Weight does not implement")  # a name for the compiler's cache
        for compiled in (False, True):
            model = model_of(**options)
            model.layers[0].down.weight.requires_grad_(not frozen)
            before, optimizer = bits(model), optimizer_of(model)
            forward = torch.compile(model, backend=compiler, fullgraph=True) if compiled else model
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss_of(forward, batch(7, dtype)).backward()
                gradients.append([p.grad.double() for p in model.parameters() if p.requires_grad])
                optimizer.zero_grad()
                losses = train(forward, optimizer, 3, dtype)
            assert not same(bits(model), before)
            ends.append([torch.tensor(losses), *bits(model)])
    if compiler == "aot_eager":
        assert same(*gradients)
        assert same(*ends)
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).norm() <= 8 * torch.finfo(dtype).eps * theirs.norm()
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert graphs(counters) == 1


@pytest.mark.slow
def test_what_changes_a_weight_is_seen(counters):
    """A state_dict, other values, other gradients wanted, a batch of another size: stale parts, or ones of another
    group size under the same graph."""
    model, other = model_of(blocks=1), model_of(blocks=1)
    for layer in other.layers:
        layer.up.weight.data = torch.randn(2 * WIDTH, WIDTH)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)

    def is_eager(rows=3):
        found, expected = forward(batch(0, rows=rows)), model(batch(0, rows=rows))
        return torch.equal(found, expected) and found.requires_grad == expected.requires_grad

    assert is_eager()
    first = forward(batch(0))
    model.load_state_dict(other.state_dict())
    assert is_eager()
    assert not torch.equal(first, forward(batch(0)))
    model.layers[0].down.weight.data = torch.randn(WIDTH, 2 * WIDTH)
    assert is_eager()
    model.load_state_dict(model_of(blocks=1).state_dict(), assign=True)
    assert is_eager()
    assert torch.equal(first, forward(batch(0)))
    assert graphs(counters) == 1
    model.layers[0].up.weight.data = Int8Weight.of(torch.randn(2 * WIDTH, WIDTH), 64)
    assert is_eager()
    assert is_eager(rows=4)
    with torch.no_grad():
        assert is_eager()


@pytest.mark.slow
def test_a_graph_is_not_compiled_for_parts_that_do_not_fit(counters):
    """Within a graph nothing looks at them any more, and kernels would read beyond their ends."""
    model = model_of(blocks=1)
    weight = model.layers[0].up.weight
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    forward(batch(0))
    for name, part in (("scale", weight.scale[:-1]), ("zero", weight.zero.int()), ("scale", weight.scale.double())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight, name, part)
            with pytest.raises(RuntimeError) as caught:
                forward(batch(0))
            assert f"needs a contiguous {name} of" in "".join(map(str, (caught.value, caught.value.__cause__)))
    forward(batch(0))
    on_meta = Int8Weight.of(torch.empty(6, 8, device="meta"), 8)
    with pytest.raises(RuntimeError, match=r"cannot be multiplied: .* int8 weight of \(6, 8\)"):
        torch.nn.functional.linear(torch.empty(3, 6, device="meta"), on_meta)


OPERANDS = [((2, 3, 8), torch.bfloat16, True), ((3, 8), torch.float32, False), ((0, 8), torch.float32, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "operands", [OPERANDS[0], *(pytest.param(each, marks=pytest.mark.full) for each in OPERANDS[1:])]
)
def test_pytorch_finds_nothing_wrong_with_the_operators(operands):
    """What a compiler is told of them: shapes, strides, dtypes, that nothing is written or shared, any batch size."""
    shape, dtype, with_bias = operands
    weight = Int8Weight.of(torch.randn(6, 8), 16)
    parts = weight.q, weight.scale, weight.zero
    bias = torch.randn(6, dtype=dtype) if with_bias else None
    torch.library.opcheck(int8_linear, (torch.randn(shape).to(dtype), *parts, bias, 16))
    torch.library.opcheck(int8_input_gradient, (torch.randn(*shape[:-1], 6).to(dtype), *parts, 16))


@pytest.mark.slow
def test_a_graph_launches_the_kernels(counters):
    """The loop over blocks traced into the graph, or one backend chosen while there are no addresses."""
    pytest.importorskip("triton")
    from int8_linear_cases import on_kernels

    model = model_of(blocks=1)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    forward(batch(0)).sum().backward()  # compiled where no kernels run
    gradients = []
    for each in (forward, model):
        x = batch(0).requires_grad_()
        with on_kernels() as recorder:
            each(x).square().sum().backward()
        if recorder:
            names = [launch.kernel for launch in recorder.launches]
            assert names == ["forward_kernel"] * 2 + ["input_gradient_kernel"] * 2
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_compilers_cache_tells_weights_apart():
    """A graph on disk that was compiled for another group size or dtype, or one for each value."""

    def key(group_size=8, dtype=torch.float32, **options):
        return Int8Weight.of(torch.randn(4, 8, dtype=dtype), group_size, **options)._stable_hash_for_caching()

    weight = torch.nn.Parameter(Int8Weight.of(torch.randn(4, 8), 8))
    keys = [key(), key(16), key(dtype=torch.bfloat16), weight._stable_hash_for_caching()]
    assert len(set(keys)) == 4
    assert key() == keys[0]


def test_an_exported_model_has_the_operators():
    model = model_of(blocks=1)
    program = torch.export.export(model, (batch(0),))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(int8_linear) == 2
    assert torch.equal(program.module()(batch(1)), model(batch(1)))
