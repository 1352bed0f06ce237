"""Products with a matrix that is kept as a bitmap."""
