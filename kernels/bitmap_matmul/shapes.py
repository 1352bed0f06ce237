"""Sizes and patterns that every backend is tested on."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A product `[M, K] @ [K, N]`.

    Attributes:
      m: rows of x.
      k: contracted.
      n: produced.
      density: share of weights that are kept, by chance.
      spare: room in the packed array beyond the weights that are kept.
    """

    m: int
    k: int
    n: int
    density: float
    spare: int = 0


# With a density between 0 and 1, the second row and column are empty, too.
SMALL = (
    Shape(1, 96, 130, 0.5),
    Shape(3, 100, 70, 0.3, spare=17),
    Shape(17, 257, 131, 0.1),
    Shape(8, 64, 128, 1.0),
    Shape(5, 70, 33, 0.0),
    Shape(2, 5, 3, 0.6),
)
