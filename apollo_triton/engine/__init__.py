"""Layer 5: one step from end to end, on either backend."""
