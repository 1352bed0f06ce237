"""Products with packed matrices of any format, and with their transposes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jaxtyping import Array, Float

from jaxprune.acceleration._packing import Packed
from jaxprune.formats import BlockSparseArray, NMArray
from jaxprune.kernels import bitmap_matmul, block_sparse_matmul, nm_matmul


def product(
    x: Float[Array, "... K"], packed: Packed, *, precision: lax.PrecisionLike = None
) -> Float[Array, "... N"]:
    """`x @ W`."""
    match packed:
        case BlockSparseArray():
            return block_sparse_matmul(x, packed, precision=precision)
        case NMArray():
            return nm_matmul(x, packed, precision=precision)
    return bitmap_matmul(x, packed, precision=precision)


def product_transposed(
    y: Float[Array, "... N"], packed: Packed, *, precision: lax.PrecisionLike = None
) -> Float[Array, "... K"]:
    """`y @ Wᵀ`, without packing W once more.

    It is the derivative of `product` by x, and its own derivatives are `product` and the
    derivative of that by the values.
    """
    places, rebuild = _split(packed)
    known = not any(isinstance(x, core.Tracer) for x in places)
    multiply = functools.partial(product, precision=precision)

    def forward(y, values, places):
        packed = rebuild(values, held if known else places)
        x = jnp.zeros((*y.shape[:-1], packed.layout.matrix[0]), y.dtype)
        (dx,) = jax.vjp(lambda x: multiply(x, packed), x)[1](y)
        return dx, (y, values, places)

    def backward(kept, dx):
        y, values, places = kept
        inner = held if known else places
        dy, pull = jax.vjp(lambda values: multiply(dx, rebuild(values, inner)), values)
        return dy, *pull(y), jax.tree.map(_no_gradient, places)

    transposed = jax.custom_vjp(lambda *operands: forward(*operands)[0])
    transposed.defvjp(forward, backward)
    # Places that are known stay so: XLA then gets the products written out.
    held, places = places, () if known else places
    return transposed(y, packed.values, places)


def _split(packed: Packed) -> tuple[tuple[Array, ...], Any]:
    """The fields beside the values, and how the two become a packed matrix again."""
    names = [
        f.name
        for f in dataclasses.fields(packed)
        if f.name != "values" and not f.metadata.get("static")
    ]

    def rebuild(values, places):
        fields = dict(zip(names, places, strict=True))
        return dataclasses.replace(packed, values=values, **fields)

    return tuple(getattr(packed, name) for name in names), rebuild


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
