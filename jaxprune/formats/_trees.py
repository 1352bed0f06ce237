"""Whole trees of parameters, packed leaf by leaf and unpacked again."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Bool

from jaxprune import _tree
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.formats._bitmap import BitmapArray
from jaxprune.formats._block_sparse import BlockSparseArray
from jaxprune.formats._nm import NMArray
from jaxprune.formats._pack import pack, unpack
from jaxprune.structures import NM, Block, Structure, Unstructured

_GROUPS = (2, 4, 8, 16)  # sizes of groups that are looked for
_BLOCKS = (8, 16, 32, 64, 128, 256)  # extents of blocks that are looked for


def pack_tree(
    params: PyTree,
    masks: PyTree,
    structure: Structure | Mapping[str, Structure] | None = None,
) -> PyTree:
    """Packs every leaf that has a mask; the others stay as they are.

    Args:
      params: the weights.
      masks: in the tree of `params`, packed to bits or not; `None` where a leaf stays.
      structure: decides the format of each leaf, see `pack`; or one for each pattern on the
        path, of which the last that matches decides. By default each leaf gets what is
        smallest for its own mask: N:M along the axis -2 if every group keeps to it, with
        groups of 2 to 16; square blocks of 8 to 256; a bitmap; or zeros in the dense
        leaf. That is decided on the host, once for each leaf.

    Returns:
      The tree of `params`, with a `BlockSparseArray`, `NMArray` or `BitmapArray` for each
      packed leaf.

    Raises:
      ValueError: if masks do not fit `params`, a pattern matches nothing, none matches a
        leaf with a mask, or a leaf or mask does not have the structure; or if none is
        given under `jax.jit`.

    Example:
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
      >>> params, masks = jp.prune(params, structure=jp.NM(2, 4))
      >>> packed = jp.formats.pack_tree(params, masks)
      >>> type(packed["kernel"]).__name__, type(packed["bias"]).__name__
      ('NMArray', 'ArrayImpl')
      >>> again = jp.formats.unpack_tree(packed)
      >>> (again["kernel"] == params["kernel"]).all().item()
      True
    """
    paths, leaves, treedef = _tree.flatten(params)
    found = treedef.flatten_up_to(mask_trees.check(params, masks))
    masked = [p for p, m in zip(paths, found, strict=True) if not _tree.is_hole(m)]
    if isinstance(structure, Mapping):
        _tree.check_patterns(masked, structure, name="structure")
    return treedef.unflatten(
        [
            x if _tree.is_hole(x) or _tree.is_hole(m) else _packed(p, x, m, structure)
            for p, x, m in zip(paths, leaves, found, strict=True)
        ]
    )


def unpack_tree(params: PyTree) -> PyTree:
    """Unpacks every packed leaf, to dense weights with zeros.

    Args:
      params: parameters of which some leaves are packed.

    Example:
      >>> w = jnp.eye(4)
      >>> packed = {"kernel": jp.formats.pack(w, w != 0, jp.Block(2, 2)), "bias": w[0]}
      >>> jp.formats.unpack_tree(packed)["kernel"].shape
      (4, 4)
    """
    kinds = BlockSparseArray | NMArray | BitmapArray
    return jax.tree.map(
        lambda x: unpack(x) if isinstance(x, kinds) else x,
        params,
        is_leaf=lambda x: isinstance(x, kinds),
    )


def _packed(path: str, w: Array, mask: Any, structure: Any) -> Any:
    mask = mask_trees.as_bool(mask)
    chosen: Any = structure
    if structure is None:
        chosen = _smallest(w, mask)
    elif isinstance(structure, Mapping):
        chosen = _tree.lookup(path, structure)
        if chosen is None:
            raise ValueError(
                f"structure: no pattern of {dict(structure)} matches {path}, which has a "
                "mask. Add one, such as '*'."
            )
    if chosen is None:
        return jnp.where(mask, w, jnp.zeros_like(w))
    try:
        return pack(w, mask, chosen)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _smallest(w: Array, mask: Bool[Array, "..."]) -> Any:
    """What takes the fewest bytes; `None` is the dense leaf."""
    if isinstance(mask, core.Tracer):
        raise ValueError(
            "structure: got None under jax.jit, where it cannot be looked for; expected "
            "one, or one for each pattern. Pass it, or call this outside of jax.jit."
        )
    best, least = None, w.size * w.dtype.itemsize
    for structure, options in _candidates(w, mask):
        packed = jax.eval_shape(
            lambda w, m, s=structure, o=options: pack(w, m, s, **o), w, mask
        )
        if packed.nbytes < least:
            best, least = structure, packed.nbytes
    return best


def _candidates(
    w: Array, mask: Bool[Array, "..."]
) -> Iterator[tuple[Any, dict[str, int]]]:
    """What fits the mask, and the room it takes."""
    if w.ndim < 2 or not w.size:
        return
    *_, k, n = w.shape
    grouped = any(jnp.issubdtype(w.dtype, t) for t in (jnp.floating, jnp.integer))
    for m in _GROUPS if grouped else ():
        if k % m == 0 and 0 < (most := int(_most_in_group(mask, m))) < m:
            yield NM(most, m), {}
    for extent in _BLOCKS:
        if extent < 2 * min(k, n):
            kept = max(1, int(_most_blocks(mask, extent)))
            yield Block(extent, extent), {"capacity": kept}
    yield Unstructured(), {"capacity": max(1, int(mask.sum((-2, -1)).max()))}


@functools.partial(jax.jit, static_argnums=1)
def _most_in_group(mask: Bool[Array, "... K N"], m: int) -> Array:
    *batch, k, n = mask.shape
    return mask.reshape(*batch, k // m, m, n).sum(-2).max()


@functools.partial(jax.jit, static_argnums=1)
def _most_blocks(mask: Bool[Array, "... K N"], extent: int) -> Array:
    *batch, k, n = mask.shape
    rows, cols = math.ceil(k / extent), math.ceil(n / extent)
    pads = [(0, 0)] * len(batch) + [(0, rows * extent - k), (0, cols * extent - n)]
    blocks = jnp.pad(mask, pads).reshape(*batch, rows, extent, cols, extent)
    return blocks.any((-3, -1)).sum((-2, -1)).max()
