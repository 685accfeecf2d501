"""The kernels compiled for GPUs that are not here (bench/codegen.py): every variant compiles, and into what it should.

``make test`` compiles a variant of each kernel for sm_90, and of each kind of fault for the target that shows it.
``make test-all`` compiles all variants for sm_90 and the essential ones for the other targets. ``python -m
bench.codegen`` has all of it. ``test_codegen_instruments.py`` tests the readers of machine code.
"""

import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.codegen.targets import TARGETS

pytestmark = pytest.mark.slow  # the first test waits for the compiler
SOURCE = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "bench.codegen"]
CHOSEN = {
    "few": ["--few", "sm_80", "sm_90", "sm_100"],
    "all": ["--all", "sm_90", "--essential", "sm_80", "sm_89", "sm_100", "gfx942"],
}

# Instructions an element, as static code. A B200 stays memory-bound below 26 for the 6 bytes that apply streams, and
# below 8.8 for the 2 of the sketch at rank 1; an H200 below 13 for each 2 bytes. Of dense's 22 or 28 bytes no more than
# 44 are to be spent. int8 apply streams 4 bytes, and took 77 when it divided each element. gfx942 has twice the
# threads, so each spreads the same set-up over half as many elements.
MOST_PER_ELEMENT = {"sketch": 8.9, "apply": 24, "apply_int8": 58, "dense": 44, "squared_norm": 6}
# A program of rows divides 64-bit integers once, which dense's does not, and streams 14 bytes: an H200 has 91 for them.
# Of bfloat16 moments it streams 10 bytes, which leave 65, and of 8-bit ones 8, which leave 52. To round them takes
# more: 75 and, with codes found by eight comparisons, 115. These two are bound by instructions there.
MOST_PER_ELEMENT |= {"row_sums": 6, "dense_rows": 56}
MOST_PER_ELEMENT_STOCHASTIC = {"dense": 80, "dense_rows": 80}
MOST_PER_ELEMENT_8BIT = {"dense_rows": 120}
# Of 16-bit weights and gradients, rounded to nearest or stochastically.
MOST_OF_APPLY = {"sm_100": (15, 27), "sm_90": (16, 28), "sm_89": (16, 28), "sm_80": (16, 28), "gfx942": (28, 44)}
# The same of products with a half-precision gradient, by the highest rank. At rank 256 two halves share a tile of P:
# apart they take 8.9 and 10.1. Where P goes through registers, because its dtype is not G's, rank 64 takes 5.4.
MOST_OF_PRODUCT = {"sm_90": {64: 4, 128: 5.2, 256: 6.5}, "sm_100": {64: 4, 128: 5.2, 256: 7}}
STAGES_AT_256 = 4
# Bytes of stack a thread where R, M and V of a 64 x 128 tile on 4 warps, or of two of 64 x 256 on 8, do not fit 255
# registers (304 and 1168 on sm_90). Written and read once per program: 116 KiB against 512 KiB of gradient at width
# 4096, 500 KiB against 1 MiB.
MOST_STACK_AT_128, MOST_STACK_AT_256 = 512, 1200
MOST_STACK_OF_ODD_BLOCKS = 2400  # of 8-bit moments: 256 channels of 17, padded to 32, are a block
# The two directions of an int8 linear layer.
LINEAR = ("forward", "input_gradient")
# A step from a layer's operands.
PRODUCTS = ("apply_operands", "apply_int8_operands", "tile_norms", "gram", "gram_norms", "collect")


# Why a tile of a row has fewer slots than its stages ask for.
FEWER_SLOTS = {
    "triton 3.4 and later give none to a left operand of mma.sync that is stored transposed": lambda row, name: (
        (
            row["target"] in ("sm_80", "sm_89", "gfx942") or "64x32x" in row["what"]
        )  # sm_90: 32 rows are too few for wgmma
        and name in ("dY", "kept")
    ),
    "rows that do not start at 16 bytes are loaded element by element": lambda row, name: (
        "unaligned" in row["what"]
        or (row["kernel"] in LINEAR and "groups of 1001" in row["what"])
        or (row["kernel"] == "input_gradient" and "groups of 27" in row["what"])
    ),
    "triton pipelines no loop with a loop inside; unrolled, the parts would not fit: kernels/sketch.py": (
        lambda row, name: "parts in a loop" in row["what"]
    ),
    "AMD's compiler gives none to what two products use": lambda row, name: (
        row["target"] == "gfx942" and row["kernel"] in ("sketch", "project")
    ),
}


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.full)])
def rows(request, tmp_path_factory):
    """The table of ``bench.codegen``, from a process in which Triton does not interpret; one for all pytest workers."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    shared = tmp_path_factory.mktemp("codegen") if run is None else tmp_path_factory.getbasetemp().parent / run
    folder = shared / request.param
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "every-machine" / "codegen.json"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not table.exists():
            environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
            command = [*COMMAND, *CHOSEN[request.param], "--out", str(folder)]
            done = subprocess.run(command, cwd=SOURCE, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(table.read_text())["rows"]


def of(rows, *kernels):
    """The rows of these kernels that have compiled."""
    found = [row for row in rows if row["kernel"] in kernels and "error" not in row]
    assert found
    return found


def check(rows, holds):
    """Every row ``holds``; shows all that do not."""
    bad = [row for row in rows if not holds(row)]
    assert not bad, "\n".join(str(row) for row in bad)


def wanted(row, name):
    return row["wanted_slots"][name]


def rank(row):
    return int(re.search(r"rank (\d+)", row["what"])[1])


def test_every_variant_compiles_for_every_target(rows, request):
    chosen = CHOSEN[request.node.callspec.params["rows"]]
    assert {row["target"] for row in rows} == {word for word in chosen if not word.startswith("--")}
    kernels = {"sketch", "rescale", "apply", "apply_int8", "dense", "squared_norm", "projection"}
    kernels |= {"row_sums", "dense_rows"}
    kernels |= {"rescale_blockwise", "project", "step", *LINEAR, *PRODUCTS}
    assert {row["kernel"] for row in rows if row["target"] == "sm_90"} == kernels
    check(rows, lambda row: "error" not in row)


@pytest.mark.parametrize(
    ("kernel", "streams"),
    [
        ("sketch", ["load G"]),
        ("apply", ["load G", "load W", "store W"]),
        ("apply_int8", ["load G", "load q", "store q"]),
        ("dense", ["load G", "load W", "load M", "load V", "store W", "store M", "store V"]),
        ("squared_norm", ["load G"]),
        ("row_sums", ["load G"]),
        ("dense_rows", ["load G", "load W", "store W"]),
        ("rescale", ["load R", "load M", "load V", "store M", "store V"]),
    ],
)
def test_streams_are_loaded_and_stored_16_bytes_at_a_time(rows, kernel, streams):
    # Rescale's rows are a channel's numbers: at ranks 1 and 4 a thread has not as many of them.
    aligned = [
        row
        for row in of(rows, kernel)
        if "unaligned" not in row["what"] and not (kernel == "rescale" and rank(row) < 8)
    ]
    assert aligned
    check(aligned, lambda row: all(re.fullmatch(r"\d+ x 128", row["widths"].get(name, "none")) for name in streams))


def test_8bit_moments_are_stored_at_least_4_bytes_at_a_time(rows):
    whole = [row for row in of(rows, "rescale_blockwise") if rank(row) % 4 == 0]  # else ends are at any byte
    check(whole, lambda row: re.fullmatch(r"\d+ x (128|64|32)", row["widths"]["store q"]))


def test_a_projection_in_memory_is_loaded_at_least_8_bytes_at_a_time(rows):
    """8 where the tile, rank 16 on gfx942, has no more than that for a thread."""
    read = [row for row in of(rows, "sketch") if "P read" in row["what"] and "unaligned" not in row["what"]]
    check(read, lambda row: re.fullmatch(r"\d+ x (128|64)", row["widths"]["load P"]))


def test_only_the_projection_is_computed_in_float64(rows):
    """Once a refresh, so that its rounding falls as in PyTorch."""
    check(of(rows, "projection"), lambda row: row["float64"] == ("signs" not in row["what"]))
    others = ("sketch", "rescale", "apply", "apply_int8", "dense", "squared_norm", "row_sums", "dense_rows")
    check(of(rows, *others), lambda row: not row["float64"])


def test_products_are_on_tensor_cores_from_rank_2_on(rows):
    random = [row for row in of(rows, "sketch") if "svd" not in row["what"]]
    check(random, lambda row: row["tensor_core"] == (rank(row) > 1))
    check(of(rows, "apply", "dense", "squared_norm", "projection", "rescale"), lambda row: not row["tensor_core"])


def test_nothing_is_rounded_to_tf32(rows):
    """triton 3.7 does it on sm_100, in spite of input_precision="ieee", where an operand has been bfloat16 before."""
    check(of(rows, "sketch"), lambda row: not row["tf32"])


def test_nothing_spills_but_the_tile_from_rank_128_on(rows):
    fits = [row for row in of(rows, "sketch") if rank(row) < 128 or "split" in row["what"]]
    others = of(rows, "apply", "apply_int8", "dense", "squared_norm", "rescale", "rescale_blockwise")
    others += of(rows, "row_sums", "dense_rows")
    aligned = [row for row in fits + others if "unaligned" not in row["what"]]
    odd = [row for row in aligned if row["kernel"] == "rescale_blockwise" and rank(row) % 2]
    check(odd, lambda row: row["stack"] <= MOST_STACK_OF_ODD_BLOCKS and row["spills_in_loop"] == 0)
    aligned = [row for row in aligned if row not in odd]
    check([row for row in aligned if row["target"] != "sm_80"], lambda row: row["stack"] <= 8 and row["spilling"] <= 1)
    check(
        aligned, lambda row: row["stack"] <= 24 and row["spills_in_loop"] == 0
    )  # sm_80: columns of float32 at rank 64


def test_spills_of_the_tile_from_rank_128_on_are_bounded(rows):
    tile = [row for row in of(rows, "sketch") if rank(row) >= 128 and "unaligned" not in row["what"]]
    check(tile, lambda row: row["stack"] <= (MOST_STACK_AT_128 if rank(row) == 128 else MOST_STACK_AT_256))


def test_nothing_is_written_under_a_product_in_flight(rows):
    """Wrong results on an H100, and not always: ranks 16 and 32 of float32 gradients once wrote 18 and 33 registers."""
    check(rows, lambda row: row.get("hazards") == 0)


def test_every_tile_of_a_product_has_the_slots_of_its_stages(rows):
    """A slot too few for a tile that a product reads: the next copy overwrites it (a seventh of R was wrong on an
    H100). A slot too few for all, or none: the kernel waits for memory."""
    products = [row for row in rows if row.get("slots")]
    assert products
    short = [(row, name) for row in products for name, number in row["slots"].items() if number < wanted(row, name)]
    bad = [f"{name}: {row}" for row, name in short if not any(holds(row, name) for holds in FEWER_SLOTS.values())]
    assert not bad, "\n".join(bad)
    if "gfx942" in {
        row["target"] for row in rows
    }:  # all variants: a reason that no longer holds would hide the next fault
        assert all(any(holds(*each) for each in short) for holds in FEWER_SLOTS.values())


def test_tiles_fit_shared_memory(rows):
    """Of each target, of which sm_89 stands for sm_86 and sm_120 as well."""
    check(of(rows, "sketch"), lambda row: row["shared"] <= TARGETS[row["target"]].shared_memory << 10)


def test_instructions_an_element_leave_the_memory_to_decide(rows):
    def holds(row):
        if re.search("G (bf|fp)16 W (bf|fp)16", row["what"]) and row["kernel"] == "apply":
            return row["per_element"] <= MOST_OF_APPLY[row["target"]]["stochastic" in row["what"]]
        bounds = MOST_PER_ELEMENT | (MOST_PER_ELEMENT_STOCHASTIC if "stochastic" in row["what"] else {})
        bounds |= MOST_PER_ELEMENT_8BIT if "M uint8" in row["what"] else {}
        return row["per_element"] <= bounds[row["kernel"]] * (2 if row["target"] == "gfx942" else 1)

    streaming = of(rows, "apply", "apply_int8", "dense", "squared_norm", "row_sums", "dense_rows")
    mini = [row for row in of(rows, "sketch") if rank(row) == 1]
    check([row for row in streaming + mini if "unaligned" not in row["what"]], holds)


def test_the_loop_of_a_product_is_short_and_spills_nothing(rows):
    """Registers that go to memory and back in every turn, halves that are multiplied apart, a stage less."""
    sketches = [row for row in of(rows, "sketch") if row["target"] in MOST_OF_PRODUCT and 1 < rank(row) <= 256]
    half = [
        row for row in sketches if re.search("P read .*G (bf|fp)16", row["what"]) and "unaligned" not in row["what"]
    ]

    def is_short(row):
        bounds = MOST_OF_PRODUCT[row["target"]]
        return row["per_element"] <= bounds[min(most for most in bounds if rank(row) <= most)]

    check(half, is_short)
    check(half, lambda row: row["spills_in_loop"] == 0)
    at_256 = [row for row in half if rank(row) == 256]
    assert at_256
    check(at_256, lambda row: set(row["slots"].values()) == {STAGES_AT_256})


def test_the_moments_of_the_second_block_of_channels_are_fetched_ahead(rows):
    """Each line of 128 bytes of M and of V by one thread: fewer would leave some to be waited for."""
    in_float32 = "channel G bf16 M fp32 halves"  # 64 channels of 256 numbers
    at_256 = [row for row in of(rows, "sketch") if rank(row) == 256 and in_float32 in row["what"]]
    on_hopper = [row for row in at_256 if row["target"] == "sm_90"]
    assert on_hopper
    check(on_hopper, lambda row: row["prefetches"] * 32 * row["warps"] * 128 == 2 * 64 * 256 * 4)


def test_int8_weights_of_a_layer_are_loaded_at_least_8_bytes_at_a_time(rows):
    """Wherever a row of W starts at a multiple of 16 bytes, groups of any size."""
    aligned = [row for row in of(rows, *LINEAR) if "groups of 1001" not in row["what"]]
    check(aligned, lambda row: re.fullmatch(r"\d+ x (128|64)", row["widths"]["load q"]))


def test_float32_layers_are_rounded_to_tf32_where_pytorch_would_only(rows):
    """Not by triton 3.7 on sm_100, whatever input_precision says: see blocks in kernels/linear.py."""
    nvidia = [row for row in of(rows, *LINEAR) if row["target"] != "gfx942"]
    check(nvidia, lambda row: row["tf32"] == row["what"].endswith("tf32"))
    check(nvidia, lambda row: row["tensor_core"] == (not row["what"].endswith("fp32")))


def test_layers_fit(rows):
    """Tiles of W in registers, without spills but where each weight has a scale of its own; buffers in the shared
    memory of the smallest GPUs: 64 KiB on AMD's, 99 KiB on sm_86 and sm_89. Two programs at a time on sm_90."""
    linear = of(rows, *LINEAR)
    check(linear, lambda row: row["stack"] <= (128 if "runs of 1 " in row["what"] else 0))
    check(linear, lambda row: row["shared"] <= (64 if row["target"] == "gfx942" else 99) << 10)
    half = [row for row in linear if row["target"] == "sm_90" and re.search(r"of (128|16) .* bf16", row["what"])]
    check(half, lambda row: row["warps"] * 32 * row["registers"] <= 65536 // 2)


@pytest.mark.parametrize(
    ("kernel", "streams"),
    [
        ("project", ["load G"]),
        ("collect", ["load kept"]),
        ("tile_norms", ["load X", "load dY"]),
        ("gram", ["load X", "load Z"]),
        ("gram_norms", ["load S", "load kept"]),
        ("apply_operands", ["load X", "load dY", "load W", "store W"]),
        ("apply_int8_operands", ["load X", "load dY", "load q", "store q"]),
    ],
)
def test_operands_are_loaded_16_bytes_at_a_time(rows, kernel, streams):
    """But where a tile has no more for a thread, and transposed for TF32, which shared memory cannot do."""
    aligned = [row for row in of(rows, kernel) if not re.search("unaligned|tf32", row["what"])]
    assert aligned
    for name in streams:
        few = name[0] == "s" or kernel == "apply_int8_operands"
        width = "128|64|32" if few else "128"
        check(aligned, lambda row, name=name, width=width: re.fullmatch(rf"\d+ x ({width})", row["widths"][name]))


def test_products_from_operands_fit(rows):
    """No spills that count; buffers in the shared memory of the GPUs that are to have them: 64 KiB on AMD's, 99 KiB on
    most of NVIDIA's, 163 KiB on those that take the tiles of 256 columns. Two programs at a time for those of 128."""
    products = [row for row in of(rows, *PRODUCTS) if "unaligned" not in row["what"]]
    check(products, lambda row: not row["float64"])
    half = [row for row in products if re.search(r"bf16|tf32", row["what"])]
    check(half, lambda row: row["tensor_core"])
    check(products, lambda row: row["tf32"] == row["what"].endswith("tf32") or row["target"] == "gfx942")
    check(products, lambda row: row["stack"] <= (64 if row["target"] in ("sm_80", "sm_89") else 0))
    own = [row for row in products if not re.search(r"x256x(64|32)\b", row["what"]) or row["target"] != "gfx942"]
    check(own, lambda row: row["shared"] <= (64 if row["target"] == "gfx942" else 160) << 10)
    small = [row for row in products if not re.search(r"x256x(64|32)\b", row["what"])]
    check(small, lambda row: row["shared"] <= 99 << 10)
    two = [
        row for row in small if row["kernel"] == "apply_operands" and row["target"] == "sm_90" and "bf16" in row["what"]
    ]
    check(two, lambda row: row["warps"] * 32 * row["registers"] <= 65536 // 2)
