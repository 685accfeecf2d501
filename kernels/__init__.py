"""The Triton kernels of apollo_triton; import them as ``apollo_triton.kernels``.

This file must hold nothing else: at the root of a checkout a bare ``import kernels``, which transformers
probes for, finds this folder.
"""
