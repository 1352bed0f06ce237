"""Products with a matrix of which blocks are left out."""
