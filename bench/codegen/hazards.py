"""Writes to registers that an asynchronous matrix product of sm_90 still reads.

A wgmma (HGMMA in machine code) goes on while the program continues. Until it has been waited for, its left operand, if
that is in registers, and its accumulator belong to it: what is written there in the meantime makes the product wrong,
if it is late enough. Compilers are to keep clear of that, and some do not (triton-lang/triton issue 9433).
"""

from __future__ import annotations

import re

from .listing import Instruction, Listing

# What a program has in flight: the registers of each group of products, oldest first, and of the group that is open.
State = tuple[tuple[frozenset[int], ...], frozenset[int]]

_PRODUCT = re.compile(r"[HQI]GMMA")
_LEFT_OPERAND = 4  # registers: 64 rows of 32 bytes over 128 threads
_MOST_GROUPS = 8  # in flight; what is older counts as one, so that a loop that never waits comes to an end
# Without a destination, though the first operand may be a register or follow a predicate.
_ONLY_READS = re.compile(r"BRX|JMX|RET|CALL|WARPSYNC|NANOSLEEP|FCHK|R2P")


def hazards(listing: Listing) -> int:
    """How many instructions may write to a register of a product in flight, on any way through the program."""
    if not any(_PRODUCT.match(instruction.opcode) for instruction in listing.code):
        return 0
    found, seen = set[int](), set[tuple[int, State]]()
    ways: list[tuple[int, State]] = [(0, ((), frozenset()))]
    while ways:
        index, state = ways.pop()
        while index < len(listing.code) and (index, state) not in seen:
            seen.add((index, state))
            instruction = listing.code[index]
            if written(instruction) & state[1].union(*state[0]):
                found.add(index)
            state = _after(instruction, state)
            target = listing.target(index)
            if target is not None:
                ways.append((target, state))
            if _never_continues(instruction):
                break
            index += 1
    return len(found)


def _never_continues(instruction: Instruction) -> bool:
    """Whether the next instruction never follows: the end, or a branch without a condition."""
    always = instruction.opcode == "BRA" and instruction.operands.startswith("`")
    return not instruction.guard and (always or instruction.opcode in ("EXIT", "RET.REL.NODEC"))


def _after(instruction: Instruction, state: State) -> State:
    groups, group = state
    if _PRODUCT.match(instruction.opcode):
        group |= _registers_of(instruction)
        if "gsb0" in instruction.operands:  # the group is closed
            oldest = len(groups) - _MOST_GROUPS + 1
            groups = (frozenset().union(*groups[: oldest + 1]), *groups[oldest + 1 :]) if oldest > 0 else groups
            groups, group = (*groups, group), frozenset()
    elif left := re.match(r"gsb0, 0x(\w+)", instruction.operands):  # WARPGROUP.DEPBAR.LE: so many may be left
        groups = groups[max(0, len(groups) - int(left[1], 16)) :]
    return groups, group


def _registers_of(product: Instruction) -> frozenset[int]:
    """What a product reads: the accumulator ``[64, N]``, spread over 128 threads, and a left operand in registers."""
    accumulator, left, *_ = product.operands.split(", ")
    columns = int(re.search(r"64x(\d+)x", product.opcode)[1])  # type: ignore[index]
    registers = columns // 2 if re.search(r"\.(F32|S32)", product.opcode) else columns // 4
    return _run(accumulator, registers) | _run(left, _LEFT_OPERAND)


def written(instruction: Instruction) -> frozenset[int]:
    """The registers that an instruction writes. A guarded one may. A product's own are no danger to it."""
    if _ONLY_READS.match(instruction.opcode) or _PRODUCT.match(instruction.opcode):
        return frozenset()
    destination = re.match(r"(?:PT, |P\d, )?(R\d+)", instruction.operands)
    return _run(destination[1], _width(instruction.opcode)) if destination else frozenset()


def _width(opcode: str) -> int:
    """How many registers follow each other in the destination."""
    modifiers = {*opcode.split(".")}
    if "128" in modifiers or re.fullmatch(r"LDSM.*\.4|IMMA.*|HMMA.*F32.*", opcode):
        return 4
    two = {"64", "WIDE", "F64"} & modifiers or re.fullmatch(r"LDSM.*\.2|HMMA.*|CS2R|D(ADD|MUL|FMA).*", opcode)
    return 2 if two else 1


def _run(first: str, count: int) -> frozenset[int]:
    number = re.match(r"R(\d+)", first)
    return frozenset(range(int(number[1]), int(number[1]) + count)) if number else frozenset()
