"""Products with a bitmap out of XLA's own operations, for any device.

A stretch of rows of the matrix is written out at a time, multiplied, and forgotten.

There is no kernel for TPU, because writing out a tile takes longer than it saves. The
cheapest way found keeps the values of a column in a column of registers: the place of a
weight is a count of bits (two operations), and a gather within 8 sublanes fetches it from
either of two registers, which calls for 25 to 36 % of padding at densities of 0.5 to 0.1.
Without branches, checks or that padding, it compiles to these bundles (cycles without
waiting) for a tile of 1024 x 512 and 16 rows of x; beside them, the cycles in which a v5e
reads a dense tile at 547 bytes a cycle, and the bundles of its product:

  | type     | v5e  | v5p  | v6e  | tpu7x | dense, read on v5e | dense, bundles on v5e |
  | -------- | ---- | ---- | ---- | ----- | ------------------ | --------------------- |
  | bfloat16 | 1888 | 1944 | 2009 | 1957  | 1918               | 406                   |
  | float32  | 1988 | 2038 | 1768 | 1796  | 3836               | 533                   |

In bfloat16 nothing is won even there, where memory is slowest for its processor; in
float32 up to 1.9 times would be, which dense bfloat16 gives without pruning. The work goes
by the weights, not by those that are kept, so that lower densities do not change this. A
gather along lanes takes three bundles for a register, and a v4 has none within sublanes.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxprune.kernels import _calls
from jaxtyping import Array, Float, Shaped

from jaxprune.formats import BitmapArray, _bitmap

STRETCH = 1 << 20  # weights that are written out at a time


def matmul(
    x: Float[Array, "M K"],
    packed: BitmapArray,
    *,
    precision: lax.PrecisionLike,
    dtype: Any = None,
) -> Float[Array, "M N"]:
    """`x @ W`, by default in the type to which those of both are promoted."""
    out = dtype
    dtype = jnp.result_type(x, packed.values)
    bits, starts, rows = _stretches(packed)
    x = _padded(x.astype(dtype), 1, bits.shape[0] * rows)

    def step(y, stretch):
        i, bits, starts = stretch
        part = lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)
        w = _written(packed.values, bits, starts).astype(dtype)
        product = jnp.matmul(
            part, w, precision=precision, preferred_element_type=jnp.float32
        )
        return y + product, None

    y = _calls.zeros((x.shape[0], bits.shape[-1]), jnp.float32, x)
    number = jnp.arange(bits.shape[0])
    return lax.scan(step, y, (number, bits, starts))[0].astype(out or dtype)


def matmul_transposed(
    dy: Float[Array, "M N"], packed: BitmapArray, *, precision: lax.PrecisionLike
) -> Float[Array, "M K"]:
    """`dy @ Wᵀ`."""
    bits, starts, _ = _stretches(packed)

    def step(stretch):
        w = _written(packed.values, *stretch).astype(dy.dtype)
        product = lax.dot_general(
            dy, w, (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return product.astype(dy.dtype)

    parts = lax.map(step, (bits, starts))  # [stretches, M, rows]
    dx = jnp.moveaxis(parts, 0, 1).reshape(dy.shape[0], -1)
    return dx[:, : packed.layout.matrix[0]]


def products(
    x: Float[Array, "M K"],
    dy: Float[Array, "M N"],
    packed: BitmapArray,
    *,
    precision: lax.PrecisionLike,
) -> Float[Array, " capacity"]:
    """`xᵀ dy`, where weights are kept."""
    bits, starts, rows = _stretches(packed)
    x = _padded(x.astype(dy.dtype), 1, bits.shape[0] * rows)

    def step(found, stretch):
        i, bits, starts = stretch
        part = lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)
        dw = lax.dot_general(
            part, dy, (((0,), (0,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        kept, index = _bitmap.places(bits, starts)
        index = jnp.where(kept, index, packed.capacity)
        return found.at[index].set(dw.astype(found.dtype), mode="drop"), None

    found = _calls.zeros((packed.capacity,), dy.dtype, dy)
    number = jnp.arange(bits.shape[0])
    return lax.scan(step, found, (number, bits, starts))[0]


def _stretches(packed: BitmapArray) -> tuple[Array, Array, int]:
    """Bits and starts by stretches, `[stretches, words, ...]`, and the rows of each."""
    words, n = packed.bits.shape
    each = max(1, min(words, STRETCH // (_bitmap.WORD * n)))
    bits, starts = (
        _padded(x, 0, -(-words // each) * each).reshape(-1, each, x.shape[1])
        for x in (packed.bits, packed.starts)
    )
    return bits, starts, each * _bitmap.WORD


def _written(values: Shaped[Array, " capacity"], bits: Array, starts: Array) -> Array:
    kept, index = _bitmap.places(bits, starts)
    return jnp.where(
        kept, values.at[index].get(mode="clip"), jnp.zeros((), values.dtype)
    )


def _padded(x: Array, axis: int, size: int) -> Array:
    """`x` with zeros at the end of an axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads)
