"""Block-sparse products on TPU: a slab of x stays in VMEM, U blocks a step."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def matmul(x, values, steps, n, *, bm, u, transpose=False, interpret=False):
    m, k = x.shape
    rows, cols = values.shape[1:]
    bk, bn = (cols, rows) if transpose else (rows, cols)
    count = steps.out.shape[0]
    return pl.pallas_call(
        functools.partial(_kernel, u=u, bk=bk, transpose=transpose),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(m // bm, count),
            in_specs=[
                pl.BlockSpec((bm, k), lambda m, t, *_: (m, 0)),
                pl.BlockSpec((pl.Element(u), pl.Element(rows), pl.Element(cols)), lambda m, t, out, start, *_: (start[t], 0, 0)),
            ],
            out_specs=pl.BlockSpec((bm, bn), lambda m, t, out, *_: (m, out[t])),
            scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=100 << 20,
        ),
        interpret=interpret,
    )(steps.out, steps.inner, steps.block, steps.flags, x, values)


def _kernel(out, start, inner, flags, x, values, y, total, *, u, bk, transpose):
    del out
    t = pl.program_id(1)

    @pl.when(flags[t] & 1 != 0)
    def _():
        total[...] = jnp.zeros_like(total)

    first, valid = start[t], flags[t] >> 2
    some = [
        x[:, pl.ds(pl.multiple_of(inner[first + i] * bk, 128), bk)] for i in range(u)
    ]
    axis = 1 if transpose else 0
    weights = [jnp.where((valid >> i) & 1 != 0, values[i], 0) for i in range(u)]
    total[...] += lax.dot_general(
        jnp.concatenate(some, 1),
        jnp.concatenate(weights, axis),
        (((1,), (axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    @pl.when(flags[t] & 2 != 0)
    def _():
        y[...] = total[...].astype(y.dtype)
