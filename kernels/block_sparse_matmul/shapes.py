"""Sizes and patterns that every backend is tested on."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A product `[M, K] @ [K, N]` in blocks.

    Attributes:
      m: rows of x.
      k: contracted.
      n: produced.
      block: extents of a block along K and N.
      density: share of blocks that are kept, by chance.
      spare: room in the packed array beyond the blocks that are kept.
    """

    m: int
    k: int
    n: int
    block: tuple[int, int]
    density: float
    spare: int = 0


# With a density between 0 and 1, the second row and column of blocks are empty, too.
SMALL = (
    Shape(1, 96, 80, (16, 16), 0.4),
    Shape(3, 96, 80, (16, 16), 0.4, spare=5),
    Shape(8, 100, 70, (16, 32), 0.5),
    Shape(9, 100, 70, (32, 16), 0.5),
    Shape(64, 96, 80, (16, 16), 0.4, spare=30),
    Shape(33, 64, 64, (16, 16), 1.0),
    Shape(33, 64, 64, (16, 16), 0.0),
    Shape(17, 16, 16, (16, 16), 1.0),
    Shape(5, 7, 3, (8, 8), 1.0),
)
WIDE = (
    Shape(1, 256, 256, (128, 256), 1.0),
    Shape(40, 512, 384, (128, 128), 0.5),
    Shape(530, 500, 300, (128, 128), 0.5, spare=10),
    Shape(16, 1152, 256, (128, 128), 0.8),
    Shape(24, 256, 128, (128, 128), 0.0),
)
# Blocks of GPU kernels, which take 16 bits; the interpreter is slow.
HALF = (
    Shape(1, 128, 192, (64, 64), 0.8, spare=2),
    Shape(100, 128, 256, (64, 128), 1.0),
    Shape(130, 256, 128, (128, 64), 0.6, spare=1),
)
