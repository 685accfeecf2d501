"""What the kernels become on GPUs that are not here: compiled ahead of time, disassembled, and counted.

The launches are the optimizer's own: it steps on CPU tensors while a recorder stands in for ``fused.launch``. Figures
are of code, not of time: an instruction in a loop counts once. ``python -m bench.codegen`` (two minutes on two cores).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import linecache
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from apollo_triton import APOLLOAdamW
from apollo_triton.int8 import Int8Weight

from .fake_mesh import fake_mesh
from .results_file import RESULTS, Results

Row = dict[str, Any]

TARGETS = {f"sm_{number}": ("cuda", number, 32) for number in (80, 90, 100)} | {"gfx942": ("hip", "gfx942", 64)}
ESSENTIAL = 5  # the first so many variants are those that CI compiles for every target

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
_TYPES[torch.uint8] = "u8"
_ITEM_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_TENSOR_MEMORY = 512  # columns that sm_100 has
_KINDS = ("gaussian", "rademacher", "P read", "svd")  # by PROJECTION_KIND of kernels/sketch.py


def variants() -> Iterator[dict[str, Any]]:
    """Arguments of ``launches``: every value of each constexpr argument, and the pairs that meet in one expression of a
    kernel; not all products. bfloat16 and rows kept unless it says otherwise, as in most trainings."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    mini, columns = {"rank": 1, "scale_type": "tensor"}, {"proj_type": "left"}
    yield {"group": mini}
    yield {"group": {"rank": 256}}
    yield {"group": {"rank": 256}, "dtype": float32}  # three products with the largest tile
    yield {"group": {"rank": 128, "proj": "svd"}}  # float32 throughout
    yield {}
    # Rank 1, where instructions an element decide.
    yield from ({"group": mini | columns}, {"group": {"rank": 1}}, {"group": {"rank": 1} | columns, "dtype": float32})
    yield {"group": mini | {"distribution": "rademacher"}}
    yield {"group": {"rank": 4}}
    # The ranks at which the tile changes: in registers up to 256, through memory from there on.
    for rank in (16, 64, 128, 512):
        yield {"group": {"rank": rank}}
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
    yield {"group": {"rank": 128, "distribution": "rademacher"} | rows, "sharded": True}
    # Int8 weights; groups that are no power of two go element by element.
    yield from (
        {"group": mini, "int8": 128},
        {"group": {"rank": 128}, "int8": 256},
        {"group": mini | columns, "int8": 64},
    )


def launches(
    group: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gradient: torch.dtype | None = None,
    aligned: bool = True,
    sharded: bool = False,
    int8: int = 0,
    **options: Any,
) -> list[Kernel]:
    """The kernels that a step of one 1024 x 1024 weight launches, ``sharded`` those of a half of one that is twice as
    wide, ``int8`` those of one in groups of so many; dense without a ``group``."""
    from apollo_triton import backends, fused

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
        stack.enter_context(mock.patch.object(fused, "launch", record))
        stack.enter_context(mock.patch.object(backends, "_obstacle", return_value=None))
        if sharded:
            mesh = stack.enter_context(fake_mesh(ranks=2))
            half = _half(weight.grad, mesh)
            weight = torch.nn.Parameter(_half(weight.detach(), mesh))
            weight.grad = half
        APOLLOAdamW([{"params": [weight], **(group or {})}], backend="triton", **{"lr": 1e-3, **options}).step()
    return found


def _half(piece: Tensor, mesh: Any) -> Tensor:
    """The left half of a tensor twice as wide."""
    rows, columns = piece.shape
    return DTensor.from_local(
        piece, mesh, [Shard(1)], run_check=False, shape=torch.Size((rows, 2 * columns)), stride=(2 * columns, 1)
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
        words += [word for name, (value, word) in flags.items() if at.get(name) is value]
        if "p_step" in dict(self.types) and "p_step" not in at:
            words.append("t on the device")
        if "GROUP" in at:
            words.append(f"groups of {at['GROUP']}")
        if self.name == "apply_kernel":  # whose sums come from as many programs of the sketch
            words.append(f"{at['BLOCK_CHANNELS']} channels a sum")
        return " ".join(words)

    @property
    def per_turn(self) -> int:
        """Elements a program handles in a turn of its loop, or in all if it has none."""
        at = self.at
        tile = {"sketch_kernel": "CHANNELS WIDTH", "rescale_kernel": "CHANNELS RANK", "apply_kernel": "ROWS COLUMNS"}
        tile["apply_int8_kernel"] = "GROUPS GROUP"
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


class Instruction(NamedTuple):
    """An opcode with its modifiers, what it reads and writes, and the line of Python that it is from."""

    opcode: str
    operands: str
    line: str


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?([\w.]+)\s*(.*?) ?;")
_TEXT = re.compile(r"\s+(?:@!?%p\d+ )?([a-z][\w.:]+)\s*(.*)")  # PTX and AMD's assembly
_FILE = re.compile(r'\.file\s+(\d+) "(.+?)"(?: "(.+)")?')
_LOCATION = re.compile(r'\s*(?://## File "(.+)", line|\.loc\s+(\d+)) (\d+)')


def parsed(text: str, instruction: re.Pattern[str]) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in order, and labels with the index of the instruction that follows."""
    files = {number: "/".join(path).rstrip("/") for number, *path in _FILE.findall(text)}
    found, labels, line = list[Instruction](), dict[str, int](), ""
    for each in text.splitlines():
        if match := _LOCATION.match(each):
            if match[3] != "0":
                line = linecache.getline(match[1] or files.get(match[2], ""), int(match[3])).strip()
        elif match := re.match(r"(\.L\w+):", each):
            labels[match[1]] = len(found)
        elif (match := instruction.match(each)) and match[1] != "NOP":
            found.append(Instruction(match[1], match[2], line))
    return found, labels


def _nvidia_tool(tool: str, compiled: Any, *options: str) -> str:
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(Path(nvidia.__path__[0]) / "bin" / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(compiled: Any, target: str) -> Row:
    """Registers, stack and shared memory. Stack is spills, and what a library function keeps there."""
    if target.startswith("sm"):
        text = _nvidia_tool("cuobjdump", compiled, "--dump-resource-usage")
        names = {"registers": "REG:", "stack": "STACK:"}
    else:
        text = compiled.asm["amdgcn"]
        names = {"registers": r"\.vgpr_count: +", "stack": r"\.private_segment_fixed_size: +"}
    figures = {name: int(re.search(rf"{pattern}(\d+)", text)[1]) for name, pattern in names.items()}  # type: ignore[index]
    return figures | {"shared": compiled.metadata.shared}


_PTX_ACCESS = re.compile(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.\w(\d+)$|(cp)\.async\.c[ag]\.shared\.global")
_AMD_ACCESS = re.compile(r"(?:global|buffer)_(load|store)_(?:(\w?byte)|(\w*short)|dword(?:x(\d))?)")


def _access(each: Instruction) -> tuple[str, int] | None:
    """What a load from or a store to global memory moves, "load G" or "store W" by its line, and bits a thread."""
    if match := _PTX_ACCESS.match(each.opcode):
        verb = "store" if match[1] == "st" else "load"
        size = re.search(r"\], (0x\w+)", each.operands)
        bits = 8 * int(size[1], 16) if match[4] and size else int(match[2] or 1) * int(match[3])
    elif match := _AMD_ACCESS.match(each.opcode):
        verb, bits = match[1], 8 if match[2] else 16 if match[3] else 32 * int(match[4] or 1)
    else:
        return None
    name = re.search(r"(\w+) = tl\.load\(" if verb == "load" else r"tl\.store\(p_(\w+)", each.line)
    return (f"{verb} {name[1]}", bits) if name else None


def _loop(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The innermost loop that loads G; empty if there is none."""
    loops = []
    for end, each in enumerate(code):
        if "BRA" in each.opcode or "branch" in each.opcode:
            target = re.search(r"\.L\w+", each.operands)
            if target and labels[target[0]] <= end:
                loops.append(code[labels[target[0]] : end + 1])
    loads = re.compile(r"LDG|(global|buffer)_load")
    streaming = [loop for loop in loops if any(loads.match(x.opcode) and x.line.startswith("G = ") for x in loop)]
    return min(streaming, key=len, default=[])


def measure(kernel: Kernel, target: str) -> Row:
    """One row: what the kernel became, or the error that compiling it ended in."""
    row: Row = {"target": target, "kernel": kernel.name.removesuffix("_kernel"), "what": kernel.what}
    try:
        compiled = kernel.compiled(target)
    except Exception as error:
        return row | {"error": str(error).splitlines()[0]}
    if (columns := getattr(compiled.metadata, "tmem_size", None) or 0) > _TENSOR_MEMORY:
        # Triton compiles such a kernel to a trap, and refuses to launch it.
        return row | {"error": f"needs {columns} columns of tensor memory, of which there are {_TENSOR_MEMORY}"}
    if target.startswith("sm"):
        listing = _nvidia_tool("nvdisasm", compiled, "--print-line-info", "-c", "-ndf")
        code, labels = parsed(listing, _SASS)
        assembly, _ = parsed(compiled.asm["ptx"], _TEXT)  # its lines are exact, the machine code's are not
    else:
        assembly, labels = parsed(compiled.asm["amdgcn"].partition(".section\t.rodata")[0], _TEXT)
        code = assembly
    loop = _loop(code, labels) if kernel.name in ("sketch_kernel", "squared_norm_kernel") else []
    threads = compiled.metadata.num_warps * TARGETS[target][2]
    widths: dict[str, str] = {}
    for (name, bits), count in sorted(Counter(filter(None, map(_access, assembly))).items()):
        if re.match(r"(load|store) [GWMVRPq]$|store projection", name):
            widths[name] = f"{widths[name]} + {count} x {bits}" if name in widths else f"{count} x {bits}"
    opcodes = " ".join(each.opcode for each in code)
    return row | {
        "warps": compiled.metadata.num_warps,
        **_resources(compiled, target),
        "spilling": sum(bool(re.match(r"STL|scratch_store", each.opcode)) for each in code),
        "widths": widths,
        "instructions": len(code),
        "loop": len(loop),
        "per_element": round(len(loop or code) * threads / kernel.per_turn, 2),
        "tensor_core": bool(re.search(r"\b[HIQ]MMA|GMMA|UTC\w*MMA|v_mfma", opcodes)),
        "tf32": "tf32" in compiled.asm.get("ptx", ""),
        "float64": bool(re.search(r"\bD(ADD|MUL|FMA|SETP|MMA)|\.F64|64H|_f64", opcodes)),
    }


def measured(targets: Iterable[str], sampled: Iterable[str] = (), workers: int = 2) -> list[Row]:
    """All variants for ``targets``, and the essential ones for ``sampled``, each kernel once."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, under which nothing is compiled")
    kernels = [launches(**each) for each in variants()]
    jobs = [(target, kernels) for target in targets] + [(target, kernels[:ESSENTIAL]) for target in sampled]
    pairs = [(each, target) for target, some in jobs for each in dict.fromkeys(itertools.chain(*some))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(measure, *zip(*pairs, strict=True)))


_FIGURES = ("warps", "registers", "stack", "shared", "instructions", "loop", "per_element", "tensor_core", "float64")


def table(rows: list[Row]) -> str:
    """The rows as text, a target after the other."""
    lines: list[str] = []
    for target, group in itertools.groupby(rows, lambda row: row["target"]):
        lines += ["", f"{target:<70}" + "".join(f"  {name}" for name in _FIGURES) + "  instructions x bits"]
        for row in group:
            cells = [f"{row['kernel']:<14}{row['what']:<56}", row.get("error", "")]
            for name in _FIGURES * ("error" not in row):
                figure = ("-", "yes")[row[name]] if isinstance(row[name], bool) else row[name]
                cells.append(f"{figure:>{len(name) + 2}}")
            cells += ["  ", ", ".join(f"{name} {what}" for name, what in row.get("widths", {}).items())]
            lines.append("".join(cells).rstrip())
    return "\n".join(lines[1:]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS), help="compile all variants")
    parser.add_argument("--sampled", nargs="*", choices=TARGETS, default=[], help="compile the essential variants")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    rows = measured(arguments.targets, arguments.sampled)
    results = Results("codegen", device=None, fresh=True, folder=arguments.out)
    for row in rows:
        results.add(f"{row['target']}: {row['kernel']} {row['what']}", **row)
    assert len(results.rows) == len(rows), "two kernels are described alike: see Kernel.what"
    text = results.path.with_suffix(".txt")
    text.write_text(table(rows))
    failed = [f"{row['target']} {row['kernel']} {row['what']}: {row['error']}" for row in rows if "error" in row]
    print("\n".join([*failed, f"{len(rows) - len(failed)} of {len(rows)} kernels compiled; written to {text}"]))


if __name__ == "__main__":
    main()
