"""Whether the arrays of a packed leaf fit what it says of itself."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import formats, masks, structures


def fits(x: Any) -> bool:
    """Whether packing a leaf of its shape gives such arrays.

    Args:
      x: a packed leaf or mask, of arrays or of anything else, as optimizers make them.
    """
    parts = jax.tree.leaves(x, is_leaf=lambda y: y is None)
    if not all(hasattr(y, "shape") and hasattr(y, "dtype") for y in parts):
        return False
    if isinstance(x, masks.PackedMask):
        return _fits_mask(x)
    if not _is_matrix(x.layout):
        return False
    if isinstance(x, formats.BlockSparseArray):
        found = x.values.ndim > 2 and _expected_blocks(x.layout, x.values.shape)
    elif isinstance(x, formats.BitmapArray):
        found = x.values.ndim > 0 and _expected_bitmap(x.layout, x.values.shape)
    else:
        batch = x.layout.stack(tuple(x.codes.shape[:-2]))
        found = _expected_nm(x.layout, batch, x.n, x.m, x.stride, x.coding)
    if not found or jax.tree.structure(found) != jax.tree.structure(x):
        return False
    return all(
        tuple(a.shape) == b.shape and (a.dtype == b.dtype or b is found.values)
        for a, b in zip(parts, jax.tree.leaves(found), strict=True)
    )


def _fits_mask(x: masks.PackedMask) -> bool:
    shape = list(x.shape)
    if x.axis is not None:
        if type(x.axis) is not int or not 0 <= x.axis < len(shape):
            return False
        shape[x.axis] = -(-shape[x.axis] // 8)
    # Axes in front are those of states that jax.vmap has stacked.
    found = x.bits.shape[max(0, len(x.bits.shape) - len(shape)) :]
    dtype = jnp.bool_ if x.axis is None else jnp.uint8
    return list(found) == shape and x.bits.dtype == dtype


def _is_matrix(layout: formats.Layout) -> bool:
    axes = (*layout.axes, *layout.out_axes)
    parts = () if layout.parts is None else layout.parts
    ints = all(type(n) is int for n in (*layout.shape, *axes, *parts))
    return ints and sorted(axes) == list(range(-len(layout.shape), 0))


@functools.lru_cache
def _expected_blocks(layout: formats.Layout, values: tuple[int, ...]) -> Any:
    *leading, capacity, rows, cols = values
    structure = structures.Block(rows, cols, layout.axes, layout.out_axes)
    batch = layout.stack(tuple(leading))
    return _packed(layout, batch, jnp.float32, structure, capacity=capacity)


@functools.lru_cache
def _expected_bitmap(layout: formats.Layout, values: tuple[int, ...]) -> Any:
    *leading, capacity = values
    structure = structures.Unstructured()
    batch = layout.stack(tuple(leading))
    return _packed(layout, batch, jnp.float32, structure, capacity=capacity)


@functools.lru_cache
def _expected_nm(
    layout: formats.Layout,
    batch: tuple[int, ...],
    n: int,
    m: int,
    stride: int,
    coding: str,
) -> Any:
    structure = structures.NM(n, m, layout.axes, stride)
    # The values may have become others since, as the moments of an optimizer are.
    dtype = jnp.bfloat16 if coding == "words" else jnp.float32
    return _packed(layout, batch, dtype, structure)


def _packed(
    layout: formats.Layout,
    batch: tuple[int, ...],
    dtype: Any,
    structure: Any,
    **options: Any,
) -> Any:
    """What `pack` gives, or `None` where it gives an error."""
    shape, options = (*batch, *layout.shape), {**options, "parts": layout.parts}
    w, mask = (jax.ShapeDtypeStruct(shape, t) for t in (dtype, jnp.bool_))
    try:
        return jax.eval_shape(
            lambda w, mask: formats.pack(w, mask, structure, **options), w, mask
        )
    except Exception:  # of whatever kind: no such leaf can have been packed
        return None
