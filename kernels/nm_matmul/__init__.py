"""Products with N:M sparse matrices."""
