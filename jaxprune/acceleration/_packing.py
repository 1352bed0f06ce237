"""Which formats a mask allows, and a leaf in one of them."""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune.formats import BitmapArray, BlockSparseArray, Layout, NMArray, pack
from jaxprune.structures import NM, Block, Unstructured

Packed: TypeAlias = BlockSparseArray | NMArray | BitmapArray
Axes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]

BLOCKS = (256, 128, 64, 32)  # that a mask is looked through for
_GROUPS = (2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Packing:
    """A format for a leaf.

    Attributes:
      structure: without axes.
      capacity: of blocks or weights that the fullest matrix of a stack keeps.
      axes: of the leaf that are K and N, counted from the end.
    """

    structure: Block | NM | Unstructured
    capacity: int | None
    axes: Axes

    @property
    def name(self) -> str:
        """For reports."""
        match self.structure:
            case Block(rows, cols):
                return f"Block({rows}, {cols})"
            case NM(n, m):
                return f"NM({n}, {m})"
        return "Bitmap"

    def __call__(self, leaf: Array, mask: Array | np.ndarray) -> Packed:
        """The leaf in this format."""
        return _packed(self, leaf, jnp.asarray(mask))

    def shapes(self, leaf: jax.ShapeDtypeStruct | Array) -> Packed:
        """The leaf in this format, without numbers in it."""
        return _shapes(self, tuple(leaf.shape), np.dtype(leaf.dtype))


def _packed(packing: Packing, leaf: Array, mask: Array) -> Packed:
    structure, capacity = packing.structure, packing.capacity
    k_axes, n_axes = packing.axes
    if isinstance(structure, Block):
        block = dataclasses.replace(structure, axis=k_axes, out_axis=n_axes)
        return pack(leaf, mask, block, capacity=capacity)
    # The others are packed from a matrix [..., K, N].
    layout = layout_of(leaf.shape, packing.axes)
    w, mask = layout.to_matrix(leaf), layout.to_matrix(mask)
    if isinstance(structure, NM):
        packed = pack(w, mask, structure)
    else:
        packed = pack(w, mask, structure, capacity=capacity)
    layout = dataclasses.replace(layout, parts=packed.layout.parts)
    return dataclasses.replace(packed, layout=layout)


@functools.lru_cache(512)
def _shapes(packing: Packing, shape: tuple[int, ...], dtype: np.dtype) -> Packed:
    def array(shape, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    if isinstance(packing.structure, Block):
        # Spelled out, since a mask is looked through for blocks of several sizes.
        layout, block = layout_of(shape, packing.axes), packing.structure
        places = *shape[: -len(layout.shape)], packing.capacity
        values = array((*places, block.rows, block.cols), dtype)
        place = array(places)
        return BlockSparseArray(values, place, place, place, layout)
    leaf, mask = array(shape, dtype), array(shape, np.bool_)
    return jax.eval_shape(functools.partial(_packed, packing), leaf, mask)


def layout_of(shape: tuple[int, ...], axes: Axes) -> Layout:
    """The layout of a leaf of this shape."""
    k_axes, n_axes = axes
    batch = len(shape) - len(k_axes) - len(n_axes)
    return Layout(tuple(shape[batch:]), k_axes, n_axes)


def allowed(mask: np.ndarray, orders: list[Axes]) -> list[Packing]:
    """The formats that hold all that the mask keeps.

    Blocks in all sizes that are no larger than the matrix; N:M along K for groups of 2, 4,
    8 and 16, if the mask leaves out a larger share of each group than of a smaller one; and
    bitmaps, which hold any pattern.

    Args:
      mask: of a leaf.
      orders: its axes K and N. Where it is contracted over either, both orders.
    """
    # [..., K, N]
    layout = layout_of(mask.shape, orders[0])
    matrix: Any = mask
    matrix = layout.to_matrix(matrix).reshape(-1, *layout.matrix)
    k, n = layout.matrix
    found = [
        Packing(Block(size, size), _most_blocks(matrix, size), orders[0])
        for size in BLOCKS
        if size <= min(k, n)
    ]
    for i, axes in enumerate(orders):
        groups = _groups(matrix.swapaxes(1, 2) if i else matrix)
        found += [Packing(structure, None, axes) for structure in groups]
    most = max(1, int(matrix.sum((1, 2)).max(initial=0)))
    return [*found, Packing(Unstructured(), most, orders[0])]


def _most_blocks(matrix: np.ndarray, size: int) -> int:
    """Blocks with a weight in them, in the fullest matrix: stacked ones are as long."""
    number, k, n = matrix.shape
    matrix = np.pad(matrix, ((0, 0), (0, -k % size), (0, -n % size)))
    split = matrix.reshape(number, -1, size, matrix.shape[2] // size, size)
    return max(1, int(split.any((2, 4)).sum((1, 2)).max(initial=0)))


def _groups(matrix: np.ndarray) -> list[NM]:
    """Of each size of groups the fewest weights that hold what is kept of every group."""
    found, least = [], 1.0
    number, k, n = matrix.shape
    for m in _GROUPS:
        padded = np.pad(matrix, ((0, 0), (0, -k % m), (0, 0)))
        kept = padded.reshape(number, -1, m, n).sum(2, np.uint8).max(initial=0)
        kept = max(1, int(kept))
        if m <= k and kept / m < least:
            least = kept / m
            found.append(NM(kept, m))
    return found


def name_of(packed: Packed) -> str:
    """The `name` of the packing that gave it."""
    match packed:
        case BlockSparseArray():
            rows, cols = packed.block
            return f"Block({rows}, {cols})"
        case NMArray():
            return f"NM({packed.n}, {packed.m})"
    return "Bitmap"
