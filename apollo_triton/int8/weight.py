"""Int8 weights: uint8 values with a scale and a zero point per group, and the tensor class that a model holds.

    w = (q - zero) * scale        a group is ``group_size`` consecutive elements of the row-major flattened weight

The format is Q-APOLLO's (arXiv 2412.05270) with one exception: a group's range always includes 0. Q-APOLLO clamps the
zero point to 0 to 255 instead, which saturates a group whose values all have the same sign. A group with both signs has
the same bits in both.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..core.dtensors import local
from ..core.messages import shown
from ..core.philox import Stream, random_halves
from .gathering import GatheredByFSDP

# What an int8 weight can be made of, and stand for. The optimizer trains all of them except for float64.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEAST_RANGE = 1e-5
# Float32 has no fractions from 2**23 to 2**24. Adding this number rounds to the nearest integer, ties to the even one,
# and leaves the integer in the lowest bits.
_WHOLE = 1.5 * 2.0**23
_LARGEST = torch.finfo(torch.float32).max
# What a scale can be: above 0, and at most a 255th of the range of float32, with 0.4 % for rounding.
SCALES = torch.finfo(torch.float32).smallest_normal * 2.0**-23, _LARGEST / 127
# How many elements are dequantised at a time: 4 MB in float32, whatever the weight's size.
BLOCK_ELEMENTS = 1 << 20


def quantized(groups: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise float32 ``groups`` ``[groups, group_size]``: q, uint8 of the same shape, scale, float32 ``[groups]``,
    and zero, uint8 ``[groups]``.

    Values are rounded to the nearest. ``noise``, uniform in (-1/2, 1/2) and of the values' shape, is added before, in
    steps of the grid. A value is then rounded up with a probability equal to its fraction.

    The kernels (kernels/int8.py) give the same bits. A compiler for GPUs makes one operation of a product and a sum, so
    between the two there is always a clamp. Where there is none the product is exact.

    >>> q, scale, zero = quantized(torch.tensor([[-1.0, 0.0, 1.55]]))
    >>> q.tolist(), zero.tolist()
    ([[0, 100, 255]], [100])
    """
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = (high * 0.5 - low * 0.5).clamp(min=_LEAST_RANGE / 2) / 127.5  # half of both, because high - low overflows
    inverse = scale.reciprocal()  # at most 2.6e7, because of the least range
    zero = (-low * inverse).clamp(max=255) + _WHOLE
    offset = (zero - _WHOLE)[:, None]
    steps = (groups * inverse[:, None]).clamp_(-offset, 255 - offset)
    if noise is not None:
        steps += noise
    return low_byte(steps.add_(zero[:, None])), scale, low_byte(zero)


def low_byte(values: Tensor) -> Tensor:
    """The integers 0 to 255, uint8, that float32 ``values`` are above ``_WHOLE``."""
    return values.view(torch.int32).to(torch.uint8)


def dequantized(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The float32 values ``[groups, group_size]`` of q, with one scale and one zero point per group."""
    return (q.to(torch.float32) - zero.to(torch.float32)[:, None]) * scale[:, None]


def row_blocks(shape: Sequence[int], group_size: int, elements: int | None = None) -> Iterator[slice]:
    """Slices of the rows of a matrix that hold whole groups, each of about ``elements`` elements (default:
    ``BLOCK_ELEMENTS``)."""
    rows, columns = shape
    whole = group_size // math.gcd(columns, group_size)
    step = max(1, (elements or BLOCK_ELEMENTS) // max(1, whole * columns)) * whole
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def groups_of(rows: slice, columns: int, group_size: int) -> slice:
    """The groups of the ``rows``, which must hold whole ones."""
    return slice(rows.start * columns // group_size, rows.stop * columns // group_size)


def dequantized_rows(q: Tensor, scale: Tensor, zero: Tensor, group_size: int, rows: slice) -> Tensor:
    """The ``rows`` of an int8 weight of these parts, which must hold whole groups, in float32 ``[rows, in]``."""
    groups = groups_of(rows, q.shape[1], group_size)
    q = q[rows]
    return dequantized(q.reshape(-1, group_size), scale[groups], zero[groups]).view(q.shape)


def lies_within(tensor: Tensor, low: float, high: float) -> bool:
    """Whether all values are from ``low`` to ``high``, which NaN is not. True where there are no values to look at: on
    the meta device, in a ``FakeTensorMode``, and in an empty tensor."""
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not tensor.numel():
        return True
    return all(low <= value.item() <= high for value in torch.aminmax(tensor.detach()))


def is_finite(weight: Tensor) -> bool:
    """Whether all values are finite in float32, as far as there are any."""
    return lies_within(weight, -_LARGEST, _LARGEST)


# Functions of torch that take an int8 weight before autograd sees them, and operations that do after it. ``linear.py``
# and ``operations.py`` fill them. Everything else is refused.
FUNCTIONS: dict[Any, Any] = {}
OPERATIONS: dict[Any, Any] = {}


class Int8Weight(GatheredByFSDP, Tensor):
    """A weight ``[out, in]`` that is int8 in memory. To the rest of PyTorch it is a float tensor of the same shape.

    ``q`` is uint8 ``[out, in]``; ``scale`` (float32) and ``zero`` (uint8) are ``[out * in / group_size]``. ``dtype`` is
    the dtype of activations and gradients. As a tensor subclass the weight is a parameter like any other: it has a
    ``.grad``, hooks and a name, and ``to``, ``deepcopy`` and ``swap_tensors`` move and copy it. An operation that would
    silently make a float copy raises NotImplementedError. ``dequantize()`` makes one on request.

    ``stochastic_rounding``: whether the optimizer rounds stochastically when it stores an update. ``name``: what the
    model calls the weight, for errors.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    stochastic_rounding: bool
    name: str = ""
    needs_low_rank = True  # read by core/coverage.py

    @staticmethod
    def __new__(
        cls,
        q: Tensor,
        scale: Tensor,
        zero: Tensor,
        group_size: int,
        dtype: torch.dtype,
        stochastic_rounding: bool = True,
        requires_grad: bool = False,
    ) -> Int8Weight:
        return Tensor._make_wrapper_subclass(
            cls, q.shape, strides=q.stride(), dtype=dtype, device=q.device, requires_grad=requires_grad
        )

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        zero: Tensor,
        group_size: int,
        dtype: torch.dtype,
        stochastic_rounding: bool = True,
        requires_grad: bool = False,
    ) -> None:
        self.q, self.scale, self.zero = q, scale, zero
        self.group_size, self.stochastic_rounding = group_size, stochastic_rounding

    @classmethod
    def of(cls, weight: Tensor, group_size: int = 128, stochastic_rounding: bool = True) -> Int8Weight:
        """The int8 weight of ``weight``, float ``[out, in]``, rounded to the nearest.

        It is converted a block at a time, so that no other float copy is made. A weight on the meta device gives an
        int8 weight there. Raises ValueError if ``group_size`` does not divide the number of elements.

        >>> Int8Weight.of(torch.ones(4, 32), group_size=32).scale.shape
        torch.Size([4])
        """
        check_group_size(weight, group_size)
        result = cls(
            torch.empty(weight.shape, dtype=torch.uint8, device=weight.device),
            torch.empty(weight.numel() // group_size, dtype=torch.float32, device=weight.device),
            torch.empty(weight.numel() // group_size, dtype=torch.uint8, device=weight.device),
            group_size,
            weight.dtype,
            stochastic_rounding,
        )
        if not weight.is_meta:
            result.assign(weight)
        return result

    def check(self) -> None:
        """Raise ValueError unless the parts suit each other. Kernels take their addresses and sizes as they are, so
        this comes before each use: a part may have been set by hand, or come out of a pickle."""
        if self.dim() != 2 or self.dtype not in FLOATS:
            raise ValueError(f"{self} has to stand for a matrix of floats")
        for name, dtype in (("q", torch.uint8), ("scale", torch.float32), ("zero", torch.uint8)):
            part: Any = vars(self).get(name)
            shape = self.shape if name == "q" else (self.shape.numel() // self.group_size,)
            is_tensor = isinstance(part, Tensor) and part.layout == torch.strided
            fits = is_tensor and (part.dtype, part.shape, part.device) == (dtype, shape, self.device)
            if not (fits and part.is_contiguous()):
                strides = f" with strides {part.stride()}, on {part.device}" if is_tensor else ""
                raise ValueError(
                    f"{self} needs a contiguous {name} of {dtype}, of shape {tuple(shape)} and on {self.device}; it is "
                    f"{shown(part)}{strides}"
                )

    def __setstate__(self, state: Any) -> None:
        """What ``pickle`` and ``torch.load`` call. Raises ValueError if the fields are not those of an int8 weight."""
        fields = state[0] if isinstance(state, tuple) and state else state
        names = {"q", "scale", "zero", "group_size", "stochastic_rounding"}
        if not isinstance(fields, dict) or not fields.keys() >= names:
            raise ValueError(f"a pickled int8 weight needs the fields {sorted(names)}; it has {shown(fields)}")
        group_size = fields["group_size"]
        if type(group_size) is not int or group_size < 1 or self.shape.numel() % group_size:
            raise ValueError(
                f"a pickled int8 weight of shape {tuple(self.shape)} has group_size={shown(group_size)}, which does "
                "not divide its elements"
            )
        vars(self).update(fields)
        Int8Weight.check(self)
        if not lies_within(self.scale, *SCALES):
            raise ValueError(f"the scales of the pickled {self} are not all finite and above 0")

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory, including scales and zero points."""
        return self.q.nbytes + self.scale.nbytes + self.zero.nbytes

    @property
    def title(self) -> str:
        """What an error calls the weight."""
        return f"{self.name or 'an int8 weight'} of shape {tuple(self.shape)}"

    def blocks(self, elements: int | None = None, group_size: int | None = None) -> Iterator[slice]:
        """Slices of rows that hold whole groups, each of about ``elements`` elements (default: ``BLOCK_ELEMENTS``).
        ``group_size`` is the weight's own by default."""
        return row_blocks(self.shape, group_size or self.group_size, elements)

    def floats(self, rows: slice) -> Tensor:
        """The ``rows``, which must hold whole groups, in float32 ``[rows, in]``."""
        return dequantized_rows(self.q, self.scale, self.zero, self.group_size, rows)

    def store(self, rows: slice, values: Tensor, noise: Tensor | None = None, changed: Tensor | None = None) -> None:
        """Write float32 ``values [rows, in]`` with new scales and zero points, rounded as in ``quantized``. If
        ``changed`` is given, boolean of the same shape, only groups with a changed value are written."""
        shape = (-1, self.group_size)
        new = quantized(values.reshape(shape), None if noise is None else noise.view(shape))
        groups = groups_of(rows, self.shape[1], self.group_size)
        old = self.q[rows].view(shape), self.scale[groups], self.zero[groups]
        keep = None if changed is None else ~changed.view(shape).any(1)
        for target, value in zip(old, new, strict=True):
            mask = keep[:, None] if keep is not None and value.dim() > 1 else keep
            target.copy_(value if mask is None else torch.where(mask, target, value))

    def noise(self, rows: slice, seed: int, step: int, first: int = 0) -> Tensor:
        """The noise of stochastic rounding for the ``rows`` at ``step``, float32 ``[rows, in]``, drawn by the index of
        each element, of which ``first`` is the weight's first one, as for the optimizer's other roundings: odd
        multiples of 2**-16 in (-1/2, 1/2). With the even ones the mean would not be 0, and -1/2 would move values that
        lie on the grid."""
        columns = self.shape[1]
        first, count = first + rows.start * columns, (rows.stop - rows.start) * columns
        halves = random_halves(first, count, seed, step, Stream.WEIGHT, self.q.device)
        return (halves | 1).to(torch.int16).to(torch.float32).mul_(2.0**-16).view(-1, columns)

    def assign(self, weight: Tensor) -> None:
        """Take the values of a float tensor of the same shape, rounded to the nearest. Raises ValueError, before
        anything changes, if a value is not finite: its whole group would be lost."""
        if weight.is_complex():
            raise ValueError(f"an int8 weight cannot take {weight.dtype} values; use their real part")
        if not is_finite(weight):
            raise ValueError(f"an int8 weight of shape {tuple(self.shape)} cannot take values that are NaN or infinite")
        for rows in self.blocks():
            self.store(rows, weight[rows].detach().to(self.q.device, torch.float32))

    def dequantize(self) -> Tensor:
        """A float copy ``[out, in]`` in ``dtype``.

        >>> Int8Weight.of(torch.zeros(2, 4), group_size=4).dequantize()
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])
        """
        result = torch.empty(self.shape, dtype=self.dtype, device=self.q.device)
        for rows in self.blocks():
            result[rows] = self.floats(rows)
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"group_size={self.group_size})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["q", "scale", "zero"], (self.group_size, self.dtype, self.stochastic_rounding)

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Int8Weight:
        return cls(inner["q"], inner["scale"], inner["zero"], *meta)

    def _stable_hash_for_caching(self) -> str:
        """What the compiler's caches on disk know this weight by. Without it PyTorch warns."""
        parts = [(tuple(p.shape), p.stride(), p.dtype, str(p.device)) for p in (self.q, self.scale, self.zero)]
        return repr((self.__tensor_flatten__(), parts, self.requires_grad))

    def with_parts(self, change: Any, dtype: torch.dtype | None = None) -> Int8Weight:
        """An int8 weight of what ``change`` makes of each part."""
        q, scale, zero = (change(part) for part in (self.q, self.scale, self.zero))
        # PyTorch refuses an inference tensor as the view of a tensor that is none.
        from_outside = torch.is_inference_mode_enabled() and not self.is_inference()
        with torch.inference_mode(False) if from_outside else contextlib.nullcontext():
            result = Int8Weight(q, scale, zero, self.group_size, dtype or self.dtype, self.stochastic_rounding)
        result.name = self.name
        return result

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = FUNCTIONS.get(function)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # Tensor's own would call the floats of zeros_like int8 weights
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        handler = OPERATIONS.get(function)
        if handler is None:
            raise refusal(function)
        return handler(*args, **(kwargs or {}))


def int8_weight_of(parameter: Tensor) -> Int8Weight | None:
    """The int8 weight that a parameter is or, of a ``DTensor``, this rank's part of it; None for any other."""
    here = local(parameter)
    return here if isinstance(here, Int8Weight) else None


def check_group_size(weight: Tensor, group_size: int, name: str = "weight") -> None:
    """Raise ValueError unless ``weight`` is a float matrix that ``group_size`` divides."""
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"{name} is {weight.dtype} {tuple(weight.shape)}; int8 weights are made of matrices of "
            + ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        )
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"Invalid group_size: {shown(group_size)} (allowed: an integer of 1 or more)")
    if weight.numel() % group_size:
        raise ValueError(
            f"group_size={group_size!r} does not divide the {weight.numel()} elements of {name}, of shape "
            f"{tuple(weight.shape)}; use one that does, such as {math.gcd(weight.numel(), 128)}"
        )


def refusal(function: Any) -> NotImplementedError:
    return NotImplementedError(
        f"{function} is not defined for an int8 weight, since it would need a float copy of it; take "
        "weight.dequantize() first, or of a DTensor weight.to_local().dequantize()"
    )
