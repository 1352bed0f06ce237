"""Products with a masked matrix, forward and backward."""

import dataclasses
import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxprune.kernels import _calls
from jaxprune.kernels.masked_matmul import tpu, xla
from jaxtyping import Array, Bool, Float

from jaxprune import masks

Backend: TypeAlias = Literal["tpu", "xla"]


@dataclasses.dataclass(frozen=True)
class _Options:
    backend: Backend | None
    precision: lax.PrecisionLike
    interpret: bool
    wide: bool  # gives the sums, in float32


def masked_matmul(
    x: Float[Array, "... K"],
    w: Float[Array, "... K N"],
    mask: Bool[Array, "... K N"] | masks.PackedMask,
    *,
    backend: Backend | None = None,
    precision: lax.PrecisionLike = None,
    interpret: bool = False,
) -> Float[Array, "... N"]:
    """`x @ where(mask, w, 0)`, a dense product of full size: no multiplication is saved.

    On TPU a tile of `w` and its bits are read together, in y and dx. XLA makes no masked
    copy of `w` there either, but takes longer to spread the bits (the table in `tpu.py`).
    A boolean mask is packed to bits first, in a pass of its own; on other devices XLA
    decides what is copied. Sums are float32, and the gradient of `w` is 0 where the mask
    is.

    On a mesh with explicit axes each device multiplies its own shard, with a mask that lies
    as `w` does. What K is sharded over is summed in float32; x may be whole along K, or
    sharded in the same way. A matrix on axes of the mesh that rows of x take up is gathered.
    On auto axes XLA divides the work, by its own path.

    Args:
      x: for stacked matrices with their leading axes in front, `[stack, ..., K]`.
      w: `[K, N]`, or a stack of such matrices.
      mask: True = keep, of the shape of `w`; packed along K, as `jaxprune.masks.pack`
        does for most matrices, it is used as it is.
      backend: `"tpu"` (Pallas), or `"xla"`, which runs anywhere; by default what suits
        the matrix and the device.
      precision: of the products; see `jax.lax.dot_general`.
      interpret: run the TPU kernel on any device, slowly.

    Returns:
      In the type to which those of `x` and `w` are promoted.

    Raises:
      ValueError: if the shapes do not fit, or the backend does not take the matrix.
      TypeError: if the mask is not boolean.

    Example:
      >>> w = jnp.array([[1.0, 2.0], [jnp.nan, 4.0]])
      >>> jp.kernels.masked_matmul(jnp.ones(2), w, w > 1).tolist()
      [0.0, 6.0]
    """
    if w.ndim < 2 or tuple(mask.shape) != w.shape:
        raise ValueError(
            f"mask: its shape is {tuple(mask.shape)}, that of w is {w.shape}; expected the "
            "same, [..., K, N]. Make the mask from this weight."
        )
    *stack, k, n = w.shape
    if x.shape[-1:] != (k,) or x.shape[: len(stack)] != tuple(stack):
        raise ValueError(
            f"x: its shape is {x.shape}; expected {[*stack, '...', k]}, since that of w is "
            f"{w.shape}. Move the axis that is contracted to the end."
        )
    if isinstance(mask, masks.PackedMask):
        whole = k % (8 * _calls.shards(w, w.ndim - 2)) == 0 or not _calls.sharded(w)
        along = mask.axis == w.ndim - 2 and whole
        mask = mask.bits if along else masks.as_bool(mask)
    elif mask.dtype != jnp.bool_:
        raise TypeError(
            f"mask: it is {mask.dtype}; expected bool (True = keep), or what "
            "jaxprune.masks.pack gives. Turn scores into a mask with w != 0."
        )
    dtype = jnp.result_type(x, w)
    reason = _why_not_tpu(k, n, dtype)
    if backend not in ("tpu", "xla", None):
        raise ValueError(f"backend: got {backend!r}; expected 'tpu', 'xla' or None.")
    if backend == "tpu" and reason:
        raise ValueError(f"backend: 'tpu' does not take this matrix: {reason}")
    x, w = x.astype(dtype), w.astype(dtype)

    def product(x, weights, bias, reduce=None):
        del bias
        w, mask = _calls.varying(*weights)
        size, (k, n) = x.shape[: len(stack)], w.shape[-2:]
        # Of what a device has, which may be smaller.
        chosen = "xla" if _why_not_tpu(k, n, dtype) else backend
        options = _Options(chosen, precision, interpret, reduce is not None)
        rows = _calls.varying(x.reshape(*size, -1, k), w, mask)
        y = _calls.over_stack(functools.partial(_product, options), size)(*rows)
        y = reduce(y).astype(dtype) if reduce else y
        return y.reshape(*x.shape[:-1], n)

    weights = w, _calls.placed_as(jnp.asarray(mask), w)
    return _calls.on_mesh(product, x, weights, None, stack=len(stack), ndim=w.ndim)


def _why_not_tpu(k: int, n: int, dtype) -> str:
    """The reason, or nothing if there is none."""
    if k < tpu.LEAST[0] or n < tpu.LEAST[1]:
        least = " x ".join(map(str, tpu.LEAST))
        return f"it is {k} x {n}; expected {least} or more. Leave backend= out."
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it would be {dtype}; expected bfloat16 or float32. Cast x and w."
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options: _Options, x: Array, w: Array, mask: Array) -> Array:
    """`mask` is boolean, or bits along K."""
    return _multiply(options, x, w, mask, transpose=False)


def _forward(options, x, w, mask):
    return _product(options, x, w, mask), (x, w, mask)


def _backward(options, kept, dy):
    x, w, mask = kept
    dy = dy.astype(x.dtype)
    options = dataclasses.replace(options, wide=False)
    dx = _multiply(options, dy, w, mask, transpose=True)
    # XLA masks the product as it leaves the matrix unit, on TPU also without a copy.
    dw = xla.products(x, dy, _as_bool(mask, w), precision=options.precision)
    return dx, dw, np.zeros(mask.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)


def _multiply(options: _Options, x: Array, w: Array, mask: Array, transpose: bool):
    rest = {"transpose": transpose, "precision": options.precision}

    def by_xla(x, w, mask):
        dtype = jnp.float32 if options.wide else x.dtype
        return xla.matmul(x, w, _as_bool(mask, w), dtype=dtype, **rest)

    def by_tpu(x, w, mask):
        bits = _as_bits(mask)
        y = tpu.matmul(x, w, bits, interpret=options.interpret, **rest)
        return y.astype(jnp.float32 if options.wide else x.dtype)

    by = {"tpu": by_tpu, "xla": by_xla}
    return _calls.choose(options.backend, {"tpu": ""}, by, x, w, mask)


def _as_bool(mask: Array, w: Array) -> Array:
    if mask.dtype == jnp.bool_:
        return mask
    return masks.as_bool(masks.PackedMask(mask, w.shape, 0))


def _as_bits(mask: Array) -> Array:
    if mask.dtype != jnp.bool_:
        return mask
    return masks.repack(mask, masks.PackedMask(mask, mask.shape, 0)).bits
