"""``apollo-triton validate``: the kernels against the reference path, and both against float64."""
