"""What the kernels become on GPUs that are not here: compiled ahead of time, disassembled, and counted.

Figures are of code, not of time: an instruction in a loop counts once. ``python -m bench.codegen`` (two minutes on two
cores).
"""

from __future__ import annotations

import argparse
import itertools
import linecache
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from .codegen_variants import ESSENTIAL, TARGETS, Kernel, launches, variants
from .results_file import RESULTS, Results

Row = dict[str, Any]

_TENSOR_MEMORY = 512  # columns that sm_100 has


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


def races(ttgir: str) -> bool:
    """Whether a Hopper matrix product may read a tile in shared memory while the next copy is written over it.

    An asynchronous product is still reading when the loop goes on, so each tile that is copied ahead needs a slot more
    than copies are ahead. Triton (3.6 and 3.7) forgets that slot for a tile that something else uses as well.
    """
    loop = re.search(r"scf\.for.*?^ *scf\.yield", ttgir, re.DOTALL | re.MULTILINE)
    if loop is None or "isAsync = true" not in loop[0] or not re.search(r"pendings = [1-9]", loop[0]):
        return False
    slots = dict(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x", ttgir))
    return (
        len({slots[name] for name in re.findall(r"memdesc_(?:index|subview) (%\w+)\[", loop[0]) if name in slots}) > 1
    )


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
        if re.match(r"(load|store) ([GWMVRPqxXZKS]|dY|kept)$|store projection", name):
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
        "races": races(compiled.asm.get("ttgir", "")),
        "tensor_core": bool(re.search(r"\b[HIQ]MMA|GMMA|UTC\w*MMA|v_mfma", opcodes)),
        "tf32": "tf32" in compiled.asm.get("ptx", ""),
        "float64": bool(re.search(r"\bD(ADD|MUL|FMA|SETP|MMA)|\.F64|64H|_f64", opcodes)),
    }


def measured(targets: Iterable[str], sampled: Iterable[str] = (), workers: int = 2) -> list[Row]:
    """All variants for ``targets``, and the essential ones for ``sampled``, each kernel once."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, under which nothing is compiled")
    targets = list(targets)
    kernels = [launches(**each) for each in itertools.islice(variants(), None if targets else ESSENTIAL)]
    jobs = [(target, kernels) for target in targets] + [(target, kernels[:ESSENTIAL]) for target in sampled]
    pairs = [(each, target) for target, some in jobs for each in dict.fromkeys(itertools.chain(*some))]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(measure, *zip(*pairs, strict=True)))


_FIGURES = ("warps", "registers", "stack", "shared", "instructions", "loop", "per_element", "tensor_core", "float64")


def table(rows: list[Row]) -> str:
    """The rows as text, a target after the other."""
    lines: list[str] = []
    for target, group in itertools.groupby(rows, lambda row: row["target"]):
        lines += ["", f"{target:<75}" + "".join(f"  {name}" for name in _FIGURES) + "  instructions x bits"]
        for row in group:
            cells = [f"{row['kernel']:<19}{row['what']:<56}", row.get("error", "")]
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
    # Triton's cache may hold the code of other sources, whose lines say nothing about these.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
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
