"""The two readers of machine code that say right or wrong, on code written by hand: what they are to find and what not.

``test_codegen.py`` turns them on the kernels.
"""

import pytest

from bench.codegen.hazards import hazards
from bench.codegen.listing import sass
from bench.codegen.pipeline import tiles

# A product of 64 rows: accumulator R24 to R31, left operand R44 to R47. The second closes the group of both.
PRODUCTS = """
    HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR24], R24
    HGMMA.64x16x16.F32.BF16 R24, R44, gdesc[UR16], R24, gsb0"""
WAIT_FOR_ALL, WAIT_FOR_ALL_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def written_in_flight(code: str) -> int:
    """The hazards of lines of machine code, of which labels end in a colon."""
    lines = [line.strip() for line in code.strip().splitlines()]
    listed = [
        line if line.endswith(":") else f"        /*{16 * index:04x}*/  {line} ;" for index, line in enumerate(lines)
    ]
    return hazards(sass("\n".join(listed)))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("FADD R44, R1, R2", 1),  # the left operand of the last product
        ("F2FP.BF16.F32.PACK_AB R43, R1, R2", 1),  # and of one before it in the group
        ("FMUL R31, R31, 2", 1),  # the accumulator
        ("LDS.128 R36, [R1]", 0),  # R36 to R39
        ("LDS.128 R37, [R1]", 1),  # R37 to R40
        ("LDS.64 R39, [R1+UR11]", 1),
        ("LDS R39, [R1]", 0),
        ("IMAD.WIDE.U32 R39, R1, 0x10, R4", 1),
        ("@!P0 MOV R45, R1", 1),  # a guarded write may happen
        ("SHFL.BFLY PT, R46, R1, 0x1, 0x1f", 1),  # the destination follows a predicate
        ("LOP3.LUT P0, R47, R1, 0x1, RZ, 0xc0, !PT", 1),
        ("ISETP.NE.AND P0, PT, R44, R45, PT", 0),  # what reads
        ("STS.128 [R40+UR11], R44", 0),
        ("LDGSTS.E.BYPASS.128 [R44], [R40.64]", 0),
        ("R2UR UR4, R44", 0),
        ("FADD R48, R44, R45", 0),
    ],
)
def test_what_counts_as_a_write_under_a_product(instruction, expected):
    """A destination of one register where there are four, a predicate or an address taken for one."""
    assert written_in_flight(f"{PRODUCTS}\n{instruction}\nEXIT") == expected
    assert written_in_flight(f"{PRODUCTS}\n{WAIT_FOR_ALL}\n{instruction}\nEXIT") == 0


def test_a_wait_for_all_groups_but_one_leaves_the_last_in_flight():
    second = "HGMMA.64x16x16.F32.BF16 R24, R52, gdesc[UR24], R24, gsb0"
    both = f"{PRODUCTS}\n{second}\n{WAIT_FOR_ALL_BUT_ONE}"
    assert written_in_flight(f"{both}\nMOV R44, R1\nEXIT") == 0
    assert written_in_flight(f"{both}\nMOV R52, R1\nEXIT") == 1
    # A group that is not closed is not waited for.
    assert written_in_flight(f"{PRODUCTS.replace(', gsb0', '')}\n{WAIT_FOR_ALL}\nMOV R44, R1\nEXIT") == 1


LOOP = f"""
.L_x_0:
    {{at_its_start}}
    {PRODUCTS}
    {{at_its_end}}
    @P0 BRA `(.L_x_0)
    {{after_it}}
    EXIT"""


@pytest.mark.parametrize(
    ("at_its_start", "at_its_end", "after_it", "expected"),
    [
        ("MOV R44, R1", "", "", 1),  # the next turn writes what the last has left in flight
        ("MOV R44, R1", WAIT_FOR_ALL_BUT_ONE, "", 1),
        ("MOV R44, R1", WAIT_FOR_ALL, "", 0),
        (WAIT_FOR_ALL, "", "MOV R44, R1", 1),  # the last turn's is in flight after the loop
        (WAIT_FOR_ALL, "", f"{WAIT_FOR_ALL}\nMOV R44, R1", 0),
        ("MOV R44, R1", "", "MOV R45, R1", 2),
    ],
)
def test_what_a_turn_leaves_in_flight_meets_the_next_turn_and_what_follows(
    at_its_start, at_its_end, after_it, expected
):
    """The bug of float32 gradients at ranks 16 and 32 was in the next turn, where a straight reading sees nothing."""
    assert (
        written_in_flight(LOOP.format(at_its_start=at_its_start, at_its_end=at_its_end, after_it=after_it)) == expected
    )


def test_code_that_a_branch_leaves_out_is_left_out():
    """A write on the way that has no product in flight, though it stands below one that has."""
    code = f"@P0 BRA `(.L_x_1)\n{PRODUCTS}\nBRA `(.L_x_2)\n.L_x_1:\nMOV R44, R1\n.L_x_2:\nEXIT"
    assert written_in_flight(code) == 0
    assert written_in_flight(code.replace("BRA `(.L_x_2)", "@P1 BRA `(.L_x_2)")) == 1


def ttgir(dialect: str, uses: str) -> str:
    """A loop that loads G at two stages as Triton writes it, with ``uses`` of this turn's tile."""
    return f"""
#loc1 = loc("kernel.py":7:12)
#loc2 = loc("G"(#loc1))
#loc3 = loc(callsite(#loc2 at #loc1))
%1 = {dialect}.local_alloc : () -> !{dialect}.memdesc<2x64x32xbf16, #shared, #smem, mutable> loc(#loc3)
%2 = {dialect}.local_alloc : () -> !{dialect}.memdesc<2x1xi64, #shared, #smem, mutable> loc(#loc1)
%3 = scf.for %4 = %c0 to %5 step %c64 iter_args(%6 = %cst) -> (tensor<64x64xf32, #mma>) : i64 {{
  %7 = {dialect}.memdesc_index %1[%8] : !{dialect}.memdesc<2x64x32xbf16> -> !{dialect}.memdesc<64x32xbf16> loc(#loc3)
{uses}
  scf.yield %10 : tensor<64x64xf32>
}}"""


VIEW = "%9 = ttg.memdesc_trans %7 : !ttg.memdesc<64x32xbf16> -> !ttg.memdesc<32x64xbf16> loc(#loc3)"
HOPPER = "%10 = ttng.warp_group_dot %11, %9, %6 {isAsync = true} : tensor<64x32xbf16> -> tensor<64x64xf32> loc(#loc3)"
BLACKWELL = "ttng.tc_gen5_mma %7, %11, %13, %true, %true, %14[%true] {is_async} : !ttg.memdesc<64x32xbf16>, loc(#loc3)"
REGISTERS = "%12 = ttg.local_load %7 : !ttg.memdesc<64x32xbf16> -> tensor<64x32xbf16, #blocked> loc(#loc3)"
COPY = "%15 = ttg.async_copy_global_to_local %16, %17 mask %18 : tensor<64x32x!tt.ptr<bf16>> -> <64x32xbf16> loc(#loc3)"
OLD = "%10 = triton_nvidia_gpu.warp_group_dot %7, %11, %6 {isAsync = true} : !tt.memdesc<64x32xbf16> loc(#loc3)"


@pytest.mark.parametrize(
    ("dialect", "uses", "is_read"),
    [
        ("ttg", [REGISTERS, COPY], False),
        ("ttg", [VIEW, HOPPER, COPY], True),  # through a view of it
        ("ttg", [VIEW, HOPPER, "ttng.warp_group_dot_wait %10 {pendings = 1 : i32} : loc(#loc3)", COPY], True),
        ("ttg", [VIEW, HOPPER, "ttng.warp_group_dot_wait %10 {pendings = 0 : i32} : loc(#loc3)", COPY], False),
        ("ttg", [VIEW, HOPPER.replace("{isAsync = true} ", ""), COPY], False),
        ("ttg", [COPY, VIEW, HOPPER], True),  # by the copies of the next turn
        ("ttg", [REGISTERS, BLACKWELL, COPY], True),
        ("ttg", [BLACKWELL, "ttng.wait_barrier %14, %c0, %true : loc(#loc3)", COPY], False),
        ("ttg", [BLACKWELL, "ttng.wait_barrier %99, %c0, %true : loc(#loc3)", COPY], True),  # for an earlier one
        ("triton_gpu", [OLD, COPY], True),  # as triton 3.2 writes it
    ],
)
def test_a_tile_is_read_by_a_product_that_copies_do_not_wait_for(dialect, uses, is_read):
    """Barriers counted as slots, a transposed view missed, a product taken for waited for, other versions' names."""
    assert tiles(ttgir(dialect, "\n".join(uses))) == {"G": (2, is_read)}
