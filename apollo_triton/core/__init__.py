"""Layer 1: the paper's quantities, and what the machine offers. Imports nothing else of the package."""
