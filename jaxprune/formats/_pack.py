"""From a weight and its mask to the format of its structure, and back."""

import functools
from typing import overload

from jaxtyping import Array, Bool, Shaped

from jaxprune import masks
from jaxprune.formats import _bitmap, _block_sparse, _nm
from jaxprune.formats._bitmap import BitmapArray
from jaxprune.formats._block_sparse import BlockSparseArray
from jaxprune.formats._nm import NMArray
from jaxprune.structures import NM, Block, Channel, Structure, Unstructured


@functools.singledispatch
def unpack(packed: BlockSparseArray | NMArray | BitmapArray) -> Shaped[Array, "..."]:
    """The weight with its zeros: `where(mask, w, 0)`, bit for bit.

    Args:
      packed: what `pack` gave.

    Example:
      >>> w = jnp.eye(4)
      >>> packed = jp.formats.pack(w, w != 0, jp.Block(2, 2))
      >>> (jp.formats.unpack(packed) == w).all().item()
      True
    """
    raise TypeError(
        f"packed: got {type(packed).__name__}; expected what jaxprune.formats.pack gives."
    )


unpack.register(BlockSparseArray, _block_sparse.unpack_blocks)
unpack.register(NMArray, _nm.unpack_nm)
unpack.register(BitmapArray, _bitmap.unpack_bitmap)


@overload
def pack(
    w: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | masks.PackedMask,
    structure: Block,
    *,
    capacity: int | None = None,
) -> BlockSparseArray: ...


@overload
def pack(
    w: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | masks.PackedMask,
    structure: NM,
) -> NMArray: ...


@overload
def pack(
    w: Shaped[Array, "... K N"],
    mask: Bool[Array, "... K N"] | masks.PackedMask,
    structure: Unstructured | Channel,
    *,
    capacity: int | None = None,
) -> BitmapArray: ...


def pack(
    w: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | masks.PackedMask,
    structure: Structure,
    *,
    capacity: int | None = None,
) -> BlockSparseArray | NMArray | BitmapArray:
    """Packs a weight without its zeros.

    `Block` gives a `BlockSparseArray`, `NM` an `NMArray`; `Unstructured` and `Channel` give
    a `BitmapArray`.

    Args:
      w: the weight, `[..., K, N]`; other layouts by the axes of a `Block` or `NM`.
      mask: True where a weight is kept, packed to bits or not.
      structure: decides the format. A block is stored whole if anything in it is kept,
        and a block that reaches over the edge of the matrix is padded. Of every group of
        `NM(n, m)` the mask may keep up to `n`; under `jax.jit` more give values of NaN, or
        are lost if the weights are integers. The last group of a column may be padded.
      capacity: blocks, or weights of a bitmap, that there is room for, with stacked
        matrices in each of them; by default as many as the mask keeps. Under `jax.jit` it
        must be given, and a mask that keeps more gives values of NaN (integers: the
        least there is). Not for `NM`, which has room for `n` of each group.

    Raises:
      ValueError: if mask and weight do not match, the mask keeps more than `capacity` or
        more than `n` of a group, or the weight is no matrix.
      TypeError: if there is no format for the structure.

    Example:
      >>> w = jnp.arange(16.0).reshape(4, 4)
      >>> packed = jp.formats.pack(w, w > 9, jp.Block(2, 2))
      >>> packed.values.shape, packed.rows.tolist(), packed.columns.tolist()
      ((2, 2, 2), [1, 1], [0, 1])
    """
    mask = masks.as_bool(mask)
    if mask.shape != w.shape:
        raise ValueError(
            f"mask: its shape is {mask.shape}, that of w is {w.shape}; expected the same. "
            "Make the mask from this weight."
        )
    if isinstance(structure, Block):
        return _block_sparse.pack_blocks(w, mask, structure, capacity)
    if isinstance(structure, NM):
        if capacity is not None:
            raise ValueError(
                f"capacity: got {capacity} for {structure}, which always keeps as many; "
                "expected None. Leave it out."
            )
        return _nm.pack_nm(w, mask, structure)
    if isinstance(structure, Unstructured | Channel):
        return _bitmap.pack_bitmap(w, mask, capacity)
    raise TypeError(
        f"structure: got {structure!r}; expected Block, NM, Unstructured or Channel, the "
        "structures that have a format."
    )
