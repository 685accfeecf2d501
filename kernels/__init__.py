"""The Triton kernels of apollo_triton. Import them as ``apollo_triton.kernels``.

This file must stay empty except for this text. transformers tries ``import kernels``, and at the root of a checkout it
finds this folder.
"""
