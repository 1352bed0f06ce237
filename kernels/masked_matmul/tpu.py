"""Masked products on TPU: a tile of weights meets its bits in VMEM, before the product.

XLA, too, selects inside of its products on TPU, without a copy; but it spreads the bits
first, and takes its time over them. For 4096 x 4096 weights on v5e, in thousands of cycles:
for the steps of this kernel, the larger of their bundles and of bytes at 547 a cycle; for
XLA what the compiler estimates, which leaves memory out.

  | type     | rows of x | this kernel | XLA, packed mask | XLA, no mask              |
  | -------- | --------- | ----------- | ---------------- | ------------------------- |
  | bfloat16 | 16        | 65          | 120              | 61 (memory)               |
  | bfloat16 | 512       | 147         | 195              | 142                       |
  | float32  | 16        | 127         | 196              | 123 (memory)              |
  | float32  | 512       | 130         | 227              | 146                       |

None of these are timings.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxprune.kernels import _calls
from jaxprune.kernels.block_sparse_matmul import tpu as block_sparse
from jaxtyping import Array, Float, UInt8

LEAST = (256, 128)  # of K and N: bytes of bits come in tiles of 32 x 128


def tile(m: int, k: int, n: int) -> tuple[int, int]:
    """Extents of a step along K and N, for `m` rows of x."""
    bk = _largest((1024, 512, 256) if m <= 128 else (512, 256), k)
    return bk, _largest((512, 256, 128), n)


def _largest(extents: tuple[int, ...], length: int) -> int:
    return next((e for e in extents if e <= length), extents[-1])


def matmul(
    x: Float[Array, "M C"],
    w: Float[Array, "K N"],
    bits: UInt8[Array, "bytes N"],
    *,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
    interpret=False,
) -> Float[Array, "M P"]:
    """`x` times the masked `w`, or times its transpose.

    A slab of x stays in VMEM. No weight is copied in memory: a tile reaches over the edge
    of `w` into whatever lies there, and bits of 0 keep it out.

    Args:
      x: `C` is K, or N if transposed.
      w: at least `LEAST`.
      bits: bit `j` of byte `[i, n]` is the weight in row `8 i + j`.
      transpose: contract the columns of `w`.
      precision: of the products.
      interpret: see `pl.pallas_call`.
    """
    m, (k, n) = x.shape[0], w.shape
    bm = block_sparse.rows_at_once(m, x.shape[1], x.dtype.itemsize)
    bk, bn = tile(bm, k, n)
    rows, columns = pl.cdiv(k, bk), pl.cdiv(n, bn)
    bits = _padded(bits, rows * bk // 8, columns * bn)
    inner, outer = (columns, rows) if transpose else (rows, columns)
    bc, bp = (bn, bk) if transpose else (bk, bn)
    x = _padded(x, pl.cdiv(m, bm) * bm, inner * bc)

    def place(i, p, c):
        return (p, c) if transpose else (c, p)

    return pl.pallas_call(
        functools.partial(_matmul, transpose=transpose, precision=precision),
        grid=(x.shape[0] // bm, outer, inner),
        in_specs=[
            pl.BlockSpec((bm, inner * bc), lambda i, p, c: (i, 0)),
            pl.BlockSpec((bk, bn), place),
            pl.BlockSpec((bk // 8, bn), place),
        ],
        out_specs=pl.BlockSpec((bm, bp), lambda i, p, c: (i, p)),
        scratch_shapes=[pltpu.VMEM((bm, bp), jnp.float32)],
        out_shape=_calls.struct((x.shape[0], k if transpose else n), x.dtype, x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=block_sparse.vmem(),
        ),
        interpret=interpret,
        name="masked_matmul",
    )(x, w, bits)[:m]


def _matmul(x, w, bits, y, total, *, transpose, precision):
    select = _select_pairs if w.dtype.itemsize == 2 else _select
    extent = w.shape[1 if transpose else 0]
    start = pl.multiple_of(pl.program_id(2) * extent, extent)
    product = lax.dot_general(
        x[:, pl.ds(start, extent)],
        select(w[...], bits[...]),
        (((1,), (1 if transpose else 0,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    # Selected instead of cleared in a branch, as in block_sparse_matmul.
    added = jnp.where(pl.program_id(2) == 0, 0.0, total[...]) + product
    total[...] = added
    y[...] = added.astype(y.dtype)


def _select(w: Array, bits: Array) -> Array:
    """`where(mask, w, 0)` for numbers of 32 bits, a register of 8 rows at a time."""
    words = pltpu.bitcast(bits, jnp.int32)  # of 32 rows
    shape = (8, w.shape[1])
    row = lax.broadcasted_iota(jnp.int32, shape, 0)
    parts = []
    for i in range(0, w.shape[0], 8):
        word = jnp.broadcast_to(words[i // 32 : i // 32 + 1], shape)
        kept = word & (1 << (row + i % 32)) != 0
        parts.append(jnp.where(kept, w[i : i + 8], 0.0))
    return jnp.concatenate(parts, 0)


def _select_pairs(w: Array, bits: Array) -> Array:
    """The same for 16 bits, of which a register holds rows `2 s` and `2 s + 1` as a word."""
    words = pltpu.bitcast(bits, jnp.int32)
    halves = words & 0xFFFF, lax.shift_right_logical(words, jnp.int32(16))
    # Bit `2 s + 1` is also put where shifting by `2 s` takes it to bit 16.
    halves = [half | half << 15 for half in halves]
    pairs = pltpu.bitcast(w, jnp.int32)
    shape = (8, w.shape[1])
    shift = 2 * lax.broadcasted_iota(jnp.int32, shape, 0)
    parts = []
    for i in range(0, pairs.shape[0], 8):
        word = jnp.broadcast_to(halves[i // 8 % 2][i // 16 : i // 16 + 1], shape)
        kept = word >> shift & 0x00010001
        parts.append(pairs[i : i + 8] & ((kept << 16) - kept))
    return pltpu.bitcast(jnp.concatenate(parts, 0), w.dtype)


def _padded(x: Array, rows: int, columns: int) -> Array:
    return jnp.pad(x, [(0, rows - x.shape[0]), (0, columns - x.shape[1])])
