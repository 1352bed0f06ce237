"""Block-sparse products on TPU: a slab of x stays in VMEM, a group of blocks a step.

There are no branches for the first and last step of a sum: one that is selected instead of
cleared, and written in every step, hides behind the matrix unit, where branches would stand
in its way.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxprune.kernels import _calls
from jaxprune.kernels.block_sparse_matmul._steps import Steps
from jaxtyping import Array, Float, Int32


def vmem() -> int:
    """Bytes of VMEM on the device that is compiled for, or the least that any has."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except Exception:  # not a TPU: it has no name for what goes wrong
        return 16 << 20


def rows_at_once(m: int, k: int, itemsize: int) -> int:
    """Rows of x that are held in VMEM together, twice, in half of it."""
    least = 32 // itemsize
    rows = min(512, -(-m // least) * least)
    while rows > least and 2 * rows * k * itemsize > vmem() // 2:
        rows = max(least, rows // 2 // least * least)
    return rows


def matmul(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    inner: Int32[Array, " capacity"],
    steps: Steps,
    outputs: int,
    *,
    group: int,
    bm: int,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
    interpret=False,
) -> Float[Array, "M N"]:
    """`x` times the matrix of these blocks, or times its transpose.

    Args:
      x: `M` a multiple of `bm`, `K` of the extent of a block that is contracted.
      values: the blocks, in the order of `steps`.
      inner: place of each along the contracted axis, counted in blocks.
      steps: see `walk`.
      outputs: blocks along the produced axis.
      group: blocks a step.
      bm: rows of x that stay in VMEM together.
      transpose: contract the columns of the blocks.
      precision: of the products.
      interpret: see `pl.pallas_call`.
    """
    m, k = x.shape
    rows, cols = values.shape[1:]
    bk, bn = (cols, rows) if transpose else (rows, cols)
    return pl.pallas_call(
        functools.partial(
            _matmul, group=group, bk=bk, transpose=transpose, precision=precision
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(m // bm, steps.number),
            in_specs=[
                pl.BlockSpec((bm, k), lambda i, t, *_: (i, 0)),
                pl.BlockSpec(
                    (pl.Element(group), pl.Element(rows), pl.Element(cols)),
                    lambda i, t, place, start, *_: (start[t], 0, 0),
                ),
            ],
            out_specs=pl.BlockSpec((bm, bn), lambda i, t, place, *_: (i, place[t])),
            scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        ),
        out_shape=_calls.struct((m, outputs * bn), x.dtype, x),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem()
        ),
        interpret=interpret,
        name="block_sparse_matmul",
    )(steps.place, steps.start, steps.flags, inner, x, values)


def _matmul(
    place, start, flags, inner, x, values, y, total, *, group, bk, transpose, precision
):
    t = pl.program_id(1)
    axis = 1 if transpose else 0
    columns = [_part(inner[start[t] + i], bk) for i in range(group)]
    blocks = [
        jnp.where((flags[t] >> (1 + i)) & 1 != 0, values[i], 0) for i in range(group)
    ]
    product = lax.dot_general(
        jnp.concatenate([x[:, c] for c in columns], 1),
        jnp.concatenate(blocks, axis),
        (((1,), (axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    added = jnp.where(flags[t] & 1 != 0, 0.0, total[...]) + product
    total[...] = added
    y[...] = added.astype(y.dtype)


def products(
    xt: Float[Array, "K M"],
    dy: Float[Array, "M N"],
    inner: Int32[Array, " capacity"],
    steps: Steps,
    *,
    block: tuple[int, int],
    group: int,
    bm: int,
    precision: lax.PrecisionLike = None,
    interpret=False,
) -> Float[Array, "steps rows cols"]:
    """`xᵀ dy`, where there are blocks: `group` of them on top of each other for each step.

    Sums of as many steps as VMEM has room for stay there while all of `x` passes by.

    Args:
      xt: `x`, transposed.
      dy: `M` a multiple of `bm`.
      inner: place of each block along K.
      steps: see `walk`.
      block: extents along K and N.
      group: blocks a step.
      bm: rows of x that stay in VMEM together.
      precision: of the products.
      interpret: see `pl.pallas_call`.
    """
    k, m = xt.shape
    rows, cols = block
    last = m // bm - 1
    shape = (group * rows, cols)
    count = steps.place.shape[0]
    span = min(count, max(1, vmem() // 4 // (4 * group * rows * cols)))
    # The last span may have less to do.
    place, start, flags = (jnp.pad(s, (0, -count % span)) for s in steps[:3])
    return pl.pallas_call(
        functools.partial(_products, group=group, bk=rows, precision=precision),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(place.shape[0] // span, m // bm, span),
            in_specs=[
                pl.BlockSpec((k, bm), lambda s, i, t, *_: (0, i)),
                pl.BlockSpec(
                    (bm, cols), lambda s, i, t, place, *_: (i, place[s * span + t])
                ),
            ],
            # Nothing leaves VMEM before the last rows of x.
            out_specs=pl.BlockSpec(
                (1, *shape),
                lambda s, i, t, *_: (s * span + jnp.where(i == last, t, 0), 0, 0),
            ),
            scratch_shapes=[pltpu.VMEM((span, *shape), jnp.float32)],
        ),
        out_shape=_calls.struct((place.shape[0], *shape), xt.dtype, xt),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem(),
        ),
        interpret=interpret,
        name="block_sparse_products",
    )(place, start, flags, inner, xt, dy)[:count]


def _products(place, start, flags, inner, xt, dy, out, totals, *, group, bk, precision):
    i, t = pl.program_id(1), pl.program_id(2)
    step = pl.program_id(0) * pl.num_programs(2) + t

    @pl.when(flags[step] != 0)
    def _():
        rows = [_part(inner[start[step] + j], bk) for j in range(group)]
        product = lax.dot_general(
            jnp.concatenate([xt[r, :] for r in rows], 0),
            dy[...],
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        added = jnp.where(i == 0, 0.0, totals[t]) + product
        totals[t] = added
        out[0] = added.astype(out.dtype)


def _part(index, size: int):
    """The `index`-th stretch of this size."""
    return pl.ds(pl.multiple_of(index * size, size), size)
