"""Layer 4: the three verbs (sketch, rescale, apply), once in PyTorch and once as Triton launches."""
