"""What a command imports before it has work: for ``--help`` and wrong arguments not even torch, else torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

import apollo_triton
from apollo_triton.core.embeddings import CHOICES
from apollo_triton.tools import options
from apollo_triton.tools.demo.training import LABELS, SIZES
from apollo_triton.tools.llama import LARGER, named_sizes

# Runs the console script in a process of its own, and says which of the slow modules it has imported.
SCRIPT = """
import sys
from apollo_triton.cli import main
try:
    status = main({arguments})
except SystemExit as ended:
    status = ended.code
print("imported:", *sorted({{"torch", "transformers", "triton"}} & set(sys.modules)), "status", status)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "env"),
        (["--version"], 0, f"apollo-triton {apollo_triton.__version__}"),
        (["memory", "--help"], 0, "--single-card"),
        (["demo", "--help"], 0, "--resume"),
        (["validate", "--help"], 0, "--full"),
        (["env", "--help"], 0, "--json"),
        (["convert", "--help"], 0, "OLD NEW"),
        (["convert", "old.pt"], 2, "the following arguments are required: NEW"),
        (["memory", "--rank", "many"], 2, "argument --rank: invalid int value: 'many'"),
        (["validate", "7B"], 2, "apollo-triton validate: error: unrecognized arguments: 7B"),
        (["memory", "7B", "--ranks", "4"], 2, "apollo-triton memory: error: unrecognized arguments: --ranks"),
        ([], 2, "the following arguments are required"),
    ],
)
def test_help_and_wrong_arguments_do_not_wait_for_torch(arguments, status, said):
    """Seconds of imports before a usage text."""
    code = SCRIPT.format(arguments=arguments)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.splitlines()[-1] == f"imported: status {status}"
    assert said in found.stdout + found.stderr


def test_the_names_in_the_help_are_those_of_the_modules():
    assert named_sizes() == options.LLAMA_SIZES
    assert (*CHOICES,) == options.EMBEDDINGS
    assert tuple(LARGER) == options.LARGER_SIZES
    assert tuple(SIZES) == options.DEMO_SIZES
    assert tuple(LABELS) == options.DEMO_METHODS


@pytest.mark.slow
def test_the_package_gives_every_name_and_no_other():
    """A name of ``__all__`` whose module the lazy import does not know; a folder that ``import apollo_triton`` used to
    bring; a wrong name that is no AttributeError."""
    code = """
import apollo_triton
assert "torch" not in __import__("sys").modules
assert set(apollo_triton.__all__) <= set(dir(apollo_triton))
for name in apollo_triton.__all__:
    assert getattr(apollo_triton, name) is getattr(apollo_triton, name)
assert apollo_triton.int8.Int8Weight and apollo_triton.layerwise.Layerwise and apollo_triton.optimizer.APOLLOAdamW
assert not hasattr(apollo_triton, "APOLLOAdam") and not hasattr(apollo_triton, "__wrapped__")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_no_program_imports_an_optional_library_before_it_runs() -> None:
    """A command that cannot say what it takes where transformers, triton, rich or matplotlib is missing."""
    programs = (
        "cli",
        "tools.convert",
        "tools.demo.command",
        "tools.memory.command",
        "tools.memory.single_card",
        "tools.validate.command",
    )
    code = "import sys\n" + "".join(f"import apollo_triton.{name}\n" for name in programs) + "print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "apollo_triton.tools.demo.command" in found
    optional = {"transformers", "triton", "rich", "matplotlib", "apollo_triton.backends.triton.verbs"}
    assert optional & set(found) == set()
