"""Benchmarks, one file a question; run them as ``python -m bench.NAME`` from the root of a checkout."""
