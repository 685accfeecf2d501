"""The verbs as Triton launches, file by file what ``backends.reference`` is. Importing it imports triton."""
