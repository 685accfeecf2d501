"""A row of the table: what a kernel's machine code says of its speed, and whether it is right."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from . import listing
from .hazards import hazards
from .kernel import Kernel
from .listing import Instruction, Listing
from .pipeline import Tile, tiles
from .targets import TARGETS

_WITH_LOOPS = ("sketch_kernel", "squared_norm_kernel", "row_sums_kernel")

Row = dict[str, Any]


def measure(kernel: Kernel, target: str) -> Row:
    """One row: the figures of the kernel's machine code, or the error of its compilation."""
    row: Row = {"target": target, "kernel": kernel.name.removesuffix("_kernel"), "what": kernel.what}
    try:
        compiled = kernel.compiled(target)
    except Exception as error:
        return row | {"error": str(error).splitlines()[0]}
    needed, there_are = getattr(compiled.metadata, "tmem_size", None) or 0, TARGETS[target].tensor_memory
    if needed > there_are:  # Triton compiles such a kernel to a trap and refuses to launch it
        return row | {"error": f"needs {needed} columns of tensor memory, of which there are {there_are}"}
    if target.startswith("sm"):
        text = listing.nvidia_tool("nvdisasm", compiled, "--print-line-info", "-c", "-ndf")
        machine = listing.sass(text)
        assembly = listing.assembly(compiled.asm["ptx"])  # unlike the machine code it has exact line numbers
    else:
        assembly = machine = listing.assembly(compiled.asm["amdgcn"].partition(".section\t.rodata")[0])
    loop = _loop(machine) if kernel.name in _WITH_LOOPS else []
    threads = compiled.metadata.num_warps * TARGETS[target].threads
    opcodes = " ".join(instruction.opcode for instruction in machine.code)
    stages, pipelined = compiled.metadata.num_stages, tiles(compiled.asm["ttgir"])
    uses_tensor_cores = bool(re.search(r"\b[HIQ]MMA|GMMA|UTC\w*MMA|v_mfma", opcodes))
    streamed = {name: pipelined.get(name, Tile()) for name in kernel.streamed if uses_tensor_cores}
    return row | {
        "warps": compiled.metadata.num_warps,
        **_resources(compiled, target),
        "spilling": _count(r"STL|scratch_store", machine.code),
        "spills_in_loop": _count(r"STL|LDL|scratch_", loop),
        "widths": _widths(assembly),
        "instructions": len(machine.code),
        "loop": len(loop),
        "per_element": round(len(loop or machine.code) * threads / kernel.per_turn, 2),
        "hazards": hazards(machine),
        "prefetches": compiled.asm.get("ptx", "").count("prefetch.global.L2"),
        "stages": stages,
        "slots": {name: tile.slots for name, tile in streamed.items()},
        "wanted_slots": {name: tile.wanted(stages) for name, tile in streamed.items()},
        "tensor_core": uses_tensor_cores,
        "tf32": "tf32" in compiled.asm.get("ptx", ""),
        "float64": bool(re.search(r"\bD(ADD|MUL|FMA|SETP|MMA)|\.F64|64H|_f64", opcodes)),
    }


def _widths(assembly: Listing) -> dict[str, str]:
    """How often each operand is loaded or stored, times the bits."""
    widths: dict[str, str] = {}
    for (name, bits), count in sorted(Counter(filter(None, map(_access, assembly.code))).items()):
        if re.match(r"(load|store) ([GWMVRPqxXZKS]|dY|kept)$|store projection", name):
            widths[name] = f"{widths[name]} + {count} x {bits}" if name in widths else f"{count} x {bits}"
    return widths


def _count(opcodes: str, code: list[Instruction]) -> int:
    return sum(bool(re.match(opcodes, instruction.opcode)) for instruction in code)


def _resources(compiled: Any, target: str) -> Row:
    """Registers, stack and shared memory. The stack holds spills and the data of library functions."""
    if target.startswith("sm"):
        text = listing.nvidia_tool("cuobjdump", compiled, "--dump-resource-usage")
        names = {"registers": "REG:", "stack": "STACK:"}
    else:
        text = compiled.asm["amdgcn"]
        names = {"registers": r"\.vgpr_count: +", "stack": r"\.private_segment_fixed_size: +"}
    figures = {name: int(re.search(rf"{pattern}(\d+)", text)[1]) for name, pattern in names.items()}  # type: ignore[index]
    return figures | {"shared": compiled.metadata.shared}


_PTX_ACCESS = re.compile(r"(ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.\w(\d+)$|(cp)\.async\.c[ag]\.shared\.global")
_AMD_ACCESS = re.compile(r"(?:global|buffer)_(load|store)_(?:(\w?byte)|(\w*short)|dword(?:x(\d))?)")


def _access(instruction: Instruction) -> tuple[str, int] | None:
    """What a load from or a store to global memory moves, such as "load G" or "store W", and its bits per thread."""
    if match := _PTX_ACCESS.match(instruction.opcode):
        verb = "store" if match[1] == "st" else "load"
        size = re.search(r"\], (0x\w+)", instruction.operands)
        bits = 8 * int(size[1], 16) if match[4] and size else int(match[2] or 1) * int(match[3])
    elif match := _AMD_ACCESS.match(instruction.opcode):
        verb, bits = match[1], 8 if match[2] else 16 if match[3] else 32 * int(match[4] or 1)
    else:
        return None
    pattern = r"(\w+) = tl\.load\(" if verb == "load" else r"tl\.store\(p_(\w+)"
    name = re.search(pattern, instruction.line)
    return (f"{verb} {name[1]}", bits) if name else None


def _loop(listing: Listing) -> list[Instruction]:
    """The innermost loop that loads G. Empty if there is none."""
    loads = re.compile(r"LDG|(global|buffer)_load")
    streaming = (
        loop for loop in listing.loops() if any(loads.match(x.opcode) and x.line.startswith("G = ") for x in loop)
    )
    return min(streaming, key=len, default=[])
