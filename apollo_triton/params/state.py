"""The optimizer's state of one parameter: made at its first step, and checked whenever a plan is made.

The state is tensors and numbers only. Low-rank moments are ``[channels, rank]``, whichever side is kept. P is not part
of the state, except with ``proj="svd"``. 8-bit moments have names of their own, because
``torch.distributed.checkpoint`` casts what it finds under a name, and would read codes as numbers. ``saved_state.py``
brings state back from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.dtensors import is_dtensor, local
from ..core.messages import shown
from ..core.philox import parameter_seed
from ..core.settings import Settings
from ..int8.weight import int8_weight_of
from .aliasing import address, overlaps_itself
from .blocks import SPANS_RANKS, absmax_shape, dense_absmax_shape, obstacle_to_8bit, shards_are_whole_blocks
from .member import CODES, Param, geometry_of, has_row_moments
from .sharding import LocalShard, local_shape, sharded_zeros, state_placement

# The names of the state's tensors, except ``step``, a scalar on the host.
MOMENTS = ("exp_avg", "exp_avg_sq")
ABSMAXES = ("exp_avg_absmax", "exp_avg_sq_absmax")  # with 8-bit moments, whose codes are under CODES
ALL_MOMENTS = (*MOMENTS, *CODES.values(), *ABSMAXES)
SHARDED = (*ALL_MOMENTS, "update_norm", "projection")  # DTensors if the weight is one
MOMENT_DTYPES = (torch.float32, torch.bfloat16)
STEP_LIMIT = 2**24  # where float32 stops counting: 2**24 + 1 is rounded to 2**24
SEED_LIMIT = 2**32


class Expected(NamedTuple):
    """What a tensor of the state is to be."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False


def state_shapes(parameter: Tensor, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shape of each state tensor of a parameter, except ``step`` and the absmax of 8-bit moments."""
    geometry = geometry_of(parameter, settings)
    if geometry is None:
        shape = tuple(parameter.shape)
        of_rows = (*shape[:1], *[1] * (len(shape) - 1))
        return {"exp_avg": shape, "exp_avg_sq": of_rows if has_row_moments(parameter, settings) else shape}
    experts = (geometry.matrices,) if geometry.matrices > 1 else ()
    rank = settings.rank or 0
    shapes = {
        "exp_avg": (*experts, geometry.channels, rank),
        "exp_avg_sq": (*experts, geometry.channels, rank),
        "update_norm": experts,
    }
    if settings.proj == "svd":
        shapes["projection"] = (*experts, rank, geometry.width)
    return shapes


def is_8bit(parameter: Tensor, settings: Settings, state: Mapping[str, Any]) -> bool:
    """Whether the parameter's moments are 8-bit or, before its first step, whether they will be."""
    if has_begun(state):
        return "exp_avg_q" in with_codes_named(state)
    return settings.state_bits == 8 and not obstacle_to_8bit(parameter, settings)


def with_codes_named(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state with its 8-bit moments under their names; older versions had them under those of floats."""
    if not any(getattr(state.get(name), "dtype", None) == torch.uint8 for name in MOMENTS):
        return state
    return {CODES.get(name, name): value for name, value in state.items()}


def has_begun(state: Mapping[str, Any] | None) -> bool:
    """Whether a parameter has state of ours, which may be broken. Other keys may be there before its first step."""
    return state is not None and any(name in state for name in ("step", "seed", *MOMENTS, *CODES.values()))


def expected_tensors(parameter: Tensor, settings: Settings, state: Mapping[str, Any]) -> dict[str, Expected]:
    """What each tensor of a state that has moments is to be, except ``step``.

    Both moments have one dtype: that of ``exp_avg``, if it is a possible one. Second moments of rows are float32.
    """
    found = getattr(state.get("exp_avg"), "dtype", None)
    tensors: dict[str, Expected] = {}
    for name, shape in state_shapes(parameter, settings).items():
        if name not in MOMENTS:
            # svd's projection is made where it is missing, since a group may change to svd at any time.
            tensors[name] = Expected(shape, (torch.float32,), optional=name == "projection")
        elif name == "exp_avg_sq" and has_row_moments(parameter, settings):
            tensors[name] = Expected(shape, (torch.float32,))
        elif is_8bit(parameter, settings, state):
            tensors[CODES[name]] = Expected(shape, (torch.uint8,))
            tensors[f"{name}_absmax"] = Expected(absmax_shape(parameter, settings), (torch.float32,))
        else:
            tensors[name] = Expected(shape, (found,) if found in MOMENT_DTYPES else MOMENT_DTYPES)
    return tensors


def make_state(param: Param, settings: Settings, shard: LocalShard) -> dict[str, Any]:
    """A new state: float32 ``step`` on the host, ``seed``, zero moments and, for low rank, a zero ``update_norm``
    (u_prev).

    Float moments of a dense weight have its memory layout. Moments of a ``DTensor`` are ``DTensor``s on the same mesh.
    8-bit moments are row-major and come with their absmaxes. svd's projection is added at the first gradient.
    """
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "seed": parameter_seed(settings.seed, param.index) if settings.seed_per_param else settings.seed,
    }
    parameter = param.tensor
    for name, (shape, dtypes, _) in expected_tensors(parameter, settings, {}).items():
        dtype = settings.state_dtype if dtypes == MOMENT_DTYPES else dtypes[0]
        if name in MOMENTS and shape == tuple(parameter.shape) and geometry_of(parameter, settings) is None:
            state[name] = torch.zeros_like(parameter, dtype=dtype)
        elif name == "projection":
            continue
        elif is_dtensor(parameter):
            state[name] = sharded_zeros(name, parameter, shard, shape, dtype)
        else:
            state[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
    return state


def state_without_memory(parameter: Tensor, settings: Settings, shard: LocalShard) -> dict[str, Tensor]:
    """The tensors that a parameter's state will hold, svd's projection included, on the meta device.

    Of a ``DTensor`` they are this rank's parts.
    """
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"step": ((), torch.float32)}
    for name, expected in expected_tensors(parameter, settings, {}).items():
        dtype = settings.state_dtype if expected.dtypes == MOMENT_DTYPES else expected.dtypes[0]
        shapes[name] = local_shape(name, parameter, shard, expected.shape), dtype
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}


def check_state(param: Param, state: Mapping[str, Any], settings: Settings, shard: LocalShard) -> None:
    """Raise ValueError unless the state is what the backends take for granted: shapes, dtypes, layouts, devices.

    Kernels get addresses. They would read a tensor of another dtype or device as if it were the right one, and write
    beyond its end. Other keys are ignored. ``check_count`` looks at the value of ``step``.
    """
    parameter, state = param.tensor, with_codes_named(state)
    check_8bit(param, state, settings)
    for name, expected in expected_tensors(parameter, settings, state).items():
        if expected.optional and name not in state:
            continue
        if name in ABSMAXES and geometry_of(parameter, settings) is None:
            expected = in_a_row_too(state.get(name), expected)  # ``lay_out`` brings them into shape
        check_tensor(param, state, name, expected)
        _check_changeable(param, name, state[name])
        _check_device(param, name, state[name])
        _check_placement(param, name, state[name], shard)
    check_tensor(param, state, "step", Expected((), (torch.float32,)))
    _check_changeable(param, "step", state["step"])
    if state["step"].device.type != "cpu":
        _check_device(param, "step", state["step"])
    seed = state.get("seed")
    check_seed(param, state, None if isinstance(seed, bool) else seed)


def in_a_row_too(value: Any, expected: Expected) -> Expected:
    """What absmaxes may be: as expected or, as those of older versions, the same numbers in a row."""
    if getattr(value, "shape", ()) != (prod(expected.shape),) or is_dtensor(value):
        return expected
    return expected._replace(shape=tuple(value.shape))


def check_tensor(param: Param, state: Mapping[str, Any], name: str, expected: Expected) -> None:
    """Raise ValueError unless a state's tensor is there, dense, and of the shape and a dtype that are expected."""
    if name not in state:
        raise ValueError(_complaint(param, name, "is missing"))
    value = state[name]
    if not isinstance(value, Tensor):
        raise ValueError(_complaint(param, name, f"is {shown(value)}, not a tensor"))
    if tuple(value.shape) != expected.shape:
        raise ValueError(_complaint(param, name, f"has shape {tuple(value.shape)}, not {expected.shape}"))
    problem = None
    if value.layout != torch.strided:
        problem = f"has layout {value.layout} (allowed: torch.strided, a dense tensor)"
    elif value.dtype not in expected.dtypes:
        allowed = " or ".join(str(dtype) for dtype in expected.dtypes)
        problem = f"has dtype {value.dtype} (allowed: {allowed})"
    elif not _is_plain(value, param.tensor):
        problem = f"is a {type(value).__name__} (allowed: a plain torch.Tensor)"
    elif value.is_neg():
        problem = "is negated where it is read, not in memory (a view of a complex conjugate)"
    if problem is not None:
        raise ValueError(
            f"{param}: its state {name!r} {problem}; convert it, or let optimizer.load_state_dict(...) bring the state "
            "in, which converts real floating-point dtypes"
        )


def _check_changeable(param: Param, name: str, value: Tensor) -> None:
    """Raise ValueError for a tensor that PyTorch would not let a step write to."""
    if value.is_inference():
        raise ValueError(
            f"{param}: its state {name!r} was made under torch.inference_mode(), and nothing outside may change it; "
            "bring the state along: optimizer.load_state_dict(optimizer.state_dict())"
        )


def _check_device(param: Param, name: str, value: Tensor) -> None:
    """Raise ValueError unless a state's tensor is on the parameter's device: kernels do not check the addresses they
    get. A scalar on the host is brought along by ``lay_out``."""
    device = param.tensor.device
    if value.device != device and not _is_away(value, device):
        raise ValueError(
            f"{param}: its state {name!r} is on {value.device}, and the parameter on {device}; move the model "
            "before the first step, or bring the state along: optimizer.load_state_dict(optimizer.state_dict())"
        )


def _check_placement(param: Param, name: str, value: Tensor, shard: LocalShard) -> None:
    """Raise ValueError unless a state's tensor is sharded as its parameter needs it."""
    parameter, found = param.tensor, getattr(value, "placements", "whole")
    expected: Any = "whole"
    if is_dtensor(parameter):
        expected = state_placement(name, parameter, shard, value.shape).placements
    if found != expected:
        raise ValueError(
            f"{param}: its state {name!r} has placements {found}, not {expected}; let optimizer.load_state_dict(...) "
            "bring the state in, which shards it"
        )


def check_seed(param: Param, state: Mapping[str, Any], seed: Any) -> None:
    """Raise ValueError unless ``seed``, as the state's is read, is one from which P can be drawn."""
    _check_number(
        param,
        state,
        "seed",
        isinstance(seed, Integral) and 0 <= int(seed) < SEED_LIMIT,
        "an integer from 0 to 2**32 - 1",
    )


def check_count(param: Param, state: Mapping[str, Any], step: float) -> None:
    """Raise ValueError unless ``step``, as the state's is read, can be counted on from in float32."""
    is_count = 0 <= step < STEP_LIMIT and step == int(step)
    _check_number(param, state, "step", is_count, "a whole number from 0 to 2**24 - 1, since float32 counts no further")


def _check_number(param: Param, state: Mapping[str, Any], name: str, is_allowed: bool, allowed: str) -> None:
    if name not in state:
        raise ValueError(_complaint(param, name, "is missing"))
    if not is_allowed:
        raise ValueError(f"{param}: its state {name!r} is {shown(state[name])} (allowed: {allowed})")


def check_8bit(param: Param, state: Mapping[str, Any], settings: Settings) -> None:
    """Raise ValueError for 8-bit moments of a ``DTensor`` whose shards are no whole blocks, as only a state that was
    put in by hand can have them."""
    if is_8bit(param.tensor, settings, state) and not shards_are_whole_blocks(param.tensor, settings):
        raise ValueError(
            f"{param}: its state has 8-bit moments, whose {SPANS_RANKS}; let optimizer.load_state_dict(...) bring the "
            "state in, which converts it"
        )


def check_memory(found: Iterable[tuple[Param, Mapping[str, Any]]]) -> None:
    """Raise ValueError if two tensors of checked states begin at one address: a step would write both at once."""
    seen: dict[tuple[torch.device, int], str] = {}
    for param, state in found:
        for name in (*ALL_MOMENTS, "update_norm"):
            value = state.get(name)
            if not isinstance(value, Tensor) or not (start := address(local(value))):
                continue
            other = seen.setdefault((value.device, start), f"{name!r} of {param}")
            if other != f"{name!r} of {param}":
                raise ValueError(f"{param}: its state {name!r} is in the memory of {other}; give it a copy of its own")


def lay_out(state: dict[str, Any], parameter: Tensor, is_low_rank: bool) -> None:
    """Bring what ``check_state`` lets through into the form in which both backends read it.

    Scalars that are on the host (``ZeroRedundancyOptimizer`` moves them there) go to the parameter's device, and
    everything except dense moments becomes contiguous. Dense moments keep their layout, unless elements share memory.
    8-bit moments get their names, and absmaxes of dense ones their shape.
    """
    named = with_codes_named(state)
    if named is not state:
        state.clear()
        state.update(named)
    for name in SHARDED:
        value = state.get(name)
        if not isinstance(value, Tensor):
            continue
        if _is_away(value, parameter.device):
            state[name] = value.to(parameter.device)
        elif value.layout == torch.strided and not local(value).is_contiguous():
            is_dense = not is_low_rank and name in MOMENTS
            if not is_dense or overlaps_itself(local(value)):
                state[name] = value.contiguous()
        if name in ABSMAXES and not is_low_rank and not is_dtensor(value):
            state[name] = state[name].view(dense_absmax_shape(parameter.shape))


def _is_plain(value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor has an address that is its own: none of a subclass, except fake ones of a fake parameter."""
    if type(value) in (Tensor, torch.nn.Parameter) or is_dtensor(value):
        return True
    weight = int8_weight_of(parameter)
    whose = parameter if weight is None else weight.q
    return getattr(value, "fake_mode", None) is not None and hasattr(whose, "fake_mode")


def _is_away(value: Tensor, device: torch.device) -> bool:
    return value.dim() == 0 and value.device.type == "cpu" and device.type != "cpu"


def _complaint(param: Param, name: str, problem: str) -> str:
    return (
        f"{param}: its state {name!r} {problem}. It belongs to another model, or rank, proj_type, proj or "
        "second_moment of the group changed; use the groups that it was saved with, or begin with a fresh optimizer"
    )
