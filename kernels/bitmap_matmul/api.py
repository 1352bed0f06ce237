"""Products with a matrix of any pattern, kept as a bitmap; forward and backward."""

import dataclasses
import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxprune.kernels import _calls
from jaxprune.kernels.bitmap_matmul import xla
from jaxtyping import Array, Float

from jaxprune.formats import BitmapArray

Backend: TypeAlias = Literal["xla"]


def bitmap_matmul(
    x: Float[Array, "... K"],
    packed: BitmapArray,
    *,
    backend: Backend | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "... N"]:
    """`x @ W` for a bitmap, of which a stretch of rows is written out at a time.

    It takes the memory of the packed matrix and no dense copy, but it is no faster than the
    dense product: values are gathered one by one. With half of 2048 x 2048 weights kept,
    in float32 on CPU, one row of x took 7 to 10 times as long, and 256 rows 1.3 times.
    `xla.py` says why there is no kernel for TPU. Sums are float32.
    The gradient with respect to `packed.values` exists where weights are kept; the
    pattern has none. A new pattern of the same capacity is the same program.

    On a mesh with explicit axes each device multiplies its own parts of a matrix that
    was packed sharded. What K was sharded over is summed in float32; x may be whole
    along K, or sharded in the same way. A matrix on axes of the mesh that rows of x
    take up is gathered, packed. On auto axes XLA divides the work, by its own path.

    Args:
      x: for stacked matrices with their leading axes in front, `[stack, ..., K]`.
      packed: what `jaxprune.formats.pack` gave for `[K, N]` or `[stack, K, N]`. Integers
        have no gradient.
      backend: `"xla"`, which runs anywhere, also by default.
      precision: of the products; see `jax.lax.dot_general`.

    Returns:
      In the type to which those of `x` and the values are promoted.

    Raises:
      ValueError: if the shapes do not fit.
      TypeError: if neither `x` nor the values are floating-point numbers.

    Example:
      >>> w = jnp.eye(4)
      >>> packed = jp.formats.pack(w, w != 0, jp.Unstructured())
      >>> jp.kernels.bitmap_matmul(jnp.arange(4.0), packed).tolist()
      [0.0, 1.0, 2.0, 3.0]
    """
    if not isinstance(packed, BitmapArray):
        raise TypeError(
            f"packed: got {type(packed).__name__}; expected a BitmapArray. Make it with "
            "jaxprune.formats.pack(w, mask, jaxprune.Unstructured())."
        )
    k, n = packed.layout.matrix
    stack = packed.shape[: -len(packed.layout.shape)]
    _calls.check_shape(x, stack, (k, n))
    dtype = jnp.result_type(x, packed.values)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"x: it is {x.dtype}, and the values are {packed.dtype}; expected one of them "
            "to be floating-point. Cast x, as in x.astype(jnp.bfloat16)."
        )
    if backend not in ("xla", None):
        raise ValueError(
            f"backend: got {backend!r}; expected 'xla' or None. Other backends take "
            "blocks: see jaxprune.kernels.block_sparse_matmul."
        )

    # What devices have of a sum is added up before it is rounded.
    parts = packed.layout.parts
    wide = jnp.promote_types(dtype, jnp.float32) if parts and parts[0] > 1 else dtype
    return _calls.multiply(
        functools.partial(_product, precision, wide),
        x.astype(dtype),
        packed,
        finish=lambda y, bias: y.astype(dtype),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(precision: lax.PrecisionLike, dtype, x: Array, packed: BitmapArray):
    return xla.matmul(x, packed, precision=precision, dtype=dtype)


def _forward(precision, dtype, x, packed):
    return _product(precision, dtype, x, packed), (x, packed)


def _backward(precision, dtype, kept, dy):
    del dtype
    x, packed = kept
    dy = dy.astype(x.dtype)
    dx = xla.matmul_transposed(dy, packed, precision=precision)
    if jnp.issubdtype(packed.dtype, jnp.floating):
        dvalues = xla.products(x, dy, packed, precision=precision)
        dvalues = dvalues.astype(packed.dtype)
    else:
        dvalues = _calls.no_gradient(packed.values)
    return dx, dataclasses.replace(
        packed,
        values=dvalues,
        bits=_calls.no_gradient(packed.bits),
        starts=_calls.no_gradient(packed.starts),
    )


_product.defvjp(_forward, _backward)
