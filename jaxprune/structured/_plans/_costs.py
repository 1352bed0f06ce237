"""Parameters, bytes and operations of a function, at any number of units."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._graph import Graph
from jaxprune.structured._reading._propagate import Program, Record
from jaxprune.structured._reading._values import Dims


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
        self._products = list(_products(traced.program))
        self._dims = {g.name: g.members[0]._leaf for g in graph.groups}

    def __call__(self, kept: Mapping[str, int]) -> Cost:
        """The cost where some groups have fewer units."""
        counts = {self._dims[name]: n for name, n in kept.items()}
        sizes = {p: _size(dims, counts) for p, dims in self._leaves}
        return Cost(
            parameters=sum(sizes.values()),
            bytes=sum(n * self._widths[p] for p, n in sizes.items()),
            flops=sum(
                2 * _size((*p.loops, *p.batch, *p.rows, *p.inner, *p.columns), counts)
                for p in self._products
            ),
        )

    def seconds(self, roofline: "Roofline", kept: Mapping[str, int]) -> float:
        """The time that products take, one after the other."""
        counts = {self._dims[name]: n for name, n in kept.items()}
        return sum(_seconds(p, roofline, counts) for p in self._products)


class Roofline(NamedTuple):
    """What limits a device.

    A product of `[rows, inner]` and `[inner, columns]` takes
    `max(2 rows inner columns / flops, bytes of operands and result / bandwidth)`.

    Attributes:
      flops: operations a second, two for each multiplication, in the type of the model.
      bandwidth: bytes a second.
      tile: rows, inner and columns are rounded up to multiples of these, such as
        `(8, 128, 128)` for a TPU: a product of 130 columns takes as long as one of 256.
    """

    flops: float
    bandwidth: float
    tile: tuple[int, int, int] = (1, 1, 1)


class Product(NamedTuple):
    """What is multiplied with what.

    Attributes:
      batch: axes of products that stand side by side.
      groups: groups of a convolution, each with its share of the columns.
      rows: axes of the left operand that stay.
      inner: axes that are summed over.
      columns: axes of the right operand that stay.
      values: operands and result, each with its bytes a number.
      loops: lengths of the scans around it.
    """

    batch: Dims
    groups: Dims
    rows: Dims
    inner: Dims
    columns: Dims
    values: tuple[tuple[Dims, int], ...]
    loops: Dims


def _seconds(p: Product, roofline: Roofline, counts: Mapping[Dim, int]) -> float:
    groups = _size(p.groups, counts)
    sizes = (_size(p.rows, counts), _size(p.inner, counts))
    sizes = (*sizes, _size(p.columns, counts) // groups)
    tiled = [-(-n // t) * t for n, t in zip(sizes, roofline.tile, strict=True)]
    work = 2 * _size(p.batch, counts) * groups * math.prod(tiled)
    moved = sum(width * _size(dims, counts) for dims, width in p.values)
    once = max(work / roofline.flops, moved / roofline.bandwidth)
    return once * _size(p.loops, counts)


def _size(dims: Dims, counts: Mapping[Dim, int]) -> int:
    return math.prod(_length(d, counts) for d in dims)


def _length(d: Dim, counts: Mapping[Dim, int]) -> int:
    d = _dims.find(d)
    if d.form == "leaf":
        return counts.get(d, d.size)
    sizes = [_length(p, counts) for p in _dims.parts(d)]
    return math.prod(sizes) if d.form == "product" else sum(sizes)


def _products(program: Program) -> Iterator[Product]:
    for record in program.records:
        if (found := _product(record)) is not None:
            yield found
        for inner in record.inner:
            yield from _products(inner)


def _product(record: Record) -> Product | None:
    eqn, groups = record.eqn, ()
    name, params = eqn.primitive.name, eqn.params
    if name not in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
        return None
    left, right, out = record.operands[0].dims, record.operands[1].dims, record.outs[0]
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        batch, groups = (), () if record.extra is None else (record.extra,)
        rows = [out[i] for i in (numbers.out_spec[0], *numbers.out_spec[2:])]
        inner = [right[i] for i in numbers.rhs_spec[1:]]
        columns = [right[numbers.rhs_spec[0]]]
    else:
        numbers = params.get("dimension_numbers")
        if name == "ragged_dot_general":
            numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        (axes, _), (l_batch, _) = numbers
        batch, inner = [left[i] for i in l_batch], [left[i] for i in axes]
        free = [d for i, d in enumerate(left) if i not in (*axes, *l_batch)]
        rows, columns = free, out[len(l_batch) + len(free) :]
    values = [*(x.dims for x in record.operands[:2]), out]
    types = [v.aval.dtype.itemsize for v in (*eqn.invars[:2], eqn.outvars[0])]
    return Product(
        tuple(batch), groups, tuple(rows), tuple(inner), tuple(columns),
        tuple(zip(values, types, strict=True)), record.loops,
    )  # fmt: skip
