"""apollo-triton validate: what it prints, that it finds and names a planted bug, and its float64 against the oracle."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import OracleMatrix, oracle_adamw

from apollo_triton import projection_matrix
from apollo_triton.cli import main
from apollo_triton.core.settings import LOW_RANK_DEFAULTS, Settings
from apollo_triton.tools.validate import command as validate
from apollo_triton.tools.validate.cases import DTYPES, MINI, Case, default_cases, full_cases
from apollo_triton.tools.validate.float64 import Matrix, dense_step, low_rank_step

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")

VERBS = Case("verbs", "verbs", ((40, 24),), "fp32", {"rank": 4, "weight_decay": 0.1}, steps=3)
WHOLE = Case("steps", "whole", ((24, 40),), "fp32", {"rank": 4, "weight_decay": 0.1})
TENSOR = Case("steps", "tensor", ((40, 24), (24, 40)), "bf16", MINI | {"stochastic_rounding": True}, steps=4)
DENSE = Case("steps", "dense", ((40, 24), (7,)), "fp16", {"weight_decay": 0.1}, steps=4)
ROWS = Case("steps", "rows", ((20, 24), (3, 300), (7,)), "fp32", {"weight_decay": 0.1, "second_moment": "row"}, steps=4)
MADE = Case("projection", "made", ((24, 24),), "fp32", {"rank": 4, "proj_type": "right"})
IN_MEMORY = Case("projection", "in memory", ((24, 24),), "fp32", {"rank": 20, "proj_type": "left"})


@pytest.fixture
def few(monkeypatch):
    """Fewer cases; a case may be replaced by others."""

    def choose(*cases):
        monkeypatch.setattr(validate, "default_cases", lambda on_gpu: list(cases))
        monkeypatch.setattr(validate, "full_cases", lambda on_gpu: list(cases))

    choose(MADE, IN_MEMORY, VERBS, WHOLE, TENSOR, DENSE)
    return choose


@pytest.fixture
def fused():
    return pytest.importorskip("apollo_triton.backends.triton.verbs")


def missed(capsys, *arguments):
    """Exit status, and the names and measures of the lines that end in MISS."""
    status = main(["validate", *arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("MISS")]
    return status, {line.split()[0] for line in lines}, {line[41:49].strip() for line in lines}


@pytest.mark.slow
@needs_triton
def test_it_prints_a_line_for_each_stage_and_fits_80_columns(few, capsys):
    assert main(["validate"]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert f"torch {torch.__version__}" in output.replace("\n", " ")
    assert "MISS" not in output
    assert sum(line.endswith(" ok") for line in lines) == 2 + 3 + 3
    assert [line.split()[-6] for line in lines if line.endswith(" ok")][2:5] == ["sketch", "rescale", "apply"]
    assert "6 of 6 cases: 6 ok, 0 missed. Largest share of a limit: " in output


@needs_triton
def test_full_prints_misses_and_progress_alone(few, capsys, monkeypatch):
    few(MADE, TENSOR, DENSE)
    monkeypatch.setattr(validate, "_PROGRESS_SECONDS", -1)
    assert main(["validate", "--full"]) == 0
    output = capsys.readouterr().out
    assert " ok\n" not in output
    assert re.search(r"\n2 of 3 cases, 0 missed; about \d+ seconds to go\n", output)


@pytest.mark.slow
@needs_triton
def test_ctrl_c_prints_what_was_done_so_far(few, capsys, monkeypatch):
    add = validate.Report.add

    def interrupted(self, case):
        if case is VERBS:
            raise KeyboardInterrupt
        add(self, case)

    monkeypatch.setattr(validate.Report, "add", interrupted)
    assert main(["validate"]) == 130
    found = capsys.readouterr()
    assert "\n2 of 6 cases: 2 ok, 0 missed." in found.out
    assert (found.out + found.err).count("interrupted") == 1


@needs_triton
def test_it_says_where_it_stands_and_fits_60_columns(few, capsys, monkeypatch):
    """Lines that a narrow terminal breaks within a number; an hour of which nobody knows how far it has come."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(validate, "_PROGRESS_SECONDS", -1)
    few(MADE, IN_MEMORY, DENSE)
    assert main(["validate"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 60
    assert "; 3 cases\n" in output
    assert "\nCases 1 to 2 of 3: P, made" in output
    assert "\nCase 3 of 3: trajectories" in output
    stands = [line.split(" cases")[0] for line in output.splitlines() if " to go" in line]
    assert stands == ["1 of 3", "2 of 3", "3 of 3"]
    figures = [line.split()[-4:-1] for line in output.splitlines() if line.endswith(" ok")]
    assert [len([float(figure) for figure in line]) for line in figures] == [3, 3, 3]


def test_every_quantity_is_defined():
    """A column of figures of which nobody says what they are, and a definition of what is nowhere shown."""
    folder = Path(validate.__file__).parent
    source = "".join((folder / name).read_text() for name in ("runs.py", "implicit.py"))
    literal = r"(?:errors\.add(?:_rounded)?\(\s*run\.name,\s*|_add_norms\(run, errors, )\"([^\"]+)\""
    noted = set(re.findall(literal, source))
    noted |= {name for name in ("M", "V", "by K") if f'("{name}", ' in source}
    shown = {measure for stages in validate.STAGES.values() for measures in stages.values() for measure in measures}
    assert shown <= noted
    assert set(validate.QUANTITIES) == noted


def off_by(amount):
    def plant(fused, monkeypatch):
        rescale, both = fused.rescale, fused.sketch_and_rescale
        wrong = lambda found: found._replace(channel=found.channel * (1 + amount))  # noqa: E731
        monkeypatch.setattr(fused, "rescale", lambda *given: wrong(rescale(*given)))
        monkeypatch.setattr(fused, "sketch_and_rescale", lambda *given: wrong(both(*given)))

    return plant


def wrong_decay(fused, monkeypatch):
    apply = fused.apply

    def planted(table, settings, moment, factors):
        apply(table, dataclasses.replace(settings, weight_decay=settings.weight_decay * 1.01), moment, factors)

    monkeypatch.setattr(fused, "apply", planted)


def wrong_mean(fused, monkeypatch):
    """One row's sum of squares is off by a share of 1e-4: a 33rd of one of 300 equal columns."""
    from apollo_triton.backends.triton import dense_rows

    sums = dense_rows.row_sums

    def planted(table):
        found = sums(table)
        found.row_parts[-1] *= 1 + 1e-4
        return found

    monkeypatch.setattr(dense_rows, "row_sums", planted)


def late_refresh(fused, monkeypatch):
    from apollo_triton.backends.triton import projections

    refresh = projections.refresh

    def planted(table, settings, moment):
        refresh(table, settings, moment._replace(step=max(1, moment.step - 1)))

    monkeypatch.setattr(projections, "refresh", planted)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("plant", "case", "measures"),
    [
        (off_by(1e-5), VERBS, {"s_c", "sums"}),
        pytest.param(off_by(1e-5), WHOLE, {"W", "W at end"}, marks=pytest.mark.full),
        pytest.param(wrong_decay, VERBS, {"W"}, marks=pytest.mark.full),
        (wrong_decay, WHOLE, {"W", "W at end"}),
        (wrong_mean, ROWS, {"V", "W", "W at end"}),
        (late_refresh, dataclasses.replace(WHOLE, options={"rank": 16}), {"W", "W at end", "M", "V", "u_prev"}),
    ],
)
def test_a_planted_bug_is_found_and_named(plant, case, measures, few, fused, capsys, monkeypatch):
    few(case)
    assert missed(capsys)[0] == 0
    plant(fused, monkeypatch)
    status, names, found = missed(capsys)
    assert status == 1
    assert names == {case.name}
    assert found & measures
    assert found <= measures


@needs_triton
def test_a_bug_of_the_reference_path_is_found_too(few, capsys, monkeypatch):
    from apollo_triton.backends.reference import verbs as reference

    few(WHOLE)
    monkeypatch.setattr(reference, "_GROWTH_LIMIT", 1.02)
    status, names, _ = missed(capsys)
    assert (status, names) == (1, {"whole"})


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seed", "-1"], "a seed is 0 to 2**32 - 1"),
        (["--device", "nonsense"], "--device nonsense: "),
        (["--device", "meta"], 'backend="triton" cannot run here: it is on meta'),
        pytest.param(["--device", "cuda"], "--device cuda: ", marks=in_interpreter),
    ],
)
def test_wrong_inputs_exit_with_2(arguments, text, few, capsys):
    assert main(["validate", *arguments]) == 2
    found = capsys.readouterr()
    assert text in found.err
    assert len(found.err.splitlines()) == 1
    assert not found.out


def in_a_new_process(code):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"{code}\nfrom apollo_triton.cli import main\nsys.exit(main(['validate']))"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_without_triton_the_message_names_the_extra():
    found = in_a_new_process("import sys; sys.modules['triton'] = None")
    assert found.returncode == 2
    assert "triton is needed here and is not installed: in a checkout pip install " in found.stderr
    assert "'.[triton]', elsewhere pip install 'apollo-triton[triton]'" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.slow
@needs_triton
@in_interpreter
def test_triton_imported_to_compile_is_an_error_that_says_so():
    found = in_a_new_process("import sys, triton")
    assert found.returncode == 2
    assert "triton was imported before, to compile; set TRITON_INTERPRET=1 before that" in found.stderr


@pytest.mark.parametrize("on_gpu", [False, True])
def test_cases_have_names_of_their_own_that_fit(on_gpu):
    cases = full_cases(on_gpu)
    assert cases[: len(default_cases(on_gpu))] == default_cases(on_gpu)
    labels = [(case.kind, case.name) for case in cases]
    assert len(set(labels)) == len(labels)
    assert max(len(name) for kind, name in labels if kind == "verbs") <= 30
    assert max(len(case.name) for case in default_cases(on_gpu)) <= 40
    assert {case.dtypes for case in default_cases(on_gpu)} == set(DTYPES)


def settings_of(**options):
    defaults = LOW_RANK_DEFAULTS | {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    flags = dict.fromkeys(("scale_front", "disable_nl", "seed_per_param", "stochastic_rounding", "capturable"), False)
    rest = {
        "seed": 0,
        "backend": "auto",
        "state_dtype": torch.float32,
        "state_bits": 32,
        "min_8bit_size": 4096,
        "max_grad_norm": None,
    }
    return Settings.of(defaults | flags | rest | {"correct_bias": True} | options)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": "auto"},
        {"weight_decay": 0.1, "scale": 4.0, "correct_bias": False},
        {"scale_front": True, "scale": 128.0, "proj_type": "right"},
        {
            "disable_nl": True,
            "distribution": "rademacher",
            "proj_type": "reverse_std",
            "betas": (0.5, 0.9),
            "eps": 1e-3,
        },
    ],
)
@pytest.mark.parametrize("shape", [(24, 17), (17, 24)])
def test_the_float64_algorithm_is_the_oracles(shape, options, scale_type):
    rank, options = 3, options | {"scale_type": scale_type, "update_proj_gap": 3}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    oracle = OracleMatrix(start, rank, **options)
    settings = settings_of(rank=rank, **options)
    W = start.double() if oracle.keeps_rows else start.double().T
    moments = torch.zeros(len(W), rank, dtype=torch.float64)
    mine = Matrix(W, moments, moments, torch.zeros((), dtype=torch.float64))
    for t in range(1, 9):
        gradient = torch.randn(shape, generator=generator) * t  # growing, so that the limiter has something to do
        oracle.step(gradient)
        P = projection_matrix(0, (t - 1) // 3, rank, W.shape[1], distribution=settings.distribution).double()
        G = gradient.double() if oracle.keeps_rows else gradient.double().T
        mine = low_rank_step(mine, G, P, t, settings).after
        exact = oracle.weight if oracle.keeps_rows else oracle.weight.T
        for name, ours, theirs in (("W", mine.W, exact), ("M", mine.M, oracle.M), ("V", mine.V, oracle.V)):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13, msg=name)
        assert oracle.update_norm is None or float(mine.previous) == pytest.approx(oracle.update_norm, rel=1e-12)


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_the_float64_adamw_is_the_oracles(second_moment):
    """A mean over the wrong dimension, or a sum in its place, which would miss what is right and pass what is not."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(5, 3, generator=generator) for _ in range(6))
    settings = settings_of(weight_decay=0.1, betas=(0.8, 0.95))
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    squares = zeros[:, :1] if second_moment == "row" else zeros
    mine = Matrix(start.double(), zeros, squares, torch.zeros(()))
    for t, gradient in enumerate(gradients, 1):
        mine = dense_step(mine, gradient.double(), t, settings).after
    exact = oracle_adamw(start, gradients, 1e-3, (0.8, 0.95), 1e-6, 0.1, second_moment=second_moment)
    torch.testing.assert_close(mine.W, exact, rtol=1e-12, atol=0)
