"""Sizes that every backend is tested on."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A product `[M, K] @ [K, N]`.

    Attributes:
      m: rows of x.
      k: contracted.
      n: produced.
      density: share of weights that are kept, by chance.
    """

    m: int
    k: int
    n: int
    density: float


# With a density between 0 and 1, the second row and column are empty, too.
SMALL = (
    Shape(1, 96, 80, 0.5),
    Shape(3, 100, 70, 0.3),
    Shape(9, 33, 17, 1.0),
    Shape(5, 7, 3, 0.0),
)
WIDE = (
    Shape(1, 256, 128, 0.5),
    Shape(3, 300, 130, 0.5),
    Shape(16, 600, 300, 0.2),
    Shape(530, 260, 130, 0.5),
    Shape(24, 256, 128, 1.0),
    Shape(8, 256, 128, 0.0),
)
