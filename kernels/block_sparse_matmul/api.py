"""Products with a block-sparse matrix, forward and backward."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jaxprune.kernels import _calls, _hopper
from jaxprune.kernels.block_sparse_matmul import _steps, tpu, xla
from jaxtyping import Array, Float, Int

from jaxprune.formats import BlockSparseArray, unpack

Backend: TypeAlias = Literal["gpu", "tpu", "xla"]


class _Pattern(NamedTuple):
    """Places of blocks that are known when the program is traced, as bytes of int32."""

    rows: bytes
    columns: bytes
    by_row: bytes

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the attributes."""
        rows, columns, by_row = (np.frombuffer(x, np.int32) for x in self)
        return rows, columns, by_row


@dataclasses.dataclass(frozen=True)
class _Options:
    backend: Backend | None
    reasons: tuple[tuple[str, str], ...]  # why a backend does not take the blocks
    precision: lax.PrecisionLike
    interpret: Any
    pattern: _Pattern | None
    wide: bool  # gives the sums, in float32


def block_sparse_matmul(
    x: Float[Array, "... K"],
    packed: BlockSparseArray,
    *,
    bias: Float[Array, "... N"] | None = None,
    activation: Callable[[Array], Array] | None = None,
    group_sizes: Int[Array, " experts"] | None = None,
    backend: Backend | None = None,
    precision: lax.PrecisionLike = None,
    interpret: Any = False,
) -> Float[Array, "... N"]:
    """`activation(x @ W + bias)` for a matrix of blocks; those not kept cost nothing.

    Sums are float32. The gradient with respect to `packed.values` exists where blocks
    are kept; the pattern has none. A new pattern of the same capacity is the same
    program, if `packed` is an argument of the function that is traced. If the function
    closes over the pattern, XLA gets the products written out, which on a CPU of several
    cores is faster.

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
        with the bias, after the product: to sums in float32, where XLA makes them,
        and to what the kernels of TPUs and GPUs have rounded. For a derivative, what goes
        into it is saved in float32.
      group_sizes: for a stack of one axis (experts) and x of `[rows, K]`, how many rows
        belong to each matrix, one after another, as in `jax.lax.ragged_dot`; rows after
        the last give 0. The matrices are written out for it, so that no time is saved.
      backend: `"tpu"` or `"gpu"` (Pallas; Hopper GPUs), or `"xla"`, which runs anywhere;
        by default what suits the blocks and the device.
      precision: of the products; see `jax.lax.dot_general`.
      interpret: run the kernel of the TPU or GPU on any device, slowly: what
        `pl.pallas_call` takes for it, or `InterpretGPUParams`.

    Returns:
      In the type to which those of `x` and the values are promoted.

    Raises:
      ValueError: if the shapes do not fit, or the backend does not take the blocks.

    Example:
      >>> w = jnp.eye(4)
      >>> packed = jp.formats.pack(w, w != 0, jp.Block(2, 2))
      >>> jp.kernels.block_sparse_matmul(jnp.arange(4.0), packed).tolist()
      [0.0, 1.0, 2.0, 3.0]
    """
    if not isinstance(packed, BlockSparseArray):
        raise TypeError(
            f"packed: got {type(packed).__name__}; expected a BlockSparseArray. Make it "
            "with jaxprune.formats.pack(w, mask, jaxprune.Block(...))."
        )
    x, packed = jax.tree.map(jnp.asarray, (x, packed))
    k, n = packed.layout.matrix
    stack = packed.shape[: -len(packed.layout.shape)]
    if group_sizes is None:
        _calls.check_shape(x, stack, (k, n))
    else:
        _calls.check_ragged(x, group_sizes, backend, stack, (k, n))
    _calls.check_bias(bias, stack, n)
    dtype = jnp.result_type(x, packed.values)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize > 4:
        raise TypeError(
            f"x: it is {x.dtype}, and the values are {packed.dtype}; expected floating "
            "point of at most 32 bits, in which sums are made. Cast them."
        )
    if x.size == 0:
        return jnp.zeros((*x.shape[:-1], n), dtype)
    packed = dataclasses.replace(packed, values=packed.values.astype(dtype))
    if group_sizes is not None:
        w = packed.layout.to_matrix(unpack(packed))
        return _calls.ragged(
            x.astype(dtype), w, group_sizes, bias, activation, precision=precision
        )
    reasons = {
        "gpu": _why_not_gpu(packed, interpret),
        "tpu": _why_not_tpu(packed),
        "xla": "",
    }
    _calls.check_backend(backend, reasons, "these blocks")
    parts = packed.layout.parts
    pattern = None if stack or parts else _known(x, packed)
    # What devices have of a sum is added up before it is rounded.
    wide = bias is not None or activation is not None or bool(parts and parts[0] > 1)
    options = _Options(
        backend, tuple(reasons.items()), precision, interpret, pattern, wide
    )

    def finished(y, bias):
        return _calls.finished(y, bias, activation, dtype) if wide else y

    return _calls.multiply(
        functools.partial(_product, options),
        x.astype(dtype),
        packed,
        bias=bias,
        finish=finished,
    )


def _known(x: Array, packed: BlockSparseArray) -> _Pattern | None:
    """The pattern, where the places are constants of a program that is being traced."""
    places = packed.rows, packed.columns, packed.by_row
    traced = isinstance(x, core.Tracer) or isinstance(packed.values, core.Tracer)
    if not traced or packed.capacity > xla.WRITTEN_OUT:
        return None
    if any(isinstance(p, core.Tracer) for p in places):
        return None
    return _Pattern(*(np.asarray(p, np.int32).tobytes() for p in places))


def _why_not_tpu(packed: BlockSparseArray) -> str:
    """The reason, or nothing if there is none."""
    rows, cols = packed.block
    if rows % 128 or cols % 128:
        return (
            f"they are {rows} x {cols}, and a register holds 128 numbers side by side. "
            "Prune in blocks of a multiple of 128 by a multiple of 128."
        )
    if packed.dtype not in (jnp.bfloat16, jnp.float32):
        return f"they are {packed.dtype}; expected bfloat16 or float32."
    return ""


def _why_not_gpu(packed: BlockSparseArray, interpret: Any) -> str:
    rows, cols = packed.block
    if rows % 64 or cols % 64:
        return (
            f"they are {rows} x {cols}, and a copy takes 64 numbers side by side. "
            "Prune in blocks of a multiple of 64 by a multiple of 64."
        )
    if packed.dtype not in (jnp.bfloat16, jnp.float16):
        return (
            f"with x, they are {packed.dtype}; expected bfloat16 or float16. Cast both."
        )
    return _hopper.why_not(interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options: _Options, x: Array, packed: BlockSparseArray) -> Array:
    k, n = packed.layout.matrix
    x = _padded(x, 1, packed.grid[0] * packed.block[0])
    places, inner = packed.columns, packed.rows
    dtype = jnp.float32 if options.wide else x.dtype
    y = _multiply(options, x, packed.values, None, inner, places, packed.grid, dtype)
    return y[:, :n]


def _forward(options, x, packed):
    return _product(options, x, packed), (x, packed)


def _backward(options, kept, dy):
    x, packed = kept
    k, n = packed.layout.matrix
    (k_blocks, n_blocks), (rows, cols) = packed.grid, packed.block
    dy = _padded(dy.astype(x.dtype), 1, n_blocks * cols)
    order = packed.by_row
    dx = _multiply(
        options, dy, packed.values, order, packed.columns[order], packed.rows[order],
        (n_blocks, k_blocks), x.dtype,
    )[:, :k]  # fmt: skip
    dvalues = _outer(options, _padded(x, 1, k_blocks * rows), dy, packed)
    return dx, dataclasses.replace(
        packed,
        values=dvalues,
        rows=_calls.no_gradient(packed.rows),
        columns=_calls.no_gradient(packed.columns),
        by_row=_calls.no_gradient(order),
    )


_product.defvjp(_forward, _backward)


def _multiply(options, x, values, order, inner, places, grid, dtype):
    """`x` times the blocks, sorted by `places`; `grid` counts contracted and produced.

    With an order, blocks are not sorted themselves, and they are transposed.
    """
    contracted, outputs = grid
    inner = jnp.minimum(inner, contracted - 1)  # of room that is not taken
    m, (capacity, *block) = x.shape[0], values.shape
    transpose = order is not None
    order = jnp.arange(capacity, dtype=jnp.int32) if order is None else order

    def by_xla(x, values, order, inner, places):
        rest = {
            "transpose": transpose, "precision": options.precision, "dtype": dtype
        }  # fmt: skip
        if m <= xla.FEW:
            values = values[order] if transpose else values
            return xla.matmul_few(x, values, inner, places, outputs, **rest)
        if options.pattern and (m >= xla.MANY or not transpose):
            inner, places, order = options.pattern.arrays()
            if transpose:
                inner, places = places[order], inner[order]
            return xla.matmul_known(x, values, order, inner, places, outputs, **rest)
        return xla.matmul(x, values, order, inner, places, outputs, **rest)

    def by_tpu(x, values, order, inner, places):
        values = values[order] if transpose else values
        group = _steps.best_group(capacity, outputs, most=1024 // max(block) or 1)
        bm = tpu.rows_at_once(m, x.shape[1], x.dtype.itemsize)
        y = tpu.matmul(
            _padded(x, 0, -(-m // bm) * bm), values, inner,
            _steps.walk(places, outputs, group), outputs, group=group, bm=bm,
            transpose=transpose, precision=options.precision, interpret=options.interpret,
        )  # fmt: skip
        return y[:m].astype(dtype)

    def by_gpu(x, values, order, inner, places):
        gpu = _gpu()
        tile = gpu.choose_tile(m, outputs, block[0 if transpose else 1])
        x = _padded(x, 0, max(1, -(-m // tile.rows)) * tile.rows)
        y = gpu.matmul(
            x, values, order, inner, places, outputs,
            tile=tile, transpose=transpose, interpret=options.interpret,
        )  # fmt: skip
        return y[:m].astype(dtype)

    operands = x, values, order, inner, places
    by = {"gpu": by_gpu, "tpu": by_tpu, "xla": by_xla}
    return _calls.choose(options.backend, dict(options.reasons), by, *operands)


def _outer(options, x, dy, packed):
    """`xᵀ dy`, on the blocks of `packed`."""
    k_blocks, n_blocks = packed.grid
    capacity, block = packed.capacity, packed.block
    inner = jnp.minimum(packed.rows, k_blocks - 1)
    m = x.shape[0]
    rest = {"block": block, "precision": options.precision}

    def by_xla(x, dy, inner, places):
        if options.pattern:
            inner, places, _ = options.pattern.arrays()
            return xla.products_known(x, dy, inner, places, **rest)
        return xla.products(x, dy, inner, places, **rest)

    def by_tpu(x, dy, inner, places):
        group = _steps.best_group(capacity, n_blocks, most=1024 // max(block) or 1)
        bm = tpu.rows_at_once(m, x.shape[1], x.dtype.itemsize)
        x, dy = (_padded(a, 0, -(-m // bm) * bm) for a in (x, dy))
        steps = _steps.walk(places, n_blocks, group)
        found = tpu.products(
            x.T,
            dy,
            inner,
            steps,
            group=group,
            bm=bm,
            interpret=options.interpret,
            **rest,
        ).reshape(-1, *block)
        slots = _steps.slots(places, steps, n_blocks, group)
        return found.at[slots].get(mode="fill", fill_value=0)

    def by_gpu(x, dy, inner, places):
        x, dy = (_padded(a, 0, -(-m // 64) * 64) for a in (x, dy))
        return _gpu().products(
            x, dy, inner, places, n_blocks, block=block, interpret=options.interpret
        )

    operands = x, dy, inner, packed.columns
    by = {"gpu": by_gpu, "tpu": by_tpu, "xla": by_xla}
    return _calls.choose(options.backend, dict(options.reasons), by, *operands)


def _gpu():
    # Half a second that only programs with such blocks should pay for.
    from jaxprune.kernels.block_sparse_matmul import gpu

    return gpu


def _padded(x: Array, axis: int, size: int) -> Array:
    """`x` with zeros at the end of an axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads) if any(pads[axis]) else x
