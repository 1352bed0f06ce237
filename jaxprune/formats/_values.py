"""The numbers of packed leaves, to be trained on their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import PyTree
from jaxprune.formats._bitmap import BitmapArray
from jaxprune.formats._block_sparse import BlockSparseArray
from jaxprune.formats._nm import NMArray


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
