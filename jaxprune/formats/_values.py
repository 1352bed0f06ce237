"""The numbers of packed leaves, to be trained on their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from jaxprune import _tree
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.formats._bitmap import BitmapArray
from jaxprune.formats._block_sparse import BlockSparseArray
from jaxprune.formats._nm import NMArray
from jaxprune.formats._pack import unpack


def values(params: PyTree) -> PyTree:
    """The parameters, with the values of a packed leaf in place of it.

    This is what an optimizer gets: its state is as large as the values, and the places,
    which are integers without a gradient, are none of its business.

    Args:
      params: parameters of which some leaves are packed, as of `jaxprune.accelerate`.

    Example:
      >>> w = jnp.eye(4)
      >>> params = {"kernel": jp.formats.pack(w, w != 0, jp.Block(2, 2))}
      >>> trained = jp.formats.values(params)
      >>> trained["kernel"].shape
      (2, 2, 2)
      >>> again = jp.formats.with_values(params, trained)
      >>> (jp.formats.unpack(again["kernel"]) == w).all().item()
      True
    """
    return jax.tree.map(
        lambda x: x.values if _is_packed(x) else x, params, is_leaf=_is_packed
    )


def with_values(params: PyTree, new: PyTree) -> PyTree:
    """The parameters with other values, the packed leaves where they were.

    Args:
      params: parameters of which some leaves are packed.
      new: what `values` gave for them, or what became of that.

    Raises:
      ValueError: if values of a packed leaf have another shape than its own.
    """
    return jax.tree.map(_with, params, new, is_leaf=_is_packed)


def value_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Which of the `values` are kept by the masks of the leaves.

    Blocks are stored whole if anything in them is kept, and a group of N:M that keeps fewer
    than N is filled up with zeros. With these masks, `jaxprune.masked` trains what is kept
    and leaves the rest 0.

    Args:
      params: parameters of which some leaves are packed.
      masks: of the leaves as they are unpacked: in the tree of `params`, `None` where
        nothing is pruned; packed to bits or not.

    Returns:
      Masks in the tree of `values(params)`, `None` where there is none.

    Raises:
      ValueError: if a mask has another shape than its leaf, or keeps weights that the
        packed leaf does not hold.

    Example:
      >>> w = jnp.eye(4)
      >>> params, masks = {"kernel": w}, {"kernel": w != 0}
      >>> packed = {"kernel": jp.formats.pack(w, w != 0, jp.Block(2, 2))}
      >>> tx = jp.masked(optax.adam(0.1), jp.formats.value_masks(packed, masks))
      >>> state = tx.init(jp.formats.values(packed))
    """
    plain = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_packed(x) else x,
        params, is_leaf=_is_packed,
    )  # fmt: skip
    paths, leaves, treedef = _tree.flatten(params, is_leaf=_is_packed)
    found = treedef.flatten_up_to(mask_trees.check(plain, masks))
    return treedef.unflatten(map(_value_mask, paths, leaves, found))


def _value_mask(path: str, leaf: Any, mask: Any) -> Any:
    if _tree.is_hole(mask) or not _is_packed(leaf):
        return mask
    mask = mask_trees.as_bool(mask)
    found, missing = _values_of(leaf, mask)
    if not isinstance(missing, core.Tracer) and missing > 0:
        raise ValueError(
            f"masks: that of {path} keeps {missing} weights that its packed leaf has no "
            "values for; expected none. Pack the leaf with this mask."
        )
    return found


def _values_of(packed, mask):
    """Where the values stand, the mask; and what it keeps beside them."""

    def matrix(values):
        return unpack(dataclasses.replace(packed, values=values))

    # `matrix` is linear: its transpose takes from each place of the matrix.
    values = jnp.ones_like(packed.values, jnp.float32)
    held, pull = jax.vjp(matrix, values)
    (found,) = pull(mask.astype(jnp.float32))
    return found > 0, jnp.sum(mask & (held == 0), dtype=jnp.int32)


def _with(x: Any, new: Any) -> Any:
    if not _is_packed(x):
        return new
    if jnp.shape(new) != x.values.shape:
        raise ValueError(
            f"new: a packed leaf gets values of shape {jnp.shape(new)}; expected "
            f"{x.values.shape}. Make them with jaxprune.formats.values."
        )
    return dataclasses.replace(x, values=new)


def _is_packed(x: object) -> bool:
    return isinstance(x, BlockSparseArray | NMArray | BitmapArray)
