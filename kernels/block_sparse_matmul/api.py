"""Products with a block-sparse matrix, forward and backward."""

import dataclasses
import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxprune.formats import BlockSparseArray
from jaxprune.kernels.block_sparse_matmul import _steps, tpu, xla

Backend: TypeAlias = Literal["tpu", "xla"]


@dataclasses.dataclass(frozen=True)
class _Options:
    backend: Backend | None
    precision: lax.PrecisionLike
    interpret: bool


def block_sparse_matmul(
    x: Float[Array, "... K"],
    packed: BlockSparseArray,
    *,
    backend: Backend | None = None,
    precision: lax.PrecisionLike = None,
    interpret: bool = False,
) -> Float[Array, "... N"]:
    """`x @ W` for a matrix of blocks, of which those that are not kept cost nothing.

    Sums are float32. The gradient with respect to `packed.values` exists where blocks
    are kept; the pattern has none. A new pattern of the same capacity is the same
    program.

    Args:
      x: for stacked matrices with their leading axes in front, `[stack, ..., K]`.
      packed: what `jaxprune.formats.pack` gave for the matrix `[K, N]`, `[stack, K, N]`,
        or a leaf of more axes, which are flattened to these.
      backend: `"tpu"` (Pallas), or `"xla"`, which runs anywhere; by default what suits
        the blocks and the device.
      precision: of the products; see `jax.lax.dot_general`.
      interpret: run the TPU kernel on any device, slowly.

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
    k, n = packed.layout.matrix
    stack = packed.values.shape[:-3]
    if x.shape[-1:] != (k,) or x.shape[: len(stack)] != stack:
        raise ValueError(
            f"x: its shape is {x.shape}; expected {[*stack, '...', k]}, since packed holds "
            f"{f'a stack {list(stack)} of matrices' if stack else 'a matrix'} [{k}, {n}]."
        )
    reason = _why_not_tpu(packed)
    if backend not in ("tpu", "xla", None):
        raise ValueError(f"backend: got {backend!r}; expected 'tpu', 'xla' or None.")
    if backend == "tpu" and reason:
        raise ValueError(f"backend: 'tpu' does not take these blocks: {reason}")
    if reason:
        backend = "xla"
    dtype = jnp.result_type(x, packed.values)
    values = packed.values.astype(dtype)
    packed = dataclasses.replace(packed, values=values)
    product = functools.partial(_product, _Options(backend, precision, interpret))
    for _ in stack:
        product = jax.vmap(product)
    rows = x.astype(dtype).reshape(*stack, -1, k)
    return product(rows, packed).reshape(*x.shape[:-1], n)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options: _Options, x: Array, packed: BlockSparseArray) -> Array:
    k, n = packed.layout.matrix
    x = _padded(x, 1, packed.grid[0] * packed.block[0])
    places, inner = packed.columns, packed.rows
    y = _multiply(options, x, packed.values, inner, places, packed.grid, False)
    return y[:, :n]


def _forward(options, x, packed):
    return _product(options, x, packed), (x, packed)


def _backward(options, kept, dy):
    x, packed = kept
    k, n = packed.layout.matrix
    (k_blocks, n_blocks), (rows, cols) = packed.grid, packed.block
    dy = _padded(dy, 1, n_blocks * cols)
    order = packed.by_row
    dx = _multiply(
        options, dy, packed.values[order], packed.columns[order], packed.rows[order],
        (n_blocks, k_blocks), True,
    )[:, :k]  # fmt: skip
    xt = _padded(x, 1, k_blocks * rows).T
    dvalues = _outer(options, xt, dy, packed)
    return dx, dataclasses.replace(
        packed,
        values=dvalues,
        rows=_no_gradient(packed.rows),
        columns=_no_gradient(packed.columns),
        by_row=_no_gradient(order),
    )


_product.defvjp(_forward, _backward)


def _multiply(options, x, values, inner, places, grid, transpose):
    """`x` times the blocks, sorted by `places`; `grid` counts contracted and produced."""
    contracted, outputs = grid
    inner = jnp.minimum(inner, contracted - 1)  # of room that is not taken
    m, (capacity, *block) = x.shape[0], values.shape

    def by_xla(x, values, inner, places):
        rest = {"transpose": transpose, "precision": options.precision}
        if m <= xla.FEW:
            return xla.matmul_few(x, values, inner, places, outputs, **rest)
        group = _steps.best_group(capacity, outputs, most=512 // min(block) or 1)
        steps = _steps.walk(places, outputs, group)
        return xla.matmul(x, values, inner, steps, outputs, group=group, **rest)

    def by_tpu(x, values, inner, places):
        group = _steps.best_group(capacity, outputs, most=1024 // max(block) or 1)
        bm = tpu.rows_at_once(m, x.shape[1], x.dtype.itemsize)
        y = tpu.matmul(
            _padded(x, 0, -(-m // bm) * bm), values, inner,
            _steps.walk(places, outputs, group), outputs, group=group, bm=bm,
            transpose=transpose, precision=options.precision, interpret=options.interpret,
        )  # fmt: skip
        return y[:m]

    return _choose(options, by_tpu, by_xla, x, values, inner, places)


def _outer(options, xt, dy, packed):
    """`xt @ dy`, on the blocks of `packed`."""
    k_blocks, n_blocks = packed.grid
    capacity, block = packed.capacity, packed.block
    inner = jnp.minimum(packed.rows, k_blocks - 1)
    rest = {"block": block, "precision": options.precision}

    def by_xla(xt, dy, inner, places):
        group = _steps.best_group(capacity, n_blocks, most=512 // min(block) or 1)
        steps = _steps.walk(places, n_blocks, group)
        return xla.products(xt, dy, inner, steps, group=group, **rest)

    def by_tpu(xt, dy, inner, places):
        group = _steps.best_group(capacity, n_blocks, most=1024 // max(block) or 1)
        m = dy.shape[0]
        bm = tpu.rows_at_once(m, xt.shape[0], xt.dtype.itemsize)
        xt, dy = _padded(xt, 1, -(-m // bm) * bm), _padded(dy, 0, -(-m // bm) * bm)
        steps = _steps.walk(places, n_blocks, group)
        found = tpu.products(
            xt, dy, inner, steps, group=group, bm=bm, interpret=options.interpret, **rest
        ).reshape(-1, *block)
        slots = _steps.slots(places, steps, n_blocks, group)
        return found.at[slots].get(mode="fill", fill_value=0)

    return _choose(options, by_tpu, by_xla, xt, dy, inner, packed.columns)


def _choose(options, by_tpu, by_xla, *operands):
    if options.backend == "xla":
        return by_xla(*operands)
    if options.backend == "tpu":
        return by_tpu(*operands)
    return lax.platform_dependent(*operands, tpu=by_tpu, default=by_xla)


def _padded(x: Array, axis: int, size: int) -> Array:
    """`x` with zeros at the end of an axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pads) if any(pads[axis]) else x


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)
