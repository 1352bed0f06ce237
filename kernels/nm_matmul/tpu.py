"""N:M products on TPU: decoded in registers, two 16-bit values at a time, then multiplied.

The matrix unit knows no sparsity. What is saved is memory traffic, as long as decoding one
tile hides behind the transfer of the next.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
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
    x = _by_tile(x, packed)  # [tiles, M, rows of a tile]
    bm = min(128, -(-m // 16) * 16)
    while bm > 16 and x.shape[0] * bm * x.shape[2] * 2 > _SLAB:
        bm = bm // 32 * 16
    x = jnp.pad(x, ((0, 0), (0, -m % bm), (0, 0)))
    bn = min(bn, packed.values.shape[0] * 128)
    codes = packed.codes.reshape(tiles.count, -1, cols)
    y = pl.pallas_call(
        functools.partial(
            _matmul, tiles=tiles, precision=precision, interpret=bool(interpret)
        ),
        grid=(x.shape[1] // bm, pl.cdiv(cols, bn), tiles.count),
        in_specs=[
            pl.BlockSpec((tiles.count, bm, x.shape[2]), lambda i, j, t: (0, i, 0)),
            pl.BlockSpec(
                (bn // 128, 16 * tiles.planes, 128), lambda i, j, t: (j, t, 0)
            ),
            pl.BlockSpec((1, codes.shape[1], bn), lambda i, j, t: (t, 0, j)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, t: (i, j)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct((x.shape[1], cols), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=f"nm_matmul_{packed.n}_{packed.m}",
    )(x, packed.values, codes)
    return y[:m]


def _by_tile(x: Float[Array, "M K"], packed: NMArray) -> Float[Array, "tiles M rows"]:
    """The columns of x in the order in which rows of W are decoded."""
    tiles, n, m, stride = packed.tiles, packed.n, packed.m, packed.stride
    rows, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -k % (m * stride))))
    x = jnp.swapaxes(x.reshape(rows, -1, m, stride), 2, 3).reshape(rows, -1)
    x = jnp.pad(x, ((0, 0), (0, tiles.groups * m - x.shape[1])))
    # A word of values becomes words of rows, of two rows each.
    split = (8, 2, 2) if n == 2 else (16, m, 1)
    x = x.reshape(rows, tiles.count, tiles.planes, *split)
    return jnp.moveaxis(jnp.swapaxes(x, 3, 4), 0, 1).reshape(tiles.count, rows, -1)


def _matmul(x, values, codes, y, total, *, tiles, precision, interpret):
    t = pl.program_id(2)
    added = jnp.where(t == 0, 0.0, total[...])
    lanes = range(values.shape[0])
    for first in range(0, tiles.planes, _AT_ONCE):
        planes = range(first, min(first + _AT_ONCE, tiles.planes))
        w = [
            [
                w
                for p in planes
                for w in _decoded(values, codes, tiles, lane, p, interpret)
            ]
            for lane in lanes
        ]
        w = [jnp.concatenate([pltpu.bitcast(w, x.dtype) for w in ws], 0) for ws in w]
        added += lax.dot_general(
            x[t, :, planes.start * tiles.rows : planes.stop * tiles.rows],
            jnp.concatenate(w, 1),
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
    total[...] = added
    y[...] = added.astype(y.dtype)


def _decoded(
    values, codes, tiles, lane: int, plane: int, interpret: bool
) -> list[Int32[Array, "8 128"]]:
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
