"""One kernel as a launch specialises it: types and constants, what distinguishes it in words, its compilation."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import linear, operands
from .targets import TARGETS

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}
_KINDS = ("gaussian", "rademacher", "P read", "svd")  # by PROJECTION_KIND of kernels/projected.py

# What the products of each kernel stream, by the names of the variables.
_STREAMED = {
    **dict.fromkeys(("sketch_kernel", "project_kernel"), ("G", "P")),
    **dict.fromkeys(("collect_kernel", "gram_norms_kernel"), ("S", "kept")),
    **dict.fromkeys(("tile_norms_kernel", "apply_operands_kernel", "apply_int8_operands_kernel"), ("X", "dY")),
    "gram_kernel": ("X", "Z"),
    "forward_kernel": ("x", "q"),
    "input_gradient_kernel": ("G", "q"),
}


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
        flags |= {"SIGNS": (True, "signs"), "HALVES": (True, "halves")}
        words += [word for name, (value, word) in flags.items() if at.get(name) is value]
        if self.name == "projection_kernel":
            words.append(f"P {dict(self.types)['p_projection'][1:]}")
        operand = f"{at.get('GRADIENT')} {dict(self.types).get('p_summed')}"
        if at.get("UNROLLED") is False and ("fp32" in operand or at["PROJECTION_KIND"] == _KINDS.index("svd")):
            words.append("parts in a loop")
        on_device = {"p_step": "t on the device", "p_lr": "lr on the device"}
        words += [word for name, word in on_device.items() if name in dict(self.types) and name not in at]
        if self.name in ("sketch_kernel", "project_kernel") and "num_stages" in dict(self.options):
            words.append(f"{dict(self.options)['num_stages']} stages")
        if "GROUP" in at:
            words.append(f"groups of {at['GROUP']}")
        if "RUN" in at:
            words += linear.words(at, dict(self.types))
        if self.module.rpartition(".")[2] in ("operands", "operand_sketch"):
            words += operands.words(at, dict(self.types), self.divisible)
        if at.get("SPLIT", 1) > 1:
            words.append(f"in {at['SPLIT']} parts")
        if self.name == "apply_kernel":  # its sums come from programs of the sketch, each of so many channels
            words.append(f"{at['BLOCK_CHANNELS']} channels a sum")
        return " ".join(words)

    @property
    def streamed(self) -> tuple[str, ...]:
        """What the kernel's products stream, if it has any, by the names of the variables."""
        names = _STREAMED.get(self.name, ())
        return (*names, "other_G") if self.at.get("HALVES") else names

    @property
    def per_turn(self) -> int:
        """How many elements a program handles in one turn of its loop, or in all if it has no loop."""
        at = self.at
        tile = {"sketch_kernel": "CHANNELS WIDTH", "rescale_kernel": "CHANNELS RANK", "apply_kernel": "ROWS COLUMNS"}
        tile |= {"apply_int8_kernel": "GROUPS GROUP", "rescale_blockwise_kernel": "CHANNELS RANK"}
        tile |= dict.fromkeys(("forward_kernel", "input_gradient_kernel"), "KEPT SUMMED")
        tile |= {"project_kernel": "CHANNELS WIDTH", "collect_kernel": "CHANNELS TOKENS", "gram_kernel": "TOKENS WIDTH"}
        tile |= {"gram_norms_kernel": "CHANNELS RANK", "row_sums_kernel": "ROWS COLUMNS"}
        tile |= dict.fromkeys(
            ("apply_operands_kernel", "apply_int8_operands_kernel", "tile_norms_kernel"), "ROWS COLUMNS"
        )
        if self.name in tile:
            halves = 2 if at.get("HALVES") else 1
            return halves * math.prod(at[f"BLOCK_{side}"] for side in tile[self.name].split())
        if self.name == "step_kernel":
            return 1
        return at["BLOCK"] * (4 if self.name == "projection_kernel" else 1)

    def compiled(self, target: str) -> Any:
        """Triton's compiled kernel."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        function = getattr(importlib.import_module(self.module), self.name)
        if "constexprs" in inspect.signature(ASTSource).parameters:
            attributes: Any = {(index,): [["tt.divisibility", 16]] for index in self.divisible}
        else:  # triton 3.2
            from triton.backends.compiler import AttrsDescriptor

            attributes = AttrsDescriptor.from_hints(dict.fromkeys(self.divisible, 16))
        source = ASTSource(function, dict(self.types), self.at, attributes)
        chosen = TARGETS[target]
        gpu = GPUTarget(chosen.backend, chosen.architecture, chosen.threads)
        return triton.compile(source, target=gpu, options=dict(self.options))
