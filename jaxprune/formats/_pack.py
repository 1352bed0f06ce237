"""From a weight and its mask to the format of its structure, and back."""

import dataclasses
import functools
from typing import overload

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Bool, Shaped

from jaxprune import masks
from jaxprune.formats import _bitmap, _block_sparse, _layout, _nm, _shards
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


@unpack.register(BlockSparseArray)
@unpack.register(NMArray)
@unpack.register(BitmapArray)
def _unpack(packed):
    return _unpacked(packed, _shards.of_packed(packed))


@functools.partial(jax.jit, static_argnums=1)
def _unpacked(packed, place: _shards.Place | None):
    def leaf(packed):
        # In a shard, of the layout that it has there.
        local = place.local(packed.layout) if place else packed.layout
        packed = dataclasses.replace(packed, layout=local)
        if isinstance(packed, NMArray):
            return local.leaf(packed.dense())
        of = _bitmap if isinstance(packed, BitmapArray) else _block_sparse
        return local.leaf(local.join(of.matrices(_shards.plain(packed))))

    if place is None:
        return leaf(packed)
    packed = jax.tree.map(lambda x: place.put(x, place.packed), packed)
    return place.run(leaf, (place.packed,), place.leaf)(packed)


@overload
def pack(
    w: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | masks.PackedMask,
    structure: Block,
    *,
    capacity: int | None = None,
    parts: tuple[int, int] | None = None,
) -> BlockSparseArray: ...


@overload
def pack(
    w: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | masks.PackedMask,
    structure: NM,
    *,
    parts: tuple[int, int] | None = None,
) -> NMArray: ...


@overload
def pack(
    w: Shaped[Array, "... K N"],
    mask: Bool[Array, "... K N"] | masks.PackedMask,
    structure: Unstructured | Channel,
    *,
    capacity: int | None = None,
    parts: tuple[int, int] | None = None,
) -> BitmapArray: ...


def pack(
    w: Shaped[Array, "..."],
    mask: Bool[Array, "..."] | masks.PackedMask,
    structure: Structure,
    *,
    capacity: int | None = None,
    parts: tuple[int, int] | None = None,
) -> BlockSparseArray | NMArray | BitmapArray:
    """Packs a weight without its zeros.

    `Block` gives a `BlockSparseArray`, `NM` an `NMArray`; `Unstructured` and `Channel` give
    a `BitmapArray`.

    A weight that is sharded along K or N is packed in parts, a shard each, and its arrays
    are sharded as it was: nothing moves between devices. Two things call for an explicit
    reshard, which makes an axis whole on every device first: shards that do not hold whole
    groups of N:M or whole blocks, and shards along any but the first of several axes that
    are flattened to K or to N. Under `jax.jit` this is so on explicit meshes; on auto
    meshes shardings are not known there, and XLA decides what is moved.

    Args:
      w: the weight, `[..., K, N]`; other layouts by the axes of a `Block` or `NM`.
      mask: True where a weight is kept, packed to bits or not.
      structure: decides the format. A block is stored whole if anything in it is kept,
        and a block that reaches over the edge of the matrix is padded. Of every group of
        `NM(n, m)` the mask may keep up to `n`; under `jax.jit` more give values of NaN, or
        are lost if the weights are integers. The last group of a column may be padded.
      capacity: blocks, or weights of a bitmap, that there is room for, in each of stacked
        matrices and each part; by default as many as the mask keeps. Under `jax.jit` it
        must be given, and a mask that keeps more gives values of NaN (integers: the
        least there is). Not for `NM`, which has room for `n` of each group.
      parts: into how many parts K and N are divided; by default as many as there are
        shards. The same parts are the same arrays on any number of devices.

    Raises:
      ValueError: if mask and weight do not match, the mask keeps more than `capacity` or
        more than `n` of a group, the parts do not divide the matrix, or it is none.
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
    how, axes, unit = _read(structure, w)
    if isinstance(how, NM) and capacity is not None:
        raise ValueError(
            f"capacity: got {capacity} for {structure}, which always keeps as many; "
            "expected None. Leave it out."
        )
    place, layout = _shards.of_leaf(w, _layout.of(w.shape, *axes), parts, unit)
    if place:
        w, mask = place.put(w, place.leaf), place.put(mask, place.leaf)
    capacity = _checked(_most(mask, how, layout, place), capacity, how, structure)
    packed = _packed(w, mask, how, layout, capacity, place)
    return dataclasses.replace(packed, layout=layout)


def _read(structure: Structure, w: Array):
    """The structure without axes; the axes of K and N; rows and columns that go together."""
    shape = w.shape
    if isinstance(structure, Block):
        rows, cols = structure.rows, structure.cols
        return Block(rows, cols), structure.matrix_axes("w", shape), (rows, cols)
    if isinstance(structure, NM):
        if not any(jnp.issubdtype(w.dtype, t) for t in (jnp.floating, jnp.integer)):
            raise TypeError(
                f"w: its type is {w.dtype}; expected floating-point numbers or integers."
            )
        how = NM(int(structure.n), int(structure.m), stride=int(structure.stride))
        return how, structure.matrix_axes("w", shape), (how.m * how.stride, 1)
    if isinstance(structure, Unstructured | Channel):
        if len(shape) < 2:
            raise ValueError(
                f"w: its shape is {shape}; expected two or more axes, [..., K, N]. "
                "Reshape it to a matrix."
            )
        k = len(shape) - 2
        return Unstructured(), ((k,), (k + 1,)), (1, 1)
    raise TypeError(
        f"structure: got {structure!r}; expected Block, NM, Unstructured or Channel, the "
        "structures that have a format."
    )


def _checked(most: Array, capacity: int | None, how, structure: Structure) -> int:
    """The capacity, if it is large enough; `n` of N:M."""
    known = not isinstance(most, core.Tracer)
    if isinstance(how, NM):
        if known and most > how.n:
            raise ValueError(
                f"mask: it keeps {most} weights of a group of {how.m}; expected at most "
                f"{how.n}, as {structure} says. Make the mask with this structure."
            )
        return how.n
    things = "blocks" if isinstance(how, Block) else "weights"
    if capacity is None:
        if not known:
            raise ValueError(
                f"capacity: got None under jax.jit, where the number of {things} is not "
                f"known; expected an int, the most {things} that a mask may keep."
            )
        return max(1, int(most))
    if known and most > capacity:
        raise ValueError(
            f"capacity: got {capacity}, but the mask keeps {most} {things}; expected at "
            "least as many. Leave capacity= out, or prune more."
        )
    return capacity


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _most(mask, how, layout: _layout.Layout, place: _shards.Place | None):
    """What a capacity must hold: the most that any matrix, or group of N:M, keeps."""

    def count(mask):
        local = place.local(layout) if place else layout
        matrices = local.split(local.to_matrix(mask))
        if isinstance(how, Block):
            return _block_sparse.kept(matrices, (how.rows, how.cols))
        if isinstance(how, NM):
            return _nm.kept(matrices, how)
        return _bitmap.kept(matrices)

    if place:
        count = place.run(count, (place.leaf,), place.packed)
    return jnp.max(count(mask), initial=0)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _packed(w, mask, how, layout, capacity, place):
    """The packed matrices, of the layout of a part."""

    def shard(w, mask):
        local = place.local(layout) if place else layout
        w, mask = (local.split(local.to_matrix(x)) for x in (w, mask))
        if isinstance(how, Block):
            size = how.rows, how.cols
            return _block_sparse.pack_matrices(w, mask, size, capacity)
        if isinstance(how, NM):
            return _nm.pack_matrices(w, mask, how)
        return _bitmap.pack_matrices(w, mask, capacity)

    if place:
        shard = place.run(shard, (place.leaf, place.leaf), place.packed)
    return shard(w, mask)
