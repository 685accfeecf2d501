"""Stage (c): the cases of ``apollo-triton validate``, over the cores.

    python -m bench.gpu_check.validation

Each case is compared with float64 as the command does, and has a row with the measure that is nearest its limit, and
with every measure that misses it.
"""

from __future__ import annotations

import argparse
import re
import warnings

import torch

from apollo_triton.tools.validate.cases import DTYPES, Case, default_cases

from ..clock import rounded
from ..results_file import Results, Row, default_device
from .processes import in_parallel

NAME = "gpu_check-validate"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--cases", default=".*", metavar="PATTERN", help="cases whose whole names match")
    parser.add_argument("--fresh", action="store_true", help="run all cases anew")
    options = parser.parse_args(arguments)
    results = Results(NAME, options.device, fresh=options.fresh)
    cases = [
        case
        for case in default_cases(options.device.startswith("cuda"))
        if re.fullmatch(options.cases, name(case)) and name(case) not in results and has_dtypes(case)
    ]
    for done in in_parallel(measured, [(case, options.device) for case in cases]):
        row = done.result or {"skipped": done.problem}
        results.add(name(done.job[0]), **row)
        if "skipped" in row or row["missed"]:
            print(f"{name(done.job[0])}: {row}", flush=True)
    missed = sum(bool(row.get("missed")) for row in results.rows.values())
    print(f"{len(results.rows)} cases, {missed} missed; written to {results.path}")


def name(case: Case) -> str:
    return f"{case.kind}: {case.name}"


def has_dtypes(case: Case) -> bool:
    """Whether this torch has gradients of another dtype than their weight, if the case asks for them."""
    weight, gradient = DTYPES[case.dtypes]
    return weight == gradient or hasattr(torch.Tensor, "grad_dtype")


def measured(job: tuple[Case, str]) -> Row:
    """The row of a case."""
    from apollo_triton.tools.validate.runs import measured as errors_of  # the kernels

    case, device = job
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = errors_of(case, torch.empty(0, device=device).device, 0)
    worst = errors.worst()
    missed = [measure for measure in worst if errors.share(measure) > 1]
    figures = {
        measure: [*(rounded(error) for error in errors.found[measure].values()), rounded(errors.limits[measure])]
        for measure in missed or worst[:1]
    }
    return {"missed": missed, "kernels, reference, limit": figures}


if __name__ == "__main__":
    main()
