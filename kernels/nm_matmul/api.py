"""Products with an N:M sparse matrix, forward and backward."""

import dataclasses
import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxprune.kernels.nm_matmul import tpu, xla
from jaxtyping import Array, Float

from jaxprune.formats import NMArray

Backend: TypeAlias = Literal["tpu", "xla"]

_FEW = 64  # rows of x up to which the time goes into reading W


@dataclasses.dataclass(frozen=True)
class _Options:
    backend: Backend | None
    precision: lax.PrecisionLike
    interpret: bool


def nm_matmul(
    x: Float[Array, "... K"],
    packed: NMArray,
    *,
    backend: Backend | None = None,
    precision: lax.PrecisionLike = None,
    interpret: bool = False,
) -> Float[Array, "... N"]:
    """`x @ W` for a matrix of N:M sparsity, which is decompressed on the way.

    No multiplication is saved, only the reading of W. That pays where reading is all that
    takes time: on a TPU, for up to 64 rows of x (the decoding of a language model), with
    bfloat16 values of 2:4, 1:2, 1:4, 1:8 or 1:16, K of 256 or more, and N a multiple of
    128 or large. Anything else, and the backward pass, writes out the matrix first and is
    slower than the dense product.

    Sums are float32. The gradient with respect to `packed.values` exists for what is kept;
    the pattern and integers have none.

    Args:
      x: for stacked matrices with their leading axes in front, `[stack, ..., K]`.
      packed: what `jaxprune.formats.pack` gave for the matrix `[K, N]`, `[stack, K, N]`,
        or a leaf of more axes, which are flattened to these.
      backend: `"tpu"` (Pallas), or `"xla"`, which runs anywhere; by default what suits
        the sizes and the device.
      precision: of the products; see `jax.lax.dot_general`.
      interpret: run the TPU kernel on any device, slowly.

    Returns:
      In the type to which those of `x` and the values are promoted; in that of `x` for
      values of 8 bits.

    Raises:
      ValueError: if the shapes do not fit, or the backend does not take the matrix.
      TypeError: if `packed` is no `NMArray`, or `x` has no floating-point numbers.

    Example:
      >>> w = jnp.array([[0.0], [1.0], [0.0], [2.0]])
      >>> packed = jp.formats.pack(w, w != 0, jp.NM(2, 4))
      >>> jp.kernels.nm_matmul(jnp.array([1.0, 10.0, 100.0, 1000.0]), packed).tolist()
      [2010.0]
    """
    if not isinstance(packed, NMArray):
        raise TypeError(
            f"packed: got {type(packed).__name__}; expected an NMArray. Make it with "
            "jaxprune.formats.pack(w, mask, jaxprune.NM(...))."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"x: its type is {x.dtype}; expected floating-point numbers. Convert it with "
            "x.astype(jnp.bfloat16)."
        )
    k, n = packed.layout.matrix
    stack = packed.codes.shape[:-2]
    if x.shape[-1:] != (k,) or x.shape[: len(stack)] != stack:
        raise ValueError(
            f"x: its shape is {x.shape}; expected {[*stack, '...', k]}, since packed holds "
            f"{f'a stack {list(stack)} of matrices' if stack else 'a matrix'} [{k}, {n}]."
        )
    narrow = packed.dtype.itemsize == 1
    dtype = x.dtype if narrow else jnp.result_type(x, packed.values)
    rows = x.shape[:-1]
    x = x.astype(dtype).reshape(*stack, -1, k)
    if backend not in ("tpu", "xla", None):
        raise ValueError(f"backend: got {backend!r}; expected 'tpu', 'xla' or None.")
    reason = _why_not_tpu(packed, dtype)
    if backend == "tpu" and reason:
        raise ValueError(f"backend: 'tpu' does not take this matrix: {reason}")
    if backend is None and (reason or x.shape[-2] > _FEW):
        backend = "xla"
    product = functools.partial(_product, _Options(backend, precision, interpret))
    for _ in stack:
        product = jax.vmap(product)
    return product(x, packed).reshape(*rows, n)


def _why_not_tpu(packed: NMArray, dtype) -> str:
    """The reason, or nothing if there is none."""
    if packed.dtype != jnp.bfloat16 or dtype != jnp.bfloat16:
        return (
            f"its values are {packed.dtype} and the product would be {dtype}; expected "
            "bfloat16. Convert x and the weights with astype(jnp.bfloat16)."
        )
    if packed.coding != "words":
        return (
            f"it is {packed.n}:{packed.m} of the shape {packed.layout.matrix}; expected "
            "2:4, 1:2, 1:4, 1:8 or 1:16, K of 256 or more, and N a multiple of 128 or large."
        )
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options: _Options, x: Array, packed: NMArray) -> Array:
    precision, interpret = options.precision, options.interpret
    by_tpu = functools.partial(tpu.matmul, precision=precision, interpret=interpret)
    by_xla = functools.partial(xla.matmul, precision=precision)
    if options.backend == "xla":
        return by_xla(x, packed)
    if options.backend == "tpu":
        return by_tpu(x, packed)
    return lax.platform_dependent(x, packed, tpu=by_tpu, default=by_xla)


def _forward(options, x, packed):
    return _product(options, x, packed), (x, packed)


def _backward(options, kept, dy):
    x, packed = kept
    dx = xla.matmul_transposed(dy, packed, precision=options.precision)
    if jnp.issubdtype(packed.dtype, jnp.floating):
        dvalues = xla.products(x, dy, packed, precision=options.precision)
        dvalues = dvalues.astype(packed.dtype)
    else:
        dvalues = _no_gradient(packed.values)
    codes = _no_gradient(packed.codes)
    return dx, dataclasses.replace(packed, values=dvalues, codes=codes)


_product.defvjp(_forward, _backward)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
