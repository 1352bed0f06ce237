"""Values before they are computed: their dimensions, and what rules say of them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import Dim, freeze, unify

Dims: TypeAlias = tuple[Dim, ...]


class Operand(NamedTuple):
    """A value before it is computed.

    Attributes:
      dims: of its axes.
      data: whether it may depend on an argument other than the parameters.
      numbers: the dimension whose units it numbers, if it does.
      chosen: whether these are chosen, by argmax or top_k, rather than all in order.
    """

    dims: Dims
    data: bool
    numbers: Dim | None = None
    chosen: bool = False


class Moved(NamedTuple):
    """What a rule says.

    Attributes:
      outs: dimensions of each output.
      extra: what a run at other sizes must know besides: dimensions that no operand and
        no output has.
    """

    outs: Sequence[Dims]
    extra: Any = None


def unknown(eqn: Any, operands: Sequence[Operand], reason: str) -> Moved:
    """Everything that the equation touches must stay."""
    for x in operands:
        freeze(x.dims, reason)
    return Moved([frozen(shape_of(v.aval), reason) for v in eqn.outvars])


def frozen(shape: Sequence[int], reason: str) -> Dims:
    """New dimensions that must stay."""
    dims = _dims.fresh(shape)
    freeze(dims, reason)
    return dims


def frozen_dim(size: int, reason: str) -> Dim:
    """A new dimension that must stay."""
    return frozen((size,), reason)[0]


def same(operands: Sequence[Dims]) -> Dims:
    """Dimensions of operands of one rank made one; size 1 may stand for any size."""
    found = []
    for column in zip(*operands, strict=True):
        large = [d for d in column if d.size != 1] or column[:1]
        for d in large[1:]:
            unify(large[0], d)
        found.append(large[0])
    return tuple(found)


def shape_of(x: Any) -> tuple[int, ...]:
    """Of an array, a shape or a number."""
    return tuple(x.shape) if hasattr(x, "shape") else np.shape(x)


def check_sizes(values: Iterable[Any]) -> None:
    """Raises `ValueError` for a shape that is no numbers."""
    for v in values:
        if not all(isinstance(n, int) for n in v.aval.shape):
            raise ValueError(
                f"args: got an array of the shape {v.aval.shape}; expected numbers. A function "
                "is read at sizes that are known: export it once for each of them."
            )
