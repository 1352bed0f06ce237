"""Block-sparse products out of XLA's own operations, for any device.

A block at a time: on a CPU the product of one block is large enough to run as fast as a
dense one, and to bring several together costs more than it saves. A pattern that is known
when the program is traced is written out instead, an output at a time.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

FEW = 8  # rows of x for which blocks are multiplied all at once
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
    """
    m = x.shape[0]
    rows, cols = values.shape[1:]
    bk, bn = (cols, rows) if transpose else (rows, cols)
    # Transposed, a block of x is one piece of memory, and so is one of y.
    xt = x.T.reshape(-1, bk, m)
    axis = 1 if transpose else 0

    def add(i, yt):
        over = (((axis,), (0,)), ((), ()))
        product = _dot(values[order[i]], xt[inner[i]], over, precision)
        return yt.at[places[i]].add(product)

    yt = jnp.zeros((outputs, bn, m), jnp.float32)
    yt = lax.fori_loop(0, jnp.sum(places < outputs), add, yt)
    return yt.reshape(outputs * bn, m).T.astype(x.dtype)


def products(
    xt: Float[Array, "K M"],
    dy: Float[Array, "M N"],
    inner: Int32[Array, " capacity"],
    places: Int32[Array, " capacity"],
    *,
    block: tuple[int, int],
    precision: lax.PrecisionLike = None,
) -> Float[Array, "capacity rows cols"]:
    """`xᵀ dy`, where there are blocks."""
    k, m = xt.shape
    rows, cols = block
    xt = xt.reshape(-1, rows, m)
    dyt = dy.T.reshape(-1, cols, m)

    def write(i, found):
        product = _dot(
            xt[inner[i]], dyt[places[i]], (((1,), (1,)), ((), ())), precision
        )
        return found.at[i].set(product)

    found = jnp.zeros((inner.shape[0], rows, cols), jnp.float32)
    number = jnp.sum(places < dyt.shape[0])
    return lax.fori_loop(0, number, write, found).astype(xt.dtype)


def matmul_few(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    inner: Int32[Array, " capacity"],
    places: Int32[Array, " capacity"],
    outputs: int,
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "M N"]:
    """As `matmul`, for a handful of rows: every block is read once, and nothing else counts."""
    m = x.shape[0]
    axis = 2 if transpose else 1
    parts = x.reshape(m, -1, values.shape[axis])[:, inner]
    product = _dot(values, parts, (((axis,), (2,)), ((0,), (1,))), precision)
    # [capacity, bn, m]; what has no place is dropped.
    y = jax.ops.segment_sum(product, places, outputs, indices_are_sorted=True)
    return y.reshape(-1, m).T.astype(x.dtype)


def matmul_known(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    inner: np.ndarray,
    places: np.ndarray,
    outputs: int,
    *,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "M N"]:
    """As `matmul`, for a pattern that is known: one product an output."""
    m = x.shape[0]
    bk, bn = values.shape[1:]
    found = []
    for begin, end in _runs(places, outputs):
        if begin == end:
            found.append(jnp.zeros((m, bn), x.dtype))
            continue
        parts = [x[:, i * bk : (i + 1) * bk] for i in inner[begin:end].tolist()]
        column = values[begin:end].reshape(-1, bn)
        over = (((1,), (0,)), ((), ()))
        y = _dot(jnp.concatenate(parts, 1), column, over, precision)
        found.append(y.astype(x.dtype))
    return jnp.concatenate(found, 1)


def _runs(places: np.ndarray, outputs: int) -> Iterator[tuple[int, int]]:
    """The stretch of blocks that belong to each output."""
    ends = np.searchsorted(places, np.arange(outputs + 1)).tolist()
    yield from zip(ends, ends[1:], strict=False)


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
