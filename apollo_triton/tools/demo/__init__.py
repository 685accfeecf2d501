"""``apollo-triton demo``: a small LLaMA trained with AdamW, APOLLO and APOLLO-Mini."""
