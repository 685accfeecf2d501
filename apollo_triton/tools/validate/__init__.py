"""``apollo-triton validate``: compares the kernels and the reference backend with float64."""
