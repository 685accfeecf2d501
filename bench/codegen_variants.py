"""The launches that ``bench.codegen`` compiles: the optimizer's and the int8 layer's own, as Triton specialises them.

The optimizer steps on CPU tensors while a recorder stands in for ``gpu.launch``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from apollo_triton import APOLLOAdamW
from apollo_triton.core import gpu
from apollo_triton.int8.weight import Int8Weight

from . import codegen_linear, codegen_operands
from .fake_mesh import fake_mesh

TARGETS = {f"sm_{number}": ("cuda", number, 32) for number in (80, 90, 100)} | {"gfx942": ("hip", "gfx942", 64)}
ESSENTIAL = (
    7 + codegen_linear.ESSENTIAL + codegen_operands.ESSENTIAL
)  # the first so many variants are those that CI compiles for every target

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
_ITEM_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_KINDS = ("gaussian", "rademacher", "P read", "svd")  # by PROJECTION_KIND of kernels/sketch.py


def variants() -> Iterator[dict[str, Any]]:
    """Arguments of ``launches``: every value of each constexpr argument, and the pairs that meet in one expression of a
    kernel; not all products. bfloat16 and rows kept unless it says otherwise, as in most trainings."""
    layers = [{"linear": each} for each in codegen_linear.VARIANTS]
    yield from layers[: codegen_linear.ESSENTIAL]
    from_operands = [{"operands": each} for each in codegen_operands.VARIANTS]
    yield from from_operands[: codegen_operands.ESSENTIAL]
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    mini, columns = {"rank": 1, "scale_type": "tensor"}, {"proj_type": "left"}
    yield {"group": mini}
    yield {"group": {"rank": 256}, "roomy": True}
    yield {"group": {"rank": 256}, "dtype": float32}  # three products with the largest tile
    yield {"group": {"rank": 128, "proj": "svd"}}  # float32 throughout
    yield {}
    # Int8 weights, and 8-bit moments: kernels of their own.
    eight = {"state_bits": 8, "min_8bit_size": 0}
    yield {"group": mini, "int8": 128}
    yield {"group": {"rank": 256} | columns, **eight}
    yield from layers[codegen_linear.ESSENTIAL :]
    yield from from_operands[codegen_operands.ESSENTIAL :]
    # Rank 1, where instructions an element decide.
    yield from ({"group": mini | columns}, {"group": {"rank": 1}}, {"group": {"rank": 1} | columns, "dtype": float32})
    yield {"group": mini | {"distribution": "rademacher"}}
    yield from ({"group": {"rank": 4}}, {"group": {"rank": 4, "distribution": "rademacher"}})
    # The ranks at which the tile changes: in registers up to 256, through memory from there on.
    for rank in (16, 64, 128, 512):
        yield {"group": {"rank": rank}}
    yield from ({"group": {"rank": 128}, "roomy": True}, {"group": {"rank": 256}})
    yield {"group": {"rank": 256} | columns}
    yield {"group": {"rank": 256, "distribution": "rademacher"}}
    yield {"group": {"rank": 128}, "dtype": float32, "gradient": bfloat16}
    yield {"group": {"rank": 128}, "dtype": float16}
    yield {"group": {"rank": 4, "proj": "svd"}}
    # Stochastic rounding of weights and of moments, in one launch and in two.
    rounding = {"stochastic_rounding": True, "state_dtype": bfloat16}
    yield {"group": mini, **rounding}
    yield {"group": {"rank": 256}, **rounding}
    yield {"group": {"rank": 512}, **rounding}
    # Step count and learning rate on the device, and a factor on all gradients.
    device = {"capturable": True, "lr": torch.tensor(1e-3), "max_grad_norm": 1.0}
    yield {"group": mini, **device}
    yield {"group": {"rank": 128}, **device}
    # By strides, an element at a time.
    yield {"group": mini, "aligned": False}
    yield {"group": {"rank": 128}, "aligned": False, **rounding}
    yield from ({"aligned": False}, {"dtype": float32}, rounding | device)
    # Cut along the width over two ranks: sketch and rescale are two launches at any rank, and P is read.
    rows = {"proj_type": "right"}
    yield {"group": mini | rows, "sharded": True}
    yield {"group": {"rank": 128} | rows, "sharded": True}
    # Int8 weights; groups that are no power of two go element by element.
    yield from ({"group": {"rank": 128}, "int8": 256}, {"group": mini | columns, "int8": 64})
    # 8-bit moments: two launches again, and what a program of the second owns the sketch of rank 1 cuts in four.
    yield from ({"group": mini, **eight}, {"group": {"rank": 3}, **eight})


def launches(
    group: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gradient: torch.dtype | None = None,
    aligned: bool = True,
    sharded: bool = False,
    int8: int = 0,
    roomy: bool = False,
    linear: dict[str, Any] | None = None,
    operands: dict[str, Any] | None = None,
    **options: Any,
) -> list[Kernel]:
    """The kernels that a step of one 1024 x 1024 weight launches, ``sharded`` those of a half of one that is twice as
    wide, ``int8`` those of one in groups of so many, ``roomy``
    those of a GPU with much shared memory; dense without a ``group``. ``linear``: those of a layer's two
    directions instead; ``operands``: those of a step from operands."""
    from apollo_triton.core import device_backend as backends

    found: list[Kernel] = []

    def record(kernel: Any, grid: object, device: object, *arguments: Any, **constants: Any) -> None:
        found.append(Kernel.of(kernel, arguments, constants))

    weight = torch.nn.Parameter(torch.zeros(1024, 1024 if aligned else 1025, dtype=dtype)[:, :1024])
    weight.grad = torch.randn(1024, 1024).to(dtype)
    weight.grad.data = weight.grad.to(gradient or dtype)  # torch < 2.10 has no grad_dtype
    if int8:
        weight = torch.nn.Parameter(Int8Weight.of(weight.detach(), int8))
        weight.grad = torch.randn(1024, 1024).to(dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu, "launch", record))
        stack.enter_context(mock.patch.object(backends, "_obstacle", return_value=None))
        stack.enter_context(mock.patch.object(gpu, "has_large_shared_memory", return_value=roomy))
        if linear is not None:
            codegen_linear.forward_and_backward(**linear)
            return found
        if operands is not None:
            codegen_operands.step(**operands)
            return found
        if sharded:
            mesh = stack.enter_context(fake_mesh(ranks=2))
            half = _half(weight.grad, mesh)
            weight = torch.nn.Parameter(_half(weight.detach(), mesh))
            weight.grad = half
        APOLLOAdamW([{"params": [weight], **(group or {})}], backend="triton", **{"lr": 1e-3, **options}).step()
    return found


def _half(shard: Tensor, mesh: Any) -> Tensor:
    """The left half of a tensor twice as wide."""
    rows, columns = shard.shape
    return DTensor.from_local(
        shard, mesh, [Shard(1)], run_check=False, shape=torch.Size((rows, 2 * columns)), stride=(2 * columns, 1)
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel as a launch specialises it; ``at`` are its constants."""

    module: str
    name: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Kernel:
        """By Triton's rules: None, constexpr arguments and an int of 1 are constants, an int has 32 or 64 bits."""
        values = dict(zip(function.arg_names, arguments, strict=False)) | keywords
        types, constants, divisible = {}, {}, []
        for parameter in function.params:
            name, value, free = parameter.name, values[parameter.name], not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                types[name] = f"*{_TYPES[value.dtype]}"
                divisible.append(parameter.num)  # so it is on a GPU, whose allocators round to 256 bytes
            elif isinstance(value, int):
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if free and value % 16 == 0:
                    divisible.append(parameter.num)
            else:
                types[name] = "fp32"
        options = {name: keywords[name] for name in ("num_warps", "num_stages") if name in keywords}
        frozen = [tuple(each.items()) for each in (types, constants, options)]
        return cls(function.fn.__module__, function.__name__, frozen[0], frozen[1], tuple(divisible), frozen[2])

    @functools.cached_property
    def at(self) -> dict[str, Any]:
        return dict(self.constants)

    @property
    def what(self) -> str:
        """The constants that tell variants apart, in words."""
        at = self.at
        words = [f"rank {at['RANK']}"] if "RANK" in at else []
        if "PROJECTION_KIND" in at:
            words.append(_KINDS[at["PROJECTION_KIND"]])
        for name, yes, no in (("KEEPS_ROWS", "rows", "columns"), ("PER_CHANNEL", "channel", "tensor")):
            if name in at:
                words.append(yes if at[name] else no)
        letters = {"GRADIENT": "G", "WEIGHT_DTYPE": "W", "STATE": "M"}
        words += [f"{letter} {at[name]}" for name, letter in letters.items() if name in at]
        flags = {"ALIGNED": (False, "unaligned"), "FUSED": (False, "split"), "STOCHASTIC": (True, "stochastic")}
        flags |= {"SIGNS": (True, "signs")}
        words += [word for name, (value, word) in flags.items() if at.get(name) is value]
        if "p_step" in dict(self.types) and "p_step" not in at:
            words.append("t on the device")
        if self.name in ("sketch_kernel", "project_kernel") and "num_stages" in dict(self.options):
            words.append(f"{dict(self.options)['num_stages']} stages")
        if "GROUP" in at:
            words.append(f"groups of {at['GROUP']}")
        if "RUN" in at:
            words += codegen_linear.words(at, dict(self.types))
        if self.module.rpartition(".")[2] in ("operands", "operand_sketch"):
            words += codegen_operands.words(at, dict(self.types), self.divisible)
        if at.get("SPLIT", 1) > 1:
            words.append(f"in {at['SPLIT']} parts")
        if self.name == "apply_kernel":  # whose sums come from as many programs of the sketch
            words.append(f"{at['BLOCK_CHANNELS']} channels a sum")
        return " ".join(words)

    @property
    def per_turn(self) -> int:
        """Elements a program handles in a turn of its loop, or in all if it has none."""
        at = self.at
        tile = {"sketch_kernel": "CHANNELS WIDTH", "rescale_kernel": "CHANNELS RANK", "apply_kernel": "ROWS COLUMNS"}
        tile |= {"apply_int8_kernel": "GROUPS GROUP", "rescale_blockwise_kernel": "CHANNELS RANK"}
        tile |= dict.fromkeys(("forward_kernel", "input_gradient_kernel"), "KEPT SUMMED")
        tile |= {"project_kernel": "CHANNELS WIDTH", "collect_kernel": "CHANNELS TOKENS", "gram_kernel": "TOKENS WIDTH"}
        tile |= {"gram_norms_kernel": "CHANNELS RANK"}
        tile |= dict.fromkeys(
            ("apply_operands_kernel", "apply_int8_operands_kernel", "tile_norms_kernel"), "ROWS COLUMNS"
        )
        if self.name in tile:
            return math.prod(at[f"BLOCK_{side}"] for side in tile[self.name].split())
        return at["BLOCK"] * (4 if self.name == "projection_kernel" else 1)

    def compiled(self, target: str) -> Any:
        """Triton's compiled kernel."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        attributes = {(number,): [["tt.divisibility", 16]] for number in self.divisible}
        function = getattr(importlib.import_module(self.module), self.name)
        source = ASTSource(function, dict(self.types), self.at, attributes)
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(self.options))
