"""One network for many tasks: a mask for each, and weights that earlier ones own."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _tree, masks
from jaxprune._tree import PyTree
from jaxprune.training._dense import hold_others, map_learning
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    masked_view,
    packed_masks,
    start,
)


def task(found: PyTree, *, earlier: Sequence[PyTree] = ()) -> Method:
    """Trains a task under its own masks, and leaves what earlier tasks use as it is.

    The forward pass sees the weights of this task's masks, shared ones among them. Only
    those that no earlier task uses learn; all others keep their value to the bit, so that
    earlier tasks answer as before. The weights are dense behind the mask: take
    `jaxprune.sparse_params`, and for an old task `jaxprune.masks.apply(params, its masks)`.

    Biases and other leaves without a mask are trained: freeze or split them by task, as
    heads are. The masks come from any method that prunes and grows, such as
    `jaxprune.rigl` run on the task; keep them packed (`jaxprune.masks.pack`), one tree a
    task.

    Args:
      found: masks of this task, packed or not.
      earlier: masks of the tasks before it.

    Raises:
      ValueError: if masks do not match the parameters, or a task has a mask for a leaf
        that this one does not prune.
      TypeError: if `earlier` is no sequence.

    Example:
      >>> mask = {"kernel": jnp.array([[True, True], [False, False]])}
      >>> used = {"kernel": jnp.array([[True, False], [False, False]])}
      >>> tx = jp.masked(optax.sgd(1.0), jp.training.task(mask, earlier=[used]))
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> (updates["kernel"] != 0).tolist()
      [[False, True], [False, False]]

    References:
      After Sokar et al., SpaceNet: Make Free Space For Continual Learning,
      arXiv 2007.07617, and Yildirim et al., Continual Learning with Dynamic Sparse
      Training, arXiv 2308.14831; how masks of new tasks are grown is up to the caller.
    """
    if not isinstance(earlier, Sequence):
        raise TypeError(
            f"earlier: got a {type(earlier).__name__}; expected a sequence of masks, a tree "
            "for each earlier task. Write [masks] for a single one."
        )

    def init(params: PyTree) -> MethodState:
        mine, taken = _by_path(found), [_by_path(m) for m in earlier]
        paths = [p for p in _tree.paths(params) if p in mine]
        for path in [*mine, *(p for m in taken for p in m if p not in mine)]:
            if path not in paths:
                raise ValueError(
                    f"masks: a task has a mask for {path}, which this one does not prune, so "
                    "that it would train freely. Give it a mask in every task, and select "
                    "it by where=."
                )
        if not paths:
            raise ValueError(
                "found: every leaf is None, so that nothing would be masked. Give the "
                "masks of this task, as jaxprune.get_masks finds them."
            )
        _, leaves, treedef = _tree.flatten(params)
        names = _tree.flatten(params)[0]
        bools = {
            p: (jnp.copy(mine[p]), _learns(mine[p], [m.get(p) for m in taken]))
            for p in paths
        }
        tree, own = (
            treedef.unflatten([bools[p][k] if p in bools else None for p in names])
            for k in (0, 1)
        )
        for path, leaf in zip(names, leaves, strict=True):
            if path in bools and bools[path][1].shape != leaf.shape:
                raise ValueError(
                    f"masks: {path} has shape {tuple(bools[path][1].shape)}; expected that of "
                    f"the weights, {tuple(leaf.shape)}."
                )
        return start(tree, params, packed_masks(masks.pack(own)))

    def gradients(grads: PyTree, state: MethodState, params: PyTree) -> PyTree:
        return map_learning(
            lambda g, _, __, learns: jnp.where(masks.as_bool(learns), g, 0),
            grads, params, state,
        )  # fmt: skip

    return Method(init, advance, gradients, hold_others, masked_view, dense=True)


def _by_path(found: PyTree) -> dict[str, Array]:
    names, leaves, _ = _tree.flatten(masks.unpack(found))
    return {p: m for p, m in zip(names, leaves, strict=True) if not _tree.is_hole(m)}


def _learns(mask: Array, others: Sequence[Array | None]) -> Array:
    """What no earlier task uses; one without a mask uses everything."""
    mask = jnp.copy(mask)  # a state may be donated
    for other in others:
        mask = mask & (False if other is None else ~other)
    return mask
