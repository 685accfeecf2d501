"""Layer 3: one parameter: its name, its shard on this rank, its state, and what it may be."""
