"""Top-KAST: always sparse forward, a wider set backward (arXiv 2106.03517)."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _prune, masks, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation, exact
from jaxprune.structures import NM, Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._dense import hold_others, map_learning
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    finite,
    masked_view,
    packed_masks,
    replace_masks,
    start,
)


def top_kast(
    sparsity: float | Fraction,
    *,
    backward: float | Fraction,
    every: int = 100,
    until: int | None = None,
    decay: float = 1e-4,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """The forward pass sees the largest weights, the backward pass some more.

    Forward the largest weights of each leaf count (set A), and the gradient goes to a
    wider set B; a weight outside B neither learns nor moves, and keeps its value. So the
    weights are dense behind the mask: the loss must see `jaxprune.sparse_params`.

    The exploration regulariser, added to the gradient, is `decay w` on A and
    `decay w / density` on B outside A, where density is that of A in the whole: what is
    not used shrinks, which lets others in.

    No code of the authors is public. Whether moments of weights outside B go on is not
    said; here their gradients are 0 and their updates dropped.

    Args:
      sparsity: share that the forward pass prunes, in [0, 1).
      backward: share that neither pass uses, at most `sparsity`.
      every: steps between two choices of the sets.
      until: step from which B is A: the masks stand still. `None` explores for good.
      decay: strength of the regulariser.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one; not `NM`.
      allocation: how both sparsities are divided among leaves, not as a mapping; see
        `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> method = jp.top_kast(0.9, backward=0.8)

    References:
      Jayakumar et al., Top-KAST: Top-K Always Sparse Training, arXiv 2106.03517,
      sections 2.1 to 2.4.
    """
    forward_share, backward_share = exact(sparsity), exact(backward, "backward")
    if backward_share > forward_share:
        raise ValueError(
            f"backward: got {backward}; expected at most sparsity={sparsity}, since the "
            "backward pass uses all weights of the forward pass, and more."
        )
    if isinstance(structure, NM):
        raise ValueError(
            f"structure: got {structure}; expected Unstructured, Block or Channel, since "
            "N:M does not say which further weights the backward pass uses."
        )
    _prune.refuse_mapping(allocation)
    if until is not None:
        _target.whole_step("until", until)
    if until is not None and until < 0:
        raise ValueError(f"until: got {until}; expected a step, or None.")
    _prune.require(
        "decay", decay, lambda x: 0 <= x < math.inf, "at least 0, such as 1e-4"
    )
    forward = _target.fixed(sparsity, structure, allocation, end=until, every=every)
    wider = _target.fixed(backward, structure, allocation)
    scale = 1 / float(1 - forward_share)

    def init(params: PyTree) -> MethodState:
        used = forward.first(params, score=score)
        # The allocation may give a leaf more weights forward than backward.
        learning = jax.tree.map(jnp.logical_or, used, wider.first(params, score=score))
        return start(used, params, packed_masks(masks.pack(learning)))

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def choose(state: MethodState) -> MethodState:
            state = replace_masks(state, forward.decide(params, step, score), params)
            explores = jnp.bool_(True) if until is None else step < until
            found = [
                masks.as_bool(a) | (b & explores)
                for a, b in zip(
                    packed_masks(state.masks),
                    wider.decide(params, step, score),
                    strict=True,
                )
            ]
            return state._replace(
                own=[
                    masks.repack(m, like)
                    for m, like in zip(found, state.own, strict=True)
                ]
            )

        state = advance(grads, state, params)
        return lax.cond(forward.schedule.due(step), choose, lambda s: s, state)

    def gradients(grads: PyTree, state: MethodState, params: PyTree) -> PyTree:
        def explore(g, w, used, learns):
            w = finite(w)
            pull = decay * jnp.where(masks.as_bool(used), w, scale * w)
            return jnp.where(masks.as_bool(learns), g + pull.astype(g.dtype), 0)

        return map_learning(explore, grads, params, state)

    return Method(init, update, gradients, hold_others, masked_view, dense=True)
