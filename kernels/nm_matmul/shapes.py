"""Sizes and patterns that every backend is tested on."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A product `[rows, K] @ [K, N]`.

    Attributes:
      rows: of x.
      k: contracted.
      cols: produced.
      n: weights kept, at most, of every `m` along K.
      m: weights of a group.
      stride: distance along K between the weights of a group.
    """

    rows: int
    k: int
    cols: int
    n: int
    m: int
    stride: int = 1


SMALL = (
    Shape(1, 64, 24, 2, 4),
    Shape(5, 30, 7, 2, 4),
    Shape(3, 64, 16, 1, 4),
    Shape(4, 50, 9, 3, 7),
    Shape(2, 64, 12, 4, 8, stride=4),
    Shape(9, 40, 1, 1, 16),
    Shape(1, 3, 5, 1, 8),
    Shape(3, 300, 5, 5, 256),
)
# What a TPU kernel takes, in bfloat16.
WIDE = (
    Shape(1, 256, 128, 2, 4),
    Shape(17, 1100, 250, 2, 4),
    Shape(3, 512, 120, 2, 4, stride=128),
    Shape(8, 600, 128, 1, 4),
    Shape(16, 260, 250, 1, 2),
    Shape(2, 300, 125, 1, 8),
    Shape(70, 512, 128, 1, 16, stride=16),
)
