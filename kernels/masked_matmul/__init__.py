"""Products with a masked matrix."""
