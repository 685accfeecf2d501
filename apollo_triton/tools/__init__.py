"""Layer 8: programs that use the optimizer: the demo, the validation, memory tables, the report of the environment."""
