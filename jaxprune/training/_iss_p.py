"""ISS-P: iterative soft shrinkage (Wang et al., arXiv 2303.09650)."""

from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _prune, _tree, masks, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.structures import Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    all_kept,
    mask_gradients,
    masked_view,
    packed_masks,
    replace_masks,
    start,
)


def iss_p(
    sparsity: float | Fraction | None = None,
    *,
    begin: int = 0,
    end: int,
    every: int = 1,
    alpha: float = 0.95,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """Shrinks the unimportant weights a little at each step, until the mask is drawn.

    From `begin` on, the weights that would be pruned are multiplied by `alpha` after each
    step of the optimizer, which they still take; which ones they are is decided anew. At
    `end` they are pruned, and the others train on.

    `alpha=0` is iterative hard thresholding, `alpha=1` dense training up to `end`.

    Differences from the authors' code: the weights to shrink are picked before the
    optimizer's step, there after it; `end` is given, there it follows from a counter.

    Args:
      sparsity: share of the weights that shrink; may be left out with `NM`.
      begin: step of the first shrinking.
      end: step at which the mask is drawn.
      every: steps between two choices of the weights that shrink.
      alpha: factor of a step, in [0, 1].
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> method = jp.iss_p(0.9, end=5000)

    References:
      Wang et al., Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution,
      arXiv 2303.09650, section 3.
    """
    _prune.require("alpha", alpha, lambda x: 0 <= x <= 1, "a factor in [0, 1]")
    _target.whole_step("end", end)
    target = _target.fixed(
        sparsity, structure, allocation, begin=begin, end=end, every=every
    )

    def init(params: PyTree) -> MethodState:
        target.plan(params)  # a leaf that does not fit is refused here
        everything = _target.scaffold(params, all_kept(params))
        state = start(everything, params)
        return state._replace(own=jax.tree.map(jnp.copy, packed_masks(state.masks)))

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def choose(state: MethodState) -> MethodState:
            found = target.decide(params, step, score)
            state = lax.cond(
                step == end,
                lambda s: replace_masks(s, found, params),
                lambda s: s,
                state,
            )
            spared = [
                masks.repack(m, like) for m, like in zip(found, state.own, strict=True)
            ]
            return state._replace(own=spared)

        state = advance(grads, state, params)
        return lax.cond(target.schedule.due(step), choose, lambda s: s, state)

    def shrink(new: PyTree, state: MethodState, old: PyTree) -> PyTree:
        del old
        spared = iter(state.own)
        return _tree.map_leaves(
            lambda w: jnp.where(
                masks.as_bool(next(spared)), w, (alpha * w).astype(w.dtype)
            ),
            new,
        )

    return Method(init, update, mask_gradients, shrink, masked_view)
