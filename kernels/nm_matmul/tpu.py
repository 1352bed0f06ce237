"""N:M products on TPU: decoded in registers, two 16-bit values at a time, then multiplied.

The matrix unit knows no sparsity. What is saved is memory traffic, as long as decoding one
tile hides behind the transfer of the next.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxprune.kernels import _calls
from jaxtyping import Array, Float, Int32

from jaxprune.formats import NMArray

_SLAB = 4 << 20  # bytes of x that stay in VMEM together
_AT_ONCE = 8  # planes in a product


def matmul(
    x: Float[Array, "M K"],
    packed: NMArray,
    *,
    bn: int = 1024,
    precision: lax.PrecisionLike = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """`x @ W`.

    Args:
      x: of the type of the values.
      packed: a matrix of 16-bit values, coded in words.
      bn: columns of W that are decoded in a step, with a tile of its rows.
      precision: of the products.
      interpret: see `pl.pallas_call`.
    """
    tiles, m, cols = packed.tiles, x.shape[0], packed.codes.shape[-1]
    permutation = _permutation(tiles, packed.n, packed.m, x.dtype)
    x = _by_tile(x, packed, permutation.shape[0])
    bm = min(128, -(-m // 16) * 16)
    while bm > 16 and bm * x.shape[1] * x.dtype.itemsize > _SLAB:
        bm = bm // 32 * 16
    x = jnp.pad(x, ((0, -m % bm), (0, 0)))
    bn = min(bn, packed.values.shape[0] * 128)
    codes = packed.codes.reshape(tiles.number, -1, cols)
    y = pl.pallas_call(
        functools.partial(
            _matmul, tiles=tiles, precision=precision, interpret=bool(interpret)
        ),
        grid=(x.shape[0] // bm, pl.cdiv(cols, bn), tiles.number),
        in_specs=[
            pl.BlockSpec((bm, x.shape[1]), lambda i, j, t: (i, 0)),
            pl.BlockSpec(permutation.shape, lambda i, j, t: (0, 0)),
            pl.BlockSpec(
                (bn // 128, 16 * tiles.planes, 128), lambda i, j, t: (j, t, 0)
            ),
            pl.BlockSpec((1, codes.shape[1], bn), lambda i, j, t: (t, 0, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, t: (i, j)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        out_shape=_calls.struct((x.shape[0], cols), x.dtype, x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=f"nm_matmul_{packed.n}_{packed.m}",
    )(x, permutation, packed.values, codes)
    return y[:m]


def _by_tile(x: Float[Array, "M K"], packed: NMArray, span: int) -> Array:
    """Brings x to the order of the groups, with columns of 0 where W is padded.

    Each tile gets a multiple of `span` columns, which is what most have anyway.
    """
    tiles, m, stride = packed.tiles, packed.m, packed.stride
    rows, k = x.shape
    if stride > 1:
        x = jnp.pad(x, ((0, 0), (0, -k % (m * stride))))
        x = jnp.swapaxes(x.reshape(rows, -1, m, stride), 2, 3).reshape(rows, -1)
    x = jnp.pad(x, ((0, 0), (0, tiles.groups * m - x.shape[1])))
    extra = -(tiles.planes * tiles.rows) % span
    if extra:
        x = x.reshape(rows, tiles.number, -1)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, extra))).reshape(rows, -1)
    return x


def _permutation(tiles, n: int, m: int, dtype) -> Float[Array, "span span"]:
    """From the order of rows to that in which planes are decoded, for whole lanes."""
    span = max(128, tiles.rows)
    # A word of values becomes words of rows, of two rows each.
    split = (-1, 8, 2, 2) if n == 2 else (-1, 16, m, 1)
    order = np.arange(span).reshape(split).swapaxes(1, 2).ravel()
    return jnp.asarray(np.eye(span)[:, order], dtype)


def _matmul(x, permutation, values, codes, y, total, *, tiles, precision, interpret):
    t = pl.program_id(2)
    added = jnp.where(t == 0, 0.0, total[...])
    columns = x.shape[1] // tiles.number
    tile = pl.ds(pl.multiple_of(t * columns, 128), columns)
    rows = _permuted(x[:, tile], permutation[...])
    lanes = range(values.shape[0])
    for first in range(0, tiles.planes, _AT_ONCE):
        planes = range(first, min(first + _AT_ONCE, tiles.planes))
        decoded = functools.partial(_decoded, values, codes, tiles, interpret)
        words = [[w for p in planes for w in decoded(lane, p)] for lane in lanes]
        w = [
            jnp.concatenate([pltpu.bitcast(word, x.dtype) for word in column], 0)
            for column in words
        ]
        first, last = planes.start * tiles.rows, planes.stop * tiles.rows
        added += lax.dot_general(
            rows[:, first:last],
            jnp.concatenate(w, 1),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
    total[...] = added
    y[...] = added.astype(y.dtype)


def _permuted(x, permutation):
    """Lanes in the order of the decoded rows: a product with a permutation is exact."""
    (bm, k), span = x.shape, permutation.shape[0]
    stacked = jnp.concatenate([x[:, i : i + span] for i in range(0, k, span)], 0)
    product = jnp.dot(stacked, permutation, preferred_element_type=jnp.float32)
    product = product.astype(x.dtype)
    return jnp.concatenate(
        [product[i : i + bm] for i in range(0, k // span * bm, bm)], 1
    )


def _decoded(
    values, codes, tiles, interpret: bool, lane: int, plane: int
) -> list[Int32[Array, "words 128"]]:
    """The words of all rows of a plane, each of two rows that stand on top of each other."""

    def code(word):
        return codes[0, pl.ds(8 * word, 8), pl.ds(128 * lane, 128)]

    if interpret:  # the interpreter has no views of another type
        loaded = values[lane, pl.ds(16 * plane, 16), :]
        words = [pltpu.bitcast(loaded, jnp.int32)]
    else:  # values of 16 bits would be loaded by half registers
        words = [values.at[lane].bitcast(jnp.int32)[pl.ds(8 * plane, 8), :]]
    for i in range(tiles.halvings):
        word, bit = tiles.half(plane, i)
        # One multiplication fills every half whose bit is set with ones.
        mask = (_shifted(code(word), -bit) & 0x00010001) * 0xFFFF
        ones = [w & mask for w in words]
        zeros = [w ^ one for w, one in zip(words, ones, strict=True)]
        order = (ones, zeros) if tiles.turns else (zeros, ones)
        words = [w for pair in zip(*order, strict=True) for w in pair]
    if tiles.turns:
        word, bit = tiles.turn(plane)
        # By 0 or 16 bits, both ways: the halves stay, or change places.
        by = _shifted(code(word), 4 - bit) & 16
        words[1] = (words[1] << by) | lax.shift_right_logical(words[1], by)
    return words


def _shifted(x, by: int):
    if by < 0:
        return lax.shift_right_logical(x, jnp.full_like(x, -by))
    return x << by
