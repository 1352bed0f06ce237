"""Mask pytrees: apply, count, pack to bits, compare, summarise, read off a checkpoint.

A mask tree has the structure of the parameters. A leaf is a boolean array of the leaf's
shape, True = keep, or `None` for a leaf, or a whole subtree, that is never pruned; every
function here takes packed leaves as well.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, UInt8

from jaxprune import _axes, _tree, _wide
from jaxprune._tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedMask:
    """A mask of one bit a weight.

    Bit `j` of `bits[..., i, ...]` is the weight at index `8 i + j` of `axis`. The axis is
    one that is whole in every shard, or whose shards hold whole bytes; `axis` is `None`
    and `bits` the plain boolean mask where there is none.
    """

    bits: UInt8[Array, "..."]
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int | None = dataclasses.field(metadata={"static": True})


class Count(NamedTuple):
    """Weights kept, and weights that could have been pruned; Python integers, exact."""

    kept: int
    total: int


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """Sets the pruned weights to zero: `where(mask, w, 0)`, so that a pruned NaN is 0.

    Args:
      params: arrays.
      masks: masks of the same structure, packed or not; `None` leaves a leaf as it is.

    Raises:
      ValueError: if structures or shapes do not match.

    Example:
      >>> jp.masks.apply(jnp.array([1.0, jnp.nan]), jnp.array([True, False])).tolist()
      [1.0, 0.0]
    """
    masks = check(params, masks)
    return _tree.map_leaves(
        lambda w, m: (
            w if _tree.is_hole(m) else jnp.where(as_bool(m), w, jnp.zeros_like(w))
        ),
        params,
        masks,
    )


def count(masks: PyTree) -> Count:
    """Counts kept and maskable weights, exactly and on the host.

    Example:
      >>> jp.masks.count({"w": jnp.array([True, False, True]), "b": None})
      Count(kept=2, total=3)
    """
    leaves = _mask_leaves(masks).values()
    return Count(
        sum(int(count_leaf(m)) for m in leaves), sum(math.prod(m.shape) for m in leaves)
    )


def sparsity(masks: PyTree) -> float:
    """Share of the maskable weights that is pruned, in [0, 1].

    Example:
      >>> jp.masks.sparsity({"w": jnp.array([True, False]), "b": None})
      0.5
    """
    kept, total = count(masks)
    return 1 - kept / total if total else 0.0


def from_params(params: PyTree, where: _tree.Where = None) -> PyTree:
    """Reads masks off parameters that are sparse already: True where a weight is not 0.

    Args:
      params: arrays.
      where: which leaves; see `jaxprune.prune`.

    Example:
      >>> jp.masks.from_params({"kernel": jnp.array([[0.0, 2.0]])})["kernel"].tolist()
      [[False, True]]
    """
    return _tree.map_leaves(lambda w: w != 0, _tree.select(params, where))


def pack(masks: PyTree) -> PyTree:
    """Packs every mask to one bit a weight; see `PackedMask`.

    Example:
      >>> jp.masks.pack(jnp.array([True, False, False, True])).bits.tolist()
      [9]
    """
    _mask_leaves(masks)
    return jax.tree.map(pack_leaf, masks, is_leaf=_is_packed)


def unpack(masks: PyTree) -> PyTree:
    """Undoes `pack`.

    Example:
      >>> jp.masks.unpack(jp.masks.pack(jnp.array([True, False]))).tolist()
      [True, False]
    """
    return jax.tree.map(as_bool, masks, is_leaf=_is_packed)


def flipped(a: PyTree, b: PyTree) -> int:
    """Number of weights on which two mask trees differ, exactly and on the host.

    Example:
      >>> jp.masks.flipped(jnp.array([True, False]), jnp.array([True, True]))
      1
    """
    return sum(int(count_leaf(x ^ y)) for x, y in _pairs(a, b))


def overlap(a: PyTree, b: PyTree) -> float:
    """Jaccard similarity: weights that both keep, over weights that either keeps.

    Example:
      >>> jp.masks.overlap(jnp.array([True, False]), jnp.array([True, True]))
      0.5
    """
    both = either = 0
    for x, y in _pairs(a, b):
        both += int(count_leaf(x & y))
        either += int(count_leaf(x | y))
    return both / either if either else 1.0


def summary(params: PyTree, masks: PyTree) -> str:
    """A table of shape, weights kept and sparsity, leaf by leaf, and in all.

    The last line counts every array, whether it can be pruned or not.

    Example:
      >>> print(jp.masks.summary({"w": jnp.ones(4)}, {"w": jnp.arange(4) < 1}))
      leaf    shape  weights  kept  sparsity
      --------------------------------------
      w       (4,)         4     1   75.00 %
      --------------------------------------
      masked               4     1   75.00 %
      all                  4     1   75.00 %
    """
    masks = check(params, masks)
    paths, leaves, treedef = _tree.flatten(params)
    rows, masked, total, kept = [], 0, 0, 0
    for path, leaf, mask in zip(
        paths, leaves, treedef.flatten_up_to(masks), strict=True
    ):
        if _tree.is_hole(leaf) or not hasattr(leaf, "shape"):
            continue
        size = math.prod(leaf.shape)
        total += size
        if _tree.is_hole(mask):
            rows.append((path, str(tuple(leaf.shape)), f"{size:,}", f"{size:,}", "-"))
            continue
        masked, left = masked + size, int(count_leaf(mask))
        kept += left
        rows.append((path, str(tuple(leaf.shape)), f"{size:,}", *_shares(left, size)))
    rows.append(("masked", "", f"{masked:,}", *_shares(kept, masked)))
    rows.append(("all", "", f"{total:,}", *_shares(total - masked + kept, total)))
    rows.insert(0, ("leaf", "shape", "weights", "kept", "sparsity"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 8)
    return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:]])


def check(params: PyTree, masks: PyTree) -> PyTree:
    """Returns `masks` in the containers of `params`.

    Raises:
      ValueError: naming the path, unless `masks` fits `params`.
    """
    paths, leaves, treedef = _tree.flatten(params)
    masks = _tree.align(masks, params, _is_packed)
    try:
        mask_leaves = treedef.flatten_up_to(masks)
    except ValueError as e:
        raise ValueError(
            "masks: their structure is not that of params. params has the leaves "
            f"{_tree.listing(paths)}; masks has {_tree.listing(_tree.flatten(masks)[0])}. "
            "Make them with jaxprune.prune or jaxprune.masks.from_params on these params."
        ) from e
    for path, leaf, mask in zip(paths, leaves, mask_leaves, strict=True):
        if _tree.is_hole(leaf) or _tree.is_hole(mask):
            continue
        _check_leaf(path, mask)
        if not hasattr(leaf, "shape") or tuple(mask.shape) != tuple(leaf.shape):
            raise ValueError(
                f"masks: {path} has shape {tuple(mask.shape)} but the weight is "
                f"{_describe(leaf)}. Make the masks from these params."
            )
    return masks


def pack_leaf(mask: Bool[Array, "..."] | PackedMask) -> PackedMask:
    """Packs one mask."""
    if isinstance(mask, PackedMask):
        return mask
    shape, axis = tuple(mask.shape), pack_axis(mask)
    return PackedMask(mask if axis is None else _to_bits(mask, axis), shape, axis)


def repack(mask: Bool[Array, "..."], like: PackedMask) -> PackedMask:
    """Packs along the axis of `like`."""
    bits = mask if like.axis is None else _to_bits(mask, like.axis)
    return PackedMask(bits, like.shape, like.axis)


def as_bool(mask: Bool[Array, "..."] | PackedMask) -> Bool[Array, "..."]:
    """The boolean mask of one leaf, packed or not."""
    if not isinstance(mask, PackedMask):
        return mask
    _check_bits(mask)
    if mask.axis is None:
        return mask.bits
    axis, bits = mask.axis, mask.bits
    split = (jnp.expand_dims(bits, axis + 1) >> _places(bits.ndim, axis)) & 1
    whole = (*bits.shape[:axis], bits.shape[axis] * 8, *bits.shape[axis + 1 :])
    return lax.slice_in_dim(split.reshape(whole), 0, mask.shape[axis], axis=axis) != 0


def pack_axis(x: Array) -> int | None:
    """The axis to pack along: least padding, whole bytes in every shard, not the last."""
    shards = _axes.shard_counts(x)
    best = None
    for axis, length in enumerate(x.shape):
        padding = -length % 8
        if shards[axis] > 1 and (padding or (length // 8) % shards[axis]):
            continue
        cost = (
            padding / max(length, 1) > 0.1,
            axis == x.ndim - 1,
            shards[axis] > 1,
            -axis,
        )
        if best is None or cost < best[0]:
            best = (cost, axis)
    return None if best is None else best[1]


def _to_bits(mask: Bool[Array, "..."], axis: int) -> UInt8[Array, "..."]:
    if mask.shape[axis] % 8:
        pads = [(0, 0)] * mask.ndim
        pads[axis] = (0, -mask.shape[axis] % 8)
        mask = jnp.pad(mask, pads)
    groups = _axes.split_axis(mask, axis).astype(jnp.uint8)
    return jnp.sum(groups << _places(mask.ndim, axis), axis + 1, dtype=jnp.uint8)


def _places(ndim: int, axis: int) -> UInt8[Array, "8 ..."]:
    """0 to 7, to stand behind `axis` of an array of `ndim` axes."""
    return jnp.arange(8, dtype=jnp.uint8).reshape(8, *(1,) * (ndim - axis - 1))


def count_leaf(mask: Bool[Array, "..."] | PackedMask) -> _wide.Wide:
    """Weights that one mask keeps."""
    if isinstance(mask, PackedMask) and mask.axis is not None:
        _check_bits(mask)
        return _wide.popcount(mask.bits)
    mask = as_bool(mask)
    return _wide.total(mask.astype(jnp.uint32), mask.size)


def _check_bits(mask: PackedMask) -> None:
    """Raises `ValueError` where bits of several masks stand for one."""
    shape = list(mask.shape)
    if mask.axis is not None:
        shape[mask.axis] = -(-shape[mask.axis] // 8)
    if tuple(mask.bits.shape) != tuple(shape):
        raise ValueError(
            f"masks: packed masks of shape {mask.shape} hold bits of shape "
            f"{tuple(mask.bits.shape)}; expected {tuple(shape)}. States that jax.vmap has "
            "stacked are read with jax.vmap(jaxprune.get_masks)(state), or one by one."
        )


def _is_packed(x) -> bool:
    return isinstance(x, PackedMask)


def _mask_leaves(masks: PyTree) -> dict[str, Array | PackedMask]:
    paths, leaves, _ = _tree.flatten(masks, _is_packed)
    found = {p: x for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)}
    for path, leaf in found.items():
        _check_leaf(path, leaf)
    return found


def _check_leaf(path: str, mask) -> None:
    if not _is_packed(mask) and getattr(mask, "dtype", None) != jnp.bool_:
        raise ValueError(
            f"masks: {path} is {_describe(mask)}; expected a boolean array (True = "
            "keep), a packed mask or None. Turn scores into masks with w != 0."
        )


def _pairs(a: PyTree, b: PyTree) -> list[tuple[Array, Array]]:
    """The boolean masks of two trees, leaf by leaf."""
    first, second = _mask_leaves(a), _mask_leaves(b)
    for path in first | second:
        shapes = [tuple(x[path].shape) if path in x else None for x in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"masks: two trees that do not match: the shapes at {path} are "
                f"{shapes[0]} and {shapes[1]}. Compare masks of the same parameters."
            )
    return [(as_bool(x), as_bool(second[path])) for path, x in first.items()]


def _shares(kept: int, size: int) -> tuple[str, str]:
    return f"{kept:,}", f"{100 * (1 - kept / size) if size else 0:.2f} %"


def _describe(x) -> str:
    if hasattr(x, "dtype"):
        return f"{x.dtype}[{', '.join(map(str, x.shape))}]"
    return f"of type {type(x).__name__}"
