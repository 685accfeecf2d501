"""Where this package departs from apollo-torch 1.0.3 on purpose: a test or two per row of the specification's table.

``check`` takes the optimizer class and asserts what this package promises. ``departs`` runs it on both: it must pass
here and fail there, in the expected way, so that each row is a difference that exists.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
import torch.distributed as dist
from official import (
    LR,
    alone,
    close,
    departs,
    exact,
    gradients,
    group,
    several,
    share_projection,
    tensors_of,
    train,
    weight,
)
from oracle import oracle_adamw
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.reference import verbs as reference

APOLLO, MINI = {}, {"scale_type": "tensor", "rank": 1, "scale": 128.0}
APOLLO_AND_MINI = pytest.mark.parametrize("keys", [APOLLO, MINI], ids=["apollo", "mini"])


@pytest.fixture(autouse=True)
def shared_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no difference seen here is one of random numbers."""
    share_projection(monkeypatch, 0)


@APOLLO_AND_MINI
@pytest.mark.parametrize("zero_steps", [(0,), (3,), (0, 1, 4)], ids=repr)
def test_zero_gradient(keys: dict, zero_steps: tuple[int, ...]) -> None:
    """An all-zero gradient leaves u_prev as it was."""

    def check(kind: type) -> None:
        start, sequence = weight(8, 5), gradients(8, 5)
        for step in zero_steps:
            sequence[step].zero_()
        assert close(alone(kind, start, sequence, **keys), exact(start, sequence, **keys), start), "stuck"

    departs(check, AssertionError, "stuck")


@APOLLO_AND_MINI
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("values_are_read", [True, False], ids=["as on a CPU", "as on a device"])
def test_non_finite_gradient(
    keys: dict, dtype: torch.dtype, value: float, values_are_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It moves nothing and spoils no state, the skip is counted, and its neighbours do not notice."""
    if not values_are_read:  # the reference backend reads flags where they are host memory
        monkeypatch.setattr(reference, "_on_host", lambda values: None)

    def check(kind: type, bad: int) -> None:
        # 0 and 1 share a batch, 2 keeps columns, 3 is dense.
        parameters = [weight(*shape, dtype=dtype) for shape in ((8, 5), (8, 5), (5, 8), (8,))]
        starts = [each.detach().clone() for each in parameters]
        sequences = [gradients(*each.shape, dtype=dtype, seed=seed) for seed, each in enumerate(parameters)]
        sequences[bad][2].view(-1)[3] = value
        options = {"weight_decay": 0.1}
        optimizer = several(kind, parameters, options, **keys)
        for step in range(7):
            before = [each.detach().clone() for each in parameters]
            train(optimizer, parameters, [given[step : step + 1] for given in sequences])
            assert all(each.isfinite().all() for each in parameters), "a weight is spoilt"
            assert all(each.isfinite().all() for each in tensors_of(dict(optimizer.state)))
            moved = [not torch.equal(old, new) for old, new in zip(before, parameters, strict=True)]
            assert moved == [step != 2 or index != bad for index in range(4)]
        assert optimizer.skipped_updates == 1
        for index in {0, 1, 2} - {bad}:
            assert torch.equal(parameters[index], alone(kind, starts[index], sequences[index], options, **keys))

    for bad in (0, 2, 3):
        departs(check, AssertionError, "a weight is spoilt", bad)


CLIPPING = {"max_grad_norm": 0.5}
BFLOAT16_STATE = {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "weight_decay": 0.1}


@pytest.mark.parametrize(("options", "keys"), [(CLIPPING, {}), (CLIPPING, BFLOAT16_STATE), ({}, {"proj": "svd"})])
def test_non_finite_gradient_under_our_own_options(options: dict, keys: dict) -> None:
    """Clipping leaves the bad gradient out of its norm, svd refreshes P from it, and of an expert tensor only the bad
    expert is skipped."""
    parameters, sequences = [weight(3, 8, 5), weight(4)], [gradients(3, 8, 5), gradients(4)]
    for step, expert in ((0, 1), (3, 1), (4, 2)):  # steps 0 and 3 refresh P
        sequences[0][step][expert, 2, 2] = math.inf
    sequences[1][1][0] = math.nan
    optimizer = several(APOLLOAdamW, parameters, options, **keys)
    for step in range(7):
        before = [each.detach().clone() for each in parameters]
        train(optimizer, parameters, [given[step : step + 1] for given in sequences])
        moved = [not torch.equal(before[0][expert], parameters[0][expert]) for expert in range(3)]
        assert moved == [bool(sequences[0][step][expert].isfinite().all()) for expert in range(3)]
        assert torch.equal(before[1], parameters[1]) == (step == 1)
        assert all(each.isfinite().all() for each in (*parameters, *tensors_of(dict(optimizer.state))))
    assert optimizer.skipped_updates == 4


class NoSync(TorchDispatchMode):
    """Raises at the operator behind ``item()``, ``bool()`` and ``float()``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a host sync"
        return func(*args, **(kwargs or {}))


SYNC_OPTIONS = [
    (torch.float32, {}),
    (torch.bfloat16, {"weight_decay": 0.1}),
    (torch.float32, CLIPPING),
    (torch.bfloat16, BFLOAT16_STATE | CLIPPING),
    (torch.float32, {"seed_per_param": True, "scale_front": True, "correct_bias": False}),
]


@pytest.mark.slow
@APOLLO_AND_MINI
@pytest.mark.parametrize(("dtype", "options"), SYNC_OPTIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_host_sync(keys: dict, dtype: torch.dtype, options: dict, device: str, monkeypatch: Any) -> None:
    """A step never waits for the device. On the CPU the operator that reads a value raises. ``meta`` tensors have no
    values, so what an accelerator would run raises there if it reads one, in any way (``tolist``, ``to("cpu")``)."""
    if device == "meta":  # autocast, which is not what is tested, does not know this device
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())

    def check(kind: type) -> None:
        parameters = [Parameter(weight(*shape).to(device, dtype)) for shape in ((8, 5), (5, 8), (8, 5), (8,))]
        optimizer = several(kind, parameters, options, **keys)
        for step in range(5):  # the limiter starts at step 1; P changes at step 3
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            # The first step draws the seeds of ``seed_per_param``, on the host whatever the device.
            with NoSync() if device == "cpu" and step > 0 else contextlib.nullcontext():
                optimizer.step()

    if options.keys() <= {"weight_decay"}:
        departs(check, *((AssertionError, "a host sync") if device == "cpu" else (RuntimeError, "meta tensor")))
    else:
        check(APOLLOAdamW)


@APOLLO_AND_MINI
def test_state_is_float32_for_bfloat16_weights(keys: dict) -> None:
    """Moments and u_prev, after a step and after a load."""

    def check(kind: type) -> None:
        parameters = [weight(8, 5, dtype=torch.bfloat16), weight(8, dtype=torch.bfloat16)]
        sequences = [gradients(*each.shape, dtype=torch.bfloat16) for each in parameters]
        optimizer = several(kind, parameters, {}, **keys)
        for _ in range(2):
            train(optimizer, parameters, sequences)
            assert {each.dtype for each in tensors_of(dict(optimizer.state))} == {torch.float32}, "bfloat16 state"
            optimizer.load_state_dict(optimizer.state_dict())  # torch.optim's own casts to the parameter's dtype

    departs(check, AssertionError, "bfloat16 state")


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6), (3, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_every_side(shape: tuple[int, int], proj_type: str, scale_type: str) -> None:
    """Where the official code takes the wrong axis it crashes, or broadcasts where the rank equals a dimension."""

    def check(kind: type) -> None:
        start, sequence, keys = weight(*shape), gradients(*shape), {"proj_type": proj_type, "scale_type": scale_type}
        assert close(alone(kind, start, sequence, **keys), exact(start, sequence, **keys), start), "wrong values"

    tall = shape[0] >= shape[1]
    if scale_type == "channel" and proj_type in ("reverse_std", "left" if tall else "right"):
        departs(check, (RuntimeError, AssertionError), "size of tensor|wrong values")
    else:
        check(APOLLOAdamW)


@APOLLO_AND_MINI
def test_state_loads_with_weights_only(keys: dict) -> None:
    """State is tensors and numbers: a file that may run code is not needed. What it resumes to: test_resume.py."""
    shapes = [(8, 5), (5, 8), (8,)]

    def check(kind: type) -> None:
        parameters, file = [weight(*shape) for shape in shapes], io.BytesIO()
        optimizer = several(kind, parameters, {}, **keys)
        train(optimizer, parameters, [gradients(*shape, steps=2) for shape in shapes])
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        several(kind, parameters, {}, **keys).load_state_dict(torch.load(file, weights_only=True))

    departs(check, UnpicklingError, "Weights only load failed")


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
def test_state_bytes(shape: tuple[int, int]) -> None:
    """P is not stored: the bytes are those of two moments ``[channels, rank]``, u_prev and step, in float32."""

    def check(kind: type) -> None:
        parameter = weight(*shape)
        optimizer = kind([group(parameter)], lr=LR)
        train(optimizer, [parameter], [gradients(*shape)])
        state = optimizer.state_dict()["state"][0]
        stored = sum(each.untyped_storage().nbytes() for each in tensors_of(state))
        assert stored == 4 * (2 * 40 * 3 + 2), "more than the moments"
        assert all(isinstance(value, (Tensor, int, float)) for value in state.values())

    departs(check, AssertionError, "more than the moments")


@APOLLO_AND_MINI
@pytest.mark.parametrize("flag", ["scale_front", "disable_nl"])
def test_flags_in_a_group(keys: dict, flag: str) -> None:
    """A group's flag wins over the constructor's, bit for bit as if it had been given there."""

    def check(kind: type) -> None:
        start, sequence = weight(8, 5), gradients(8, 5, steps=12)
        scaled = keys | {"scale": 3.0}  # an irrational root, so that its place shows in the last bits
        without, with_flag = (alone(kind, start, sequence, {flag: value}, **scaled) for value in (False, True))
        assert not torch.equal(without, with_flag)
        for value, expected in ((True, with_flag), (False, without)):
            found = alone(kind, start, sequence, {flag: not value}, **scaled, **{flag: value})
            assert torch.equal(found, expected), "the flag is ignored"

    departs(check, AssertionError, "the flag is ignored")


def test_omitted_keys() -> None:
    """``rank`` alone means the paper's APOLLO: std, channel, scale 1, a new P after 200 steps."""

    def check(kind: type) -> None:
        short, full = weight(6, 4), weight(6, 4)
        sequence = gradients(6, 4, steps=205)
        train(kind([{"params": [short], "rank": 2}], lr=LR), [short], [sequence])
        train(kind([group(full, rank=2, update_proj_gap=200)], lr=LR), [full], [sequence])
        assert torch.equal(short, full)

    departs(check, KeyError, "proj")


@pytest.mark.parametrize("late", ["add_param_group", "unfreeze"])
def test_late_parameters(late: str) -> None:
    """A parameter that joins after 4 steps moves as one that has an optimizer for itself: its own t, its own epoch."""

    def check(kind: type) -> None:
        early, joining, start = weight(8, 5), weight(8, 5), weight(8, 5).detach()
        joining.requires_grad_(late != "unfreeze")
        early_gradients, joining_gradients = gradients(8, 5, steps=11), gradients(8, 5, seed=2)
        optimizer = kind([group(early, joining) if late == "unfreeze" else group(early)], lr=LR)
        train(optimizer, [early], [early_gradients[:4]])
        assert torch.equal(joining, start)
        if late == "unfreeze":
            joining.requires_grad_(True)
        else:
            optimizer.add_param_group(group(joining))
        train(optimizer, [early, joining], [early_gradients[4:], joining_gradients])
        assert torch.equal(early, alone(kind, start, early_gradients))
        assert torch.equal(joining, alone(kind, start, joining_gradients))

    departs(check, KeyError, None)


def test_closure_runs_with_gradients_enabled() -> None:
    def check(kind: type) -> None:
        parameter, start, target = weight(8, 5), weight(8, 5).detach(), torch.ones(8, 5)
        optimizer = kind([group(parameter)], lr=LR)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (parameter * target).sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) == start.sum()
        assert torch.equal(parameter, alone(kind, start, [target]))

    departs(check, RuntimeError, "does not require grad")


@APOLLO_AND_MINI
def test_vectors_are_dense_adamw(keys: dict) -> None:
    def check(kind: type) -> None:
        start, sequence, options = weight(8), gradients(8), {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-4}
        expected = oracle_adamw(start, sequence, LR, **options)
        assert close(alone(kind, start, sequence, options, **keys), expected, start)

    departs(check, IndexError, "tuple index out of range")


@APOLLO_AND_MINI
@pytest.mark.parametrize("shape", [(4, 8, 5), (4, 5, 8), (1, 6, 6)], ids=str)
@pytest.mark.parametrize("proj", ["random", "svd"])
def test_experts_are_matrices_of_their_own(keys: dict, shape: tuple[int, ...], proj: str) -> None:
    """Bit for bit; the experts' gradients differ in size, so a limiter or a factor shared between them would show."""

    def check(kind: type) -> None:
        start, options = weight(*shape), {"weight_decay": 0.1}
        sizes = torch.tensor([1.0, 100.0, 0.0, 1e-3][: shape[0]])[:, None, None]
        sequence = [gradient * sizes * (step + 1) for step, gradient in enumerate(gradients(*shape))]
        together = alone(kind, start, sequence, options, proj=proj, **keys)
        for expert in range(shape[0]):
            of_expert = [gradient[expert] for gradient in sequence]
            assert torch.equal(together[expert], alone(kind, start[expert], of_expert, options, proj=proj, **keys))

    departs(check, RuntimeError, "size")


@APOLLO_AND_MINI
@pytest.mark.parametrize(("shape", "layout"), [
    ((8, 3, 2, 2), torch.contiguous_format), ((8, 3, 2, 2), torch.channels_last), ((4, 3, 3, 3), torch.channels_last),
    ((8, 2, 2, 1, 2), torch.contiguous_format), ((8, 2, 2, 1, 2), torch.channels_last_3d),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolutions_are_flattened(keys: dict, shape: tuple, layout: torch.memory_format, dtype: torch.dtype) -> None:
    def check(kind: type) -> None:
        start, sequence, options = weight(*shape, dtype=dtype), gradients(*shape, dtype=dtype), {"weight_decay": 0.1}
        flat = alone(kind, start.flatten(1), [gradient.flatten(1) for gradient in sequence], options, **keys)
        start, *sequence = (each.detach().to(memory_format=layout) for each in (start, *sequence))
        assert torch.equal(alone(kind, start, sequence, options, **keys), flat.view(shape)), "wrong values"

    # It crashes or, where sizes happen to agree, multiplies the last two dimensions.
    departs(check, (RuntimeError, AssertionError), "size|shapes|wrong values")


@pytest.fixture
def dtensor() -> Iterator[Parameter]:
    """A weight as FSDP2 and tensor parallel give it to the optimizer, in a world of one process (no network)."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield Parameter(distribute_tensor(torch.ones(8, 5), init_device_mesh("cpu", (1,)), [Replicate()]))
    dist.destroy_process_group()


def flat_parameter(mark: str) -> Parameter:
    """A flattened shard as FSDP1 gives it to the optimizer: a vector with one of FSDP's marks on it."""
    parameter = weight(40)
    setattr(parameter, mark, True)
    return parameter


def refuses(kind: type, parameter: Parameter, match: str, **keys: Any) -> None:
    """An error that says what it is about and what to do, before anything has changed."""
    with pytest.raises(ValueError, match=match):
        kind([group(parameter, **keys)])
    optimizer = kind([group(weight(8, 5))])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group(group(parameter, **keys))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (2, 8, 5)], ids=str)
def test_rank_above_width(shape: tuple[int, ...]) -> None:
    match = r"(?=.*rank 6\b)(?=.*width 5\b)(?=.*without 'rank')"
    departs(refuses, pytest.fail.Exception, "DID NOT RAISE", weight(*shape), match, rank=6)
    APOLLOAdamW([group(weight(*shape), rank=5)])  # all of the width is allowed


def test_dtensor(dtensor: Parameter) -> None:
    """Trained as the tensor it stands for; on several ranks in test_sharding.py."""

    def check(kind: type) -> None:
        start, sequence = dtensor.to_local().detach().clone(), gradients(8, 5)
        placed = [distribute_tensor(each, dtensor.device_mesh, [Replicate()]) for each in sequence]
        optimizer = kind([group(dtensor)], lr=LR)
        train(optimizer, [dtensor], [placed])
        assert torch.equal(dtensor.to_local(), alone(kind, start, sequence))

    departs(check, RuntimeError, "mixed torch.Tensor and DTensor")


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened"])
def test_flat_shard(mark: str) -> None:
    """FSDP1 marks its one flat parameter ``_is_flat_param``, and with ``use_orig_params=True``, where it hands out one
    vector per weight, each of them ``_fsdp_flattened``."""
    match = "flattened FSDP shard.*without 'rank'"
    departs(refuses, pytest.fail.Exception, "DID NOT RAISE", flat_parameter(mark), match)
    APOLLOAdamW([{"params": [flat_parameter(mark)]}])  # a dense group may have it
