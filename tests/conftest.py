"""Tests import their helpers (``oracle``, ``sanitizer``) by name, and run on one thread each, so that float sums are
the same everywhere and two workers fit two cores. In CI hypothesis draws the same examples every time, elsewhere new
ones. Without a GPU Triton's interpreter runs the kernels.

The fixture ``backend`` repeats a test on the reference path, on the kernels in the interpreter, and on a GPU if any.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

from apollo_triton.backends.reference import dense_8bit
from apollo_triton.core.device_backend import Backend

sys.path.insert(0, str(Path(__file__).parent / "support"))
from tiers import BACKEND_MARKS, HAS_TRITON

torch.set_num_threads(1)
# It is looked through for doctests, and needs a package that only `make test-all` installs.
collect_ignore = [] if importlib.util.find_spec("lightning") else ["support/lightning_model.py"]
if importlib.util.find_spec("hypothesis"):  # on a lent GPU it may be missing, and the other tests run
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True)
    if os.environ.get("CI"):
        settings.load_profile("ci")

if HAS_TRITON:
    # The kernels become the interpreter's when they are imported: now, and not in a test that changes the environment.
    importlib.import_module("apollo_triton.backends.triton.verbs")


# Modules and functions that may have no case in ``make test``, and why.
FULL_ALONE: dict[str, str] = {
    "test_accelerate_fsdp": "foreign program",
    "test_cards": "ten seconds a cell; test_memory_sharded has small models",
    "test_codegen_tritons": "other versions of Triton, which make test does not install",
    "test_configurations": "foreign programs; Hydra has a case, and the options of each file",
    "test_frameworks": "foreign program; the plain loop has cases",
    "test_fsdp::test_fsdp_and_tensor_parallel": "test_savings has it with all savings",
    "test_fsdp::test_hybrid_sharding": "test_sharding has its placements, and test_sharded_memory replicas",
    "test_memory_sharded::test_few_layers_tell_of_many": "ten seconds; test_cards has whole models",
    "test_recipe_inputs::test_a_program_without_a_network_ends_with_what_to_do": "the test before it, in this process",
    "test_sanitizer": "the recorder's self-test; test_sanitizer_smoke has cases",
    "test_sanitizer_bytes": "the recorder's self-test; test_sanitizer_smoke has cases",
    "test_savings_faults::test_a_killed_rank_costs_what_was_not_saved_and_no_more": "test_distributed_faults kills too",
    "test_site": "mkdocs, which make test does not install; test_docs looks at links",
    "test_tools": "foreign program",
    "test_trainer": "foreign program; one run of the Trainer has a case",
    "test_wheel": "installs twice; test_package looks at what the wheel is to hold",
}


def pytest_collection_modifyitems(config, items):
    """Every test function keeps a case in ``make test``: repetitions are marked ``full``, never the bug class."""
    if config.args and any("::" in argument for argument in config.args):
        return
    functions = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and FULL_ALONE.keys().isdisjoint((item.path.stem, f"{item.path.stem}::{item.originalname}"))
    ]
    in_test = {(item.path, item.originalname) for item in functions if not item.get_closest_marker("full")}
    lost = {
        f"{item.path.name}::{item.originalname}" for item in functions if (item.path, item.originalname) not in in_test
    }
    if lost:
        raise pytest.UsageError(f"no case of these is left in make test, all are marked full: {sorted(lost)}")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=marks) for name, marks in BACKEND_MARKS.items()])
def backend(request):
    """Which backend updates parameters of groups with ``backend="auto"``, and where tensors are made."""
    if (request.param == "cuda") != torch.cuda.is_available() and request.param != "reference":
        pytest.skip("there is no CUDA device" if request.param == "cuda" else "kernels are compiled here")
    name = "reference" if request.param == "reference" else "triton"
    with pytest.MonkeyPatch.context() as patch:
        chosen = Backend(name, "the test asks so")
        patch.setattr("apollo_triton.backends.selection.device_backend", lambda parameter, asked: chosen)
        torch.set_default_device("cuda" if request.param == "cuda" else None)
        yield request.param
        torch.set_default_device(None)


@pytest.fixture
def bitsandbytes():
    """Skips where bitsandbytes cannot update 8-bit moments here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = dense_8bit.obstacle(device)
    if obstacle is not None:
        pytest.skip(obstacle)
    return pytest.importorskip("bitsandbytes")
