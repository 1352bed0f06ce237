"""One-shot pruning of trained models, matrix by matrix and block by block."""
