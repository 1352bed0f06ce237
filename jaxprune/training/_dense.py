"""What methods share whose weights stay dense behind the mask."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxprune import _prune, _tree, masks
from jaxprune._tree import PyTree
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    all_gradients,
    masked_view,
    replace_masks,
    start,
)
from jaxprune.training._target import Target

Gradients = Callable[[PyTree, MethodState, PyTree], PyTree]
View = Callable[[PyTree, MethodState], PyTree]


def behind_mask(
    target: Target,
    score: _prune.Score,
    *,
    gradients: Gradients = all_gradients,
    view: View = masked_view,
    own: Callable[[Any], PyTree] = lambda step: (),
) -> Method:
    """Dense weights behind masks that follow their magnitude.

    Args:
      target: counts, and when masks are decided.
      score: elementwise score of a weight array.
      gradients: what the inner optimizer sees.
      view: what the forward pass sees.
      own: what the view reads beside masks, from the step of the forward pass.
    """
    schedule = target.schedule

    def init(params: PyTree) -> MethodState:
        return start(target.first(params, score=score), params, own(0))

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        state = lax.cond(
            schedule.due(step),
            lambda s: replace_masks(s, target.decide(params, step, score), params),
            lambda s: s,
            advance(grads, state, params),
        )
        return state._replace(own=own(state.step))

    return Method(init, update, gradients, None, view, dense=True)


def hold_others(new: PyTree, state: MethodState, old: PyTree) -> PyTree:
    """Only weights that learn move; `state.own` holds their packed masks, by leaf."""
    return map_learning(
        lambda x, y, _, learns: jnp.where(masks.as_bool(learns), x, y), new, old, state
    )


def map_learning(f, tree: PyTree, other: PyTree, state: MethodState) -> PyTree:
    """Maps `f(x, y, mask, learns)` over two trees, the masks, and what learns."""
    learns = iter(state.own)
    return _tree.map_leaves(
        lambda x, y, m: f(x, y, m, next(learns)), tree, other, state.masks
    )
