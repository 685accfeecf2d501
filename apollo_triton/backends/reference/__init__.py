"""The verbs in plain PyTorch: the specification, and the path for every device without kernels."""
