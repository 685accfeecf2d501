"""Layer 8: programs that use the optimizer: demo, validation, memory tables, report of the environment."""
