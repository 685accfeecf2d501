"""The machine code of the kernels for GPUs that are not here: compiled ahead of time, disassembled, and counted.

The figures describe code, not time: an instruction in a loop counts once. ``python -m bench.codegen`` makes the table.

    variants.py -> launches.py -> kernel.py -> figures.py    settings, what they launch, that compiled, a row of figures
    linear.py, operands.py      settings and launches of int8 layers, and of steps from a gradient's factors
    listing.py                  machine code, read
    hazards.py, pipeline.py     the figures that say right or wrong
    targets.py, tritons.py      which GPUs; which versions of Triton
"""
