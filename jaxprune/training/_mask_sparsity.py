"""MaskSparsity: regularises only what is going to be pruned (arXiv 2201.06776)."""

import math
from fractions import Fraction
from typing import Literal

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
    finite,
    masked_view,
    packed_masks,
    replace_masks,
    start,
)


def mask_sparsity(
    sparsity: float | Fraction | None = None,
    *,
    begin: int,
    end: int,
    strength: float = 5e-4,
    penalty: Literal["l1", "l2"] = "l1",
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """Chooses what to prune, drives it to zero with a penalty, and prunes it at the end.

    At `begin` the mask is chosen. Until `end` the gradient of each weight outside it gets
    `strength sign(w)` (or `strength w`), and the others train untouched. At `end` the
    mask that was chosen is applied.

    In the paper the weights are the scales of batch normalisation, one a channel:
    `where="*/scale"`; there the mask comes from an earlier run, in which all scales were
    penalised, and may be any. A channel whose scale is 0 still puts out its bias.

    Args:
      sparsity: share of the weights to prune; may be left out with `NM`.
      begin: step at which the mask is chosen; late enough that the weights say something:
        scales of a fresh network are all 1, and ties go to the lower index.
      end: step at which it is applied.
      strength: of the penalty; the authors' value for ImageNet. It goes through the
        inner optimizer like any gradient.
      penalty: l1, or l2 as an option of the authors' code.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> method = jp.mask_sparsity(0.5, begin=1000, end=5000)
      >>> tx = jp.masked(optax.sgd(0.1), method, where="*/scale")

    References:
      Jiang et al., Pruning-aware Sparse Regularization for Network Pruning,
      arXiv 2201.06776, section 3.
    """
    _prune.require(
        "strength", strength, lambda x: 0 <= x < math.inf, "at least 0, such as 5e-4"
    )
    if penalty not in ("l1", "l2"):
        raise ValueError(f"penalty: got {penalty!r}; expected 'l1' or 'l2'.")
    _target.whole_step("end", end)
    target = _target.fixed(sparsity, structure, allocation, begin=begin, end=end)

    def init(params: PyTree) -> MethodState:
        target.plan(params)  # a leaf that does not fit is refused here
        state = start(_target.scaffold(params, all_kept(params)), params)
        return state._replace(own=jax.tree.map(jnp.copy, packed_masks(state.masks)))

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def choose(state: MethodState) -> MethodState:
            found = target.decide(params, step, score)
            chosen = [
                masks.repack(m, like) for m, like in zip(found, state.own, strict=True)
            ]
            return state._replace(own=chosen)

        def apply(state: MethodState) -> MethodState:
            return replace_masks(state, [masks.as_bool(m) for m in state.own], params)

        state = advance(grads, state, params)
        state = lax.cond(step == begin, choose, lambda s: s, state)
        return lax.cond(step == end, apply, lambda s: s, state)

    def gradients(grads: PyTree, state: MethodState, params: PyTree) -> PyTree:
        chosen = iter(state.own)

        def penalise(g, w, mask):
            pull = jnp.sign(finite(w)) if penalty == "l1" else finite(w)
            pulled = g + (strength * pull).astype(g.dtype)
            pulled = jnp.where(masks.as_bool(next(chosen)), g, pulled)
            return jnp.where(masks.as_bool(mask), pulled, 0)

        return _tree.map_leaves(penalise, grads, params, state.masks)

    return Method(init, update, gradients, None, masked_view)
