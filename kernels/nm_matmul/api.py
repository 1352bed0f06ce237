"""Products with an N:M sparse matrix, forward and backward."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxprune.kernels import _calls, _hopper
from jaxprune.kernels.nm_matmul import tpu, xla
from jaxtyping import Array, Float, Int

from jaxprune.formats import NMArray

Backend: TypeAlias = Literal["gpu", "tpu", "xla"]

_FEW = 64  # rows of x up to which the time goes into reading W


@dataclasses.dataclass(frozen=True)
class _Options:
    backend: Backend | None
    reasons: tuple[tuple[str, str], ...]  # why a backend does not take the matrix
    precision: lax.PrecisionLike
    interpret: Any
    wide: bool  # gives the sums, in float32


def nm_matmul(
    x: Float[Array, "... K"],
    packed: NMArray,
    *,
    bias: Float[Array, "... N"] | None = None,
    activation: Callable[[Array], Array] | None = None,
    group_sizes: Int[Array, " experts"] | None = None,
    backend: Backend | None = None,
    precision: lax.PrecisionLike = None,
    interpret: Any = False,
) -> Float[Array, "... N"]:
    """`activation(x @ W + bias)` for N:M sparse W, which is decompressed on the way.

    No multiplication is saved, only the reading of W. That pays where reading is all that
    takes time: on a TPU or a Hopper GPU, for up to 64 rows of x (the decoding of a language
    model), with bfloat16 values (on GPUs also float16) of 2:4, 1:2, 1:4, 1:8 or 1:16, K of
    256 or more, and N a multiple of 128 or large. Anything else, and the backward pass,
    writes out the matrix first and is slower than the dense product. Neither kernel has
    been timed yet.

    Sums are float32. The gradient with respect to `packed.values` exists for what is kept;
    the pattern and integers have none.

    On a mesh with explicit axes each device multiplies its own parts of a matrix that was
    packed sharded. What K was sharded over is summed in float32, before bias and
    activation; x may be whole along K, or sharded in the same way. A matrix on axes of the
    mesh that rows of x take up is gathered, packed. On auto axes XLA divides the work, by
    its own path.

    Args:
      x: for stacked matrices with their leading axes in front, `[stack, ..., K]`.
      packed: what `jaxprune.formats.pack` gave for the matrix `[K, N]`, `[stack, K, N]`,
        or a leaf of more axes, which are flattened to these.
      bias: `[N]`, or `[stack, N]`.
      activation: an elementwise function of float32, such as `jax.nn.gelu`. XLA applies it
        with the bias, after the product: to sums in float32, where XLA or the GPU
        kernel makes them, and to what the TPU kernel has rounded. For a derivative, what
        goes into it is saved in float32.
      group_sizes: for a stack of one axis (experts) and x of `[rows, K]`, how many rows
        belong to each matrix, one after another, as in `jax.lax.ragged_dot`; rows after
        the last give 0. The matrices are written out for it, so that no time is saved.
      backend: `"tpu"` or `"gpu"` (Pallas; Hopper GPUs), or `"xla"`, which runs anywhere;
        by default what suits the sizes and the device.
      precision: of the products; see `jax.lax.dot_general`.
      interpret: run the kernel of the TPU or GPU on any device, slowly: what
        `pl.pallas_call` takes for it, or `InterpretGPUParams`.

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
    stack = packed.shape[: -len(packed.layout.shape)]
    if group_sizes is None:
        _calls.check_shape(x, stack, (k, n))
    else:
        _calls.check_ragged(x, group_sizes, backend, stack, (k, n))
    _calls.check_bias(bias, stack, n)
    narrow = packed.dtype.itemsize == 1
    dtype = x.dtype if narrow else jnp.result_type(x, packed.values)
    if group_sizes is not None:
        w = packed.dense()
        return _calls.ragged(
            x.astype(dtype), w, group_sizes, bias, activation, precision=precision
        )
    reasons = {
        "gpu": _why_not_gpu(packed, dtype, interpret),
        "tpu": _why_not_tpu(packed, dtype),
        "xla": "",
    }
    _calls.check_backend(backend, reasons, "this matrix")
    finish = bias is not None or activation is not None
    # What devices have of a sum is added up before it is rounded.
    wide = finish or bool(packed.layout.parts and packed.layout.parts[0] > 1)

    def product(x, packed):
        many = backend is None and x.shape[0] > _FEW
        chosen = "xla" if many else backend
        options = _Options(chosen, tuple(reasons.items()), precision, interpret, wide)
        return _product(options, x, packed)

    def finished(y, bias):
        return _calls.finished(y, bias, activation, dtype) if wide else y

    return _calls.multiply(product, x.astype(dtype), packed, bias=bias, finish=finished)


def _why_not_tpu(packed: NMArray, dtype) -> str:
    """The reason, or nothing if there is none."""
    return _why_not(packed, dtype, (jnp.bfloat16,))


def _why_not_gpu(packed: NMArray, dtype, interpret: Any) -> str:
    types = (jnp.bfloat16, jnp.float16)
    return _why_not(packed, dtype, types) or _hopper.why_not(interpret)


def _why_not(packed: NMArray, dtype, types) -> str:
    if packed.dtype not in types or dtype != packed.dtype:
        names = " or ".join(jnp.dtype(t).name for t in types)
        return (
            f"its values are {packed.dtype} and the product would be {dtype}; expected "
            f"{names}. Convert x and the weights with astype(jnp.bfloat16)."
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
    dtype = jnp.float32 if options.wide else x.dtype

    def by_gpu(x, packed):
        # Half a second that only programs with such a matrix should pay for.
        from jaxprune.kernels.nm_matmul import gpu

        few = [x[i : i + gpu.FEW] for i in range(0, max(1, x.shape[0]), gpu.FEW)]
        found = [gpu.matmul(rows, packed, interpret=interpret) for rows in few]
        return jnp.concatenate(found).astype(dtype)

    def by_tpu(x, packed):
        y = tpu.matmul(x, packed, precision=precision, interpret=interpret)
        return y.astype(dtype)

    def by_xla(x, packed):
        return xla.matmul(x, packed, precision=precision).astype(dtype)

    by = {"gpu": by_gpu, "tpu": by_tpu, "xla": by_xla}
    return _calls.choose(options.backend, dict(options.reasons), by, x, packed)


def _forward(options, x, packed):
    return _product(options, x, packed), (x, packed)


def _backward(options, kept, dy):
    x, packed = kept
    dy = dy.astype(x.dtype)
    dx = xla.matmul_transposed(dy, packed, precision=options.precision)
    if jnp.issubdtype(packed.dtype, jnp.floating):
        dvalues = xla.products(x, dy, packed, precision=options.precision)
        dvalues = dvalues.astype(packed.dtype)
    else:
        dvalues = _calls.no_gradient(packed.values)
    codes = _calls.no_gradient(packed.codes)
    return dx, dataclasses.replace(packed, values=dvalues, codes=codes)


_product.defvjp(_forward, _backward)
