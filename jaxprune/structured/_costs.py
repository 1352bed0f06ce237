"""Parameters, bytes and operations of a function, at any number of units."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxprune.structured import _dims
from jaxprune.structured._dims import Dim
from jaxprune.structured._propagate import Program, Record
from jaxprune.structured._trace import Graph
from jaxprune.structured._values import Dims


class Cost(NamedTuple):
    """What a function takes.

    Attributes:
      parameters: numbers in its leaves.
      bytes: of its leaves.
      flops: of its products, two for each multiplication, on the example that it was
        traced with. The body of a `while` counts once, each branch of a `cond` too.
    """

    parameters: int
    bytes: int
    flops: int


class Counter:
    """Costs of a graph by how many units are kept.

    Args:
      graph: the graph.
    """

    def __init__(self, graph: Graph):
        traced = graph._traced
        self._leaves = list(zip(traced.paths, traced.dims, strict=True))
        self._widths = {p: getattr(d, "itemsize", 0) for p, d in graph._dtypes.items()}
        self._products = _products(traced.program)
        self._dims = {g.name: g.members[0]._leaf for g in graph.groups}

    def __call__(self, kept: Mapping[str, int]) -> Cost:
        """The cost where some groups have fewer units."""
        counts = {self._dims[name]: n for name, n in kept.items()}
        sizes = {
            p: math.prod(_size(d, counts) for d in dims) for p, dims in self._leaves
        }
        return Cost(
            parameters=sum(sizes.values()),
            bytes=sum(n * self._widths[p] for p, n in sizes.items()),
            flops=sum(
                2 * math.prod(_size(d, counts) for d in dims) for dims in self._products
            ),
        )


def _size(d: Dim, counts: Mapping[Dim, int]) -> int:
    d = _dims.find(d)
    if d.form == "leaf":
        return counts.get(d, d.size)
    sizes = [_size(p, counts) for p in _dims.parts(d)]
    return math.prod(sizes) if d.form == "product" else sum(sizes)


def _products(program: Program) -> list[Dims]:
    found = []
    for record in program.records:
        dims = _product(record)
        if dims is not None:
            found.append((*dims, *record.loops))
        for inner in record.inner:
            found += _products(inner)
    return found


def _product(record: Record) -> Dims | None:
    name, params = record.eqn.primitive.name, record.eqn.params
    if name == "dot_general":
        left = record.operands[0].dims
        return *record.outs[0], *(left[i] for i in params["dimension_numbers"][0][0])
    if name == "conv_general_dilated":
        right, spec = record.operands[1].dims, params["dimension_numbers"].rhs_spec
        return *record.outs[0], *(right[i] for i in spec[1:])
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        left = record.operands[0].dims
        return *record.outs[0], *(left[i] for i in numbers[0][0])
    return None
