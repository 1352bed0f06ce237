"""Block-sparse products out of XLA's own operations, for any device.

A block at a time: on a core of a CPU the product of one block is large enough to run as
fast as a dense one, and to bring several together costs more than it saves. A pattern that
is known when the program is traced is written out instead, an output at a time: these
products are larger, and run on several cores.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxprune.kernels import _calls
from jaxtyping import Array, Float, Int32

FEW = 63  # rows of x up to which blocks are multiplied all at once
MANY = 128  # rows of dy from which a transposed pattern that is known is written out
WRITTEN_OUT = (
    1024  # blocks of a pattern that may be written out: it takes time to compile
)


def matmul(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    order: Int32[Array, " capacity"],
    inner: Int32[Array, " capacity"],
    places: Int32[Array, " capacity"],
    outputs: int,
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """`x` times the matrix of these blocks, or times its transpose.

    Args:
      x: `K` a multiple of the extent of a block that is contracted.
      values: the blocks.
      order: that they are taken in, those that are not taken last.
      inner: place of each along the contracted axis, in this order, counted in blocks.
      places: place of each along the produced axis; `outputs` where none is taken.
      outputs: blocks along the produced axis.
      transpose: contract the columns of the blocks.
      precision: of the products.
      dtype: of the result; by default that of `x`.
    """
    bk, bn, over = _extents(values, transpose)
    parts = _stretches(x, bk)

    def add(i, y):
        product = _dot(parts[inner[i]], values[order[i]], (over, ((), ())), precision)
        return y.at[places[i]].add(product)

    y = _calls.zeros((outputs, len(x), bn), jnp.float32, x)
    y = lax.fori_loop(0, jnp.sum(places < outputs), add, y)
    return _joined(y).astype(dtype or x.dtype)


def products(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    inner: Int32[Array, " capacity"],
    places: Int32[Array, " capacity"],
    *,
    block: tuple[int, int],
    precision: lax.PrecisionLike = None,
) -> Float[Array, "capacity rows cols"]:
    """`xᵀ dy`, where there are blocks."""
    rows, cols = block
    left, right = _stretches(x, rows), _stretches(dy, cols)
    over = (((0,), (0,)), ((), ()))

    def write(i, found):
        product = _dot(left[inner[i]], right[places[i]], over, precision)
        return found.at[i].set(product)

    found = _calls.zeros((inner.shape[0], rows, cols), jnp.float32, x)
    number = jnp.sum(places < len(right))
    return lax.fori_loop(0, number, write, found).astype(x.dtype)


def matmul_few(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    inner: Int32[Array, " capacity"],
    places: Int32[Array, " capacity"],
    outputs: int,
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """As `matmul`, for a handful of rows: every block is read once, and nothing else counts."""
    bk, _, ((x_axis,), (axis,)) = _extents(values, transpose)
    parts = _stretches(x, bk)[inner]
    over = (((x_axis + 1,), (axis + 1,)), ((0,), (0,)))
    product = _dot(parts, values, over, precision)
    # [capacity, M, bn]; what has no place is dropped.
    return _joined(
        jax.ops.segment_sum(product, places, outputs, indices_are_sorted=True)
    ).astype(dtype or x.dtype)


def matmul_known(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    order: np.ndarray,
    inner: np.ndarray,
    places: np.ndarray,
    outputs: int,
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """As `matmul`, for a pattern that is known: one product an output, side by side."""
    bk, bn, _ = _extents(values, transpose)
    if transpose:
        values = values[order].transpose(0, 2, 1)
    found = []
    for begin, end in _runs(places, outputs):
        if begin == end:
            found.append(jnp.zeros((len(x), bn), dtype or x.dtype))
            continue
        column = values[begin:end].reshape(-1, bn)
        over = (((1,), (0,)), ((), ()))
        y = _dot(_gathered(x, inner[begin:end], bk), column, over, precision)
        found.append(y.astype(dtype or x.dtype))
    return jnp.concatenate(found, 1)


def products_known(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    inner: np.ndarray,
    places: np.ndarray,
    *,
    block: tuple[int, int],
    precision: lax.PrecisionLike = None,
) -> Float[Array, "capacity rows cols"]:
    """As `products`, for a pattern that is known."""
    rows, cols = block
    over = (((0,), (0,)), ((), ()))
    found = []
    for n, (begin, end) in enumerate(_runs(places, dy.shape[1] // cols)):
        if begin < end:
            parts = _gathered(x, inner[begin:end], rows)
            column = dy[:, n * cols : (n + 1) * cols]
            product = _dot(parts, column, over, precision).astype(x.dtype)
            found.append(product.reshape(-1, rows, cols))
    spare = len(inner) - sum(map(len, found))
    return jnp.concatenate([*found, jnp.zeros((spare, rows, cols), x.dtype)])


def _gathered(x: Array, places: np.ndarray, size: int) -> Float[Array, "M places*size"]:
    """Some stretches of the columns of x, side by side."""
    return jnp.concatenate(
        [x[:, i * size : (i + 1) * size] for i in places.tolist()], 1
    )


def _runs(places: np.ndarray, outputs: int) -> Iterator[tuple[int, int]]:
    """The stretch of blocks that belong to each output."""
    ends = np.searchsorted(places, np.arange(outputs + 1)).tolist()
    yield from zip(ends, ends[1:], strict=False)


def _extents(values: Array, transpose: bool) -> tuple[int, int, Any]:
    """Of a block, contracted and produced, and the axes of x and of it to contract."""
    rows, cols = values.shape[1:]
    return (cols, rows, ((1,), (1,))) if transpose else (rows, cols, ((1,), (0,)))


def _stretches(x: Float[Array, "M K"], size: int) -> Float[Array, "K/size M size"]:
    """The columns of x, a block at a time: each of them is one piece of memory."""
    return x.reshape(len(x), -1, size).transpose(1, 0, 2)


def _joined(y: Float[Array, "outputs M size"]) -> Float[Array, "M N"]:
    return y.transpose(1, 0, 2).reshape(y.shape[1], -1)


def _dot(a: Array, b: Array, dimensions: Any, precision: lax.PrecisionLike) -> Array:
    """In float32."""

    def dot(a, b):
        return lax.dot_general(
            a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
        )

    if a.dtype == jnp.float32:
        return dot(a, b)

    def widened(a, b):
        return dot(a.astype(jnp.float32), b.astype(jnp.float32))

    # On CPU not every product has a kernel from half precision to float32.
    return lax.platform_dependent(a, b, cpu=widened, default=dot)
