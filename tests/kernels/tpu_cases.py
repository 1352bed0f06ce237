"""Kernels in the sizes whose bundles are kept in `tpu_bundles.json`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxprune.kernels.block_sparse_matmul import _steps
from jaxprune.kernels.block_sparse_matmul import tpu as block_sparse
from jaxprune.kernels.masked_matmul import tpu as masked
from jaxprune.kernels.nm_matmul import tpu as nm

import jaxprune as jp

# Kept of a group, the group, rows of x, K, N, and columns of a step.
_NM = (
    (2, 4, 16, 4096, 2048, 512),
    (2, 4, 16, 4096, 2048, 1024),
    (2, 4, 17, 1100, 1100, 1024),
    (1, 4, 16, 4096, 2048, 1024),
    (1, 16, 16, 4096, 2048, 1024),
)


class Case(NamedTuple):
    """A call of one kernel.

    Attributes:
      name: of the case.
      kernel: name that the compiler knows the kernel by.
      call: the function to compile.
      operands: shapes and types of its arguments.
    """

    name: str
    kernel: str
    call: Callable
    operands: tuple[Any, ...]


def cases() -> Iterator[Case]:
    """All of them."""
    for size, group in ((128, 4), (128, 8), (256, 2), (512, 1)):
        yield from _block_sparse(size, group)
    for m in (16, 512):
        yield from _masked(m)
    for n, m, rows, k, cols, bn in _NM:
        yield from _nm(n, m, rows, k, cols, bn)


def _block_sparse(size: int, group: int, m=1024, extent=2048, bm=512) -> Iterator[Case]:
    """A fifth of the blocks of a square matrix, in bfloat16."""
    along = extent // size
    capacity = along**2 // 5
    count = _steps.count(capacity, along, group)
    index = jax.ShapeDtypeStruct((capacity,), jnp.int32)
    step = jax.ShapeDtypeStruct((count,), jnp.int32)
    steps = _steps.Steps(step, step, step, jax.ShapeDtypeStruct((), jnp.int32))
    x = jax.ShapeDtypeStruct((m, extent), jnp.bfloat16)
    xt = jax.ShapeDtypeStruct((extent, m), jnp.bfloat16)
    values = jax.ShapeDtypeStruct((capacity, size, size), jnp.bfloat16)
    name = f"{size} x {size}, {group} a step"

    def product(transpose):
        return lambda x, values, inner, steps: block_sparse.matmul(
            x, values, inner, steps, along, group=group, bm=bm, transpose=transpose
        )

    def outer(xt, dy, inner, steps):
        return block_sparse.products(
            xt, dy, inner, steps, block=(size, size), group=group, bm=bm
        )

    for what, transpose in (("y", False), ("dx", True)):
        yield Case(
            f"block_sparse_matmul {name}: {what}", "block_sparse_matmul",
            product(transpose), (x, values, index, steps),
        )  # fmt: skip
    yield Case(
        f"block_sparse_matmul {name}: dW", "block_sparse_products",
        outer, (xt, x, index, steps),
    )  # fmt: skip


def _masked(m: int, extent=4096) -> Iterator[Case]:
    x = jax.ShapeDtypeStruct((m, extent), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((extent, extent), jnp.bfloat16)
    bits = jax.ShapeDtypeStruct((extent // 8, extent), jnp.uint8)
    for what, transpose in (("y", False), ("dx", True)):
        yield Case(
            f"masked_matmul {m} rows: {what}", "masked_matmul",
            functools.partial(masked.matmul, transpose=transpose), (x, w, bits),
        )  # fmt: skip


def _nm(n: int, m: int, rows: int, k: int, cols: int, bn: int) -> Iterator[Case]:
    structure = jp.NM(n, m)
    w = jax.ShapeDtypeStruct((k, cols), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct(w.shape, bool)
    packed = jax.eval_shape(
        lambda w, mask: jp.formats.pack(w, mask, structure), w, mask
    )
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    yield Case(
        f"nm_matmul {n}:{m}, {rows} x {k} x {cols}, {bn} columns a step", "nm_matmul",
        functools.partial(nm.matmul, bn=bn), (x, packed),
    )  # fmt: skip
