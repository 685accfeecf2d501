"""The launches that ``bench.codegen`` compiles: the optimizer's and the int8 layer's, as Triton specialises them.

The optimizer steps on CPU tensors, and a recorder replaces ``gpu.launch``.
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

TARGETS = {f"sm_{version}": ("cuda", version, 32) for version in (80, 90, 100)} | {"gfx942": ("hip", "gfx942", 64)}
# CI compiles the first so many variants for every target.
ESSENTIAL = 5 + codegen_linear.ESSENTIAL + codegen_operands.ESSENTIAL

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
_KINDS = ("gaussian", "rademacher", "P read", "svd")  # by PROJECTION_KIND of kernels/sketch.py


def variants() -> Iterator[dict[str, Any]]:
    """Arguments of ``launches``: every value of each constexpr argument, and all pairs that one expression of a kernel
    uses together, but not all combinations. The dtype is bfloat16 and rows are kept, as in most trainings, unless a
    variant says otherwise."""
    layers = [{"linear": variant} for variant in codegen_linear.VARIANTS]
    yield from layers[: codegen_linear.ESSENTIAL]
    from_operands = [{"operands": variant} for variant in codegen_operands.VARIANTS]
    yield from from_operands[: codegen_operands.ESSENTIAL]
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    mini, columns = {"rank": 1, "scale_type": "tensor"}, {"proj_type": "left"}
    yield {"group": mini}
    yield {"group": {"rank": 256}, "roomy": True}
    yield {"group": {"rank": 256}, "dtype": float32}  # three products with the largest tile
    yield {"group": {"rank": 128, "proj": "svd"}}  # float32 throughout
    yield {}
    yield from layers[codegen_linear.ESSENTIAL :]
    yield from from_operands[codegen_operands.ESSENTIAL :]
    # Rank 1, where the number of instructions per element decides the time.
    yield from ({"group": mini | columns}, {"group": {"rank": 1}}, {"group": {"rank": 1} | columns, "dtype": float32})
    yield {"group": mini | {"distribution": "rademacher"}}
    yield from ({"group": {"rank": 4}}, {"group": {"rank": 4, "distribution": "rademacher"}})
    # The ranks at which the tile changes. The sketch stays in registers up to rank 256, and goes through memory above.
    for rank in (16, 64, 128, 512):
        yield {"group": {"rank": rank}}
    yield from ({"group": {"rank": 128}, "roomy": True}, {"group": {"rank": 256}})
    yield {"group": {"rank": 256} | columns}
    yield {"group": {"rank": 256, "distribution": "rademacher"}}
    yield {"group": {"rank": 128}, "dtype": float32, "gradient": bfloat16}
    yield {"group": {"rank": 128}, "dtype": float16}
    yield {"group": {"rank": 4, "proj": "svd"}}
    # Stochastic rounding of weights and of moments, with one launch and with two.
    rounding = {"stochastic_rounding": True, "state_dtype": bfloat16}
    yield {"group": mini, **rounding}
    yield {"group": {"rank": 256}, **rounding}
    yield {"group": {"rank": 512}, **rounding}
    # Step count and learning rate on the device, and a common scale of all gradients.
    device = {"capturable": True, "lr": torch.tensor(1e-3), "max_grad_norm": 1.0}
    yield {"group": mini, **device}
    yield {"group": {"rank": 128}, **device}
    # By strides, element by element.
    yield {"group": mini, "aligned": False}
    yield {"group": {"rank": 128}, "aligned": False, **rounding}
    yield from ({"aligned": False}, {"dtype": float32}, rounding | device)
    # Sharded along the width over two ranks: sketch and rescale are two launches at any rank, and P is read.
    rows = {"proj_type": "right"}
    yield {"group": mini | rows, "sharded": True}
    yield {"group": {"rank": 128} | rows, "sharded": True}
    # Int8 weights. Groups whose size is no power of two go element by element.
    yield from (
        {"group": mini, "int8": 128},
        {"group": {"rank": 128}, "int8": 256},
        {"group": mini | columns, "int8": 64},
    )
    # 8-bit moments: two launches again. At rank 1 the sketch splits the channels of one program of the second in four.
    eight = {"state_bits": 8, "min_8bit_size": 0}
    yield from ({"group": mini, **eight}, {"group": {"rank": 3}, **eight}, {"group": {"rank": 256} | columns, **eight})


def few() -> Iterator[dict[str, Any]]:
    """A variant of each kernel: what ``make test`` compiles. The sketch makes P in one and reads it in another."""
    mini, columns = {"rank": 1, "scale_type": "tensor"}, {"proj_type": "left"}
    yield {"linear": codegen_linear.VARIANTS[0]}
    yield {"operands": codegen_operands.VARIANTS[0]}
    yield {"operands": {"group": mini, "int8": 128}}
    yield from ({"group": mini}, {"group": {"rank": 128}}, {})
    yield {"group": mini, "int8": 128}
    yield {"group": {"rank": 128, "proj_type": "right"}, "sharded": True}  # the only one here whose rescale is a launch
    yield {"group": {"rank": 256} | columns, "state_bits": 8, "min_8bit_size": 0}


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
    """The kernels that a step of one 1024 x 1024 weight launches. Without a ``group`` the weight is dense.

    ``sharded``: the weight is half of one that is twice as wide. ``int8``: it is int8, in groups of so many.
    ``roomy``: the GPU has much shared memory. ``linear``: instead the kernels of an int8 layer's two directions.
    ``operands``: instead the kernels of a step from the gradient's two factors.
    """
    from apollo_triton.core import device_backend

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
        stack.enter_context(mock.patch.object(device_backend, "_obstacle", return_value=None))
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
    """A tensor twice as wide, of which ``shard`` is the left half."""
    rows, columns = shard.shape
    return DTensor.from_local(
        shard, mesh, [Shard(1)], run_check=False, shape=torch.Size((rows, 2 * columns)), stride=(2 * columns, 1)
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel as a launch specialises it. ``at`` has its constants."""

    module: str
    name: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Kernel:
        """By Triton's rules: None, constexpr arguments and an int of 1 are constants, and an int has 32 or 64 bits."""
        values = dict(zip(function.arg_names, arguments, strict=False)) | keywords
        types, constants, divisible = {}, {}, []
        for parameter in function.params:
            name, value, free = parameter.name, values[parameter.name], not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                types[name] = f"*{_TYPES[value.dtype]}"
                divisible.append(parameter.num)  # as on a GPU, whose allocators round addresses to 256 bytes
            elif isinstance(value, int):
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if free and value % 16 == 0:
                    divisible.append(parameter.num)
            else:
                types[name] = "fp32"
        options = {name: keywords[name] for name in ("num_warps", "num_stages") if name in keywords}
        frozen = [tuple(pairs.items()) for pairs in (types, constants, options)]
        return cls(function.fn.__module__, function.__name__, frozen[0], frozen[1], tuple(divisible), frozen[2])

    @functools.cached_property
    def at(self) -> dict[str, Any]:
        return dict(self.constants)

    @property
    def what(self) -> str:
        """The constants that distinguish variants, in words."""
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
        if self.name == "apply_kernel":  # its sums come from programs of the sketch, each of so many channels
            words.append(f"{at['BLOCK_CHANNELS']} channels a sum")
        return " ".join(words)

    @property
    def per_turn(self) -> int:
        """How many elements a program handles in one turn of its loop, or in all if it has no loop."""
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

        attributes = {(index,): [["tt.divisibility", 16]] for index in self.divisible}
        function = getattr(importlib.import_module(self.module), self.name)
        source = ASTSource(function, dict(self.types), self.at, attributes)
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(self.options))
