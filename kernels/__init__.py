"""Kernel families, one folder each, live here; none has been written yet."""
