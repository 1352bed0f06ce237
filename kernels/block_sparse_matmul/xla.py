"""Block-sparse products out of XLA's own operations, for any device.

They work on `xᵀ` and `yᵀ`, of which a block is one piece of memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxprune.kernels.block_sparse_matmul._steps import Steps

FEW = 8  # rows of x for which blocks are multiplied all at once


def matmul(
    x: Float[Array, "M K"],
    values: Float[Array, "capacity rows cols"],
    inner: Int32[Array, " capacity"],
    steps: Steps,
    outputs: int,
    *,
    group: int,
    transpose: bool = False,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "M N"]:
    """As that of the TPU kernel."""
    m, k = x.shape
    rows, cols = values.shape[1:]
    bk, bn = (cols, rows) if transpose else (rows, cols)
    xt = x.T.reshape(k // bk, bk, m)
    contracted = ((0, 2) if transpose else (0, 1), (0, 1))

    def step(t, yt):
        blocks = lax.dynamic_slice_in_dim(values, steps.start[t], group)
        blocks = jnp.where(_own(steps.flags[t], group), blocks, 0)
        parts = xt[lax.dynamic_slice_in_dim(inner, steps.start[t], group)]
        product = lax.dot_general(
            blocks, parts, (contracted, ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return yt.at[steps.place[t]].add(product)

    yt = jnp.zeros((outputs, bn, m), jnp.float32)
    yt = lax.fori_loop(0, steps.number, step, yt)
    return yt.reshape(outputs * bn, m).T.astype(x.dtype)


def products(
    xt: Float[Array, "K M"],
    dy: Float[Array, "M N"],
    inner: Int32[Array, " capacity"],
    steps: Steps,
    *,
    block: tuple[int, int],
    group: int,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "capacity rows cols"]:
    """`xᵀ dy`, where there are blocks."""
    k, m = xt.shape
    rows, cols = block
    xt = xt.reshape(k // rows, rows, m)
    dyt = dy.T.reshape(dy.shape[1] // cols, cols, m)

    def step(t, found):
        parts = xt[lax.dynamic_slice_in_dim(inner, steps.start[t], group)]
        product = lax.dot_general(
            parts, dyt[steps.place[t]], (((2,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        before = lax.dynamic_slice_in_dim(found, steps.start[t], group)
        after = jnp.where(_own(steps.flags[t], group), product, before)
        return lax.dynamic_update_slice_in_dim(found, after, steps.start[t], 0)

    found = jnp.zeros((inner.shape[0], rows, cols), jnp.float32)
    return lax.fori_loop(0, steps.number, step, found).astype(xt.dtype)


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
    """The same for a handful of rows: every block is read once, and nothing else counts."""
    m = x.shape[0]
    axis = 2 if transpose else 1
    parts = x.reshape(m, -1, values.shape[axis])[:, inner]
    product = lax.dot_general(
        values, parts, (((axis,), (2,)), ((0,), (1,))),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
    # [capacity, bn, m]; what has no place is dropped.
    y = jax.ops.segment_sum(product, places, outputs, indices_are_sorted=True)
    return y.reshape(-1, m).T.astype(x.dtype)


def _own(flags: Int32[Array, ""], group: int) -> Array:
    return ((flags >> (1 + jnp.arange(group))) & 1 != 0)[:, None, None]
