"""Masks chosen once, by a score or by chance, and perhaps let go of again."""

from fractions import Fraction

from jax import lax
from jaxtyping import Array, Key

from jaxprune import _prune, scores
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
    replace_masks,
    start,
)
from jaxprune.training._prune_grow import KeyCarrier


def static(
    sparsity: float | Fraction | None = None,
    *,
    key: Key[Array, ""] | None = None,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
    until: int | None = None,
) -> Method:
    """Masks chosen from the initial weights or at random, and kept.

    With a key this is static sparse training: random masks, in wide networks near dense
    where `allocation="erk"` divides them well. With a key and `until` it is sparse
    pre-training and dense fine-tuning in one run (SPDF).

    Args:
      sparsity: share of the weights to prune, in [0, 1); may be left out with `NM`.
      key: draws the masks at random, instead of by score.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.
      until: step from which all weights are kept; those pruned so far start from 0, with
        fresh moments. `None` keeps the masks for good.

    Raises:
      ValueError: if the sparsity is missing or outside [0, 1), or contradicts the
        structure.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> state = jp.masked(optax.sgd(0.1), jp.static(0.5)).init(params)
      >>> jp.get_masks(state)["kernel"].tolist()
      [[True, False], [False, True]]

    References:
      Liu et al., The Unreasonable Effectiveness of Random Pruning, arXiv 2202.02643.
      Thangarasa et al., SPDF: Sparse Pre-training and Dense Fine-tuning for Large
      Language Models, arXiv 2303.10464, section 2.
    """
    target = _target.fixed(sparsity, structure, allocation)
    if key is not None:
        KeyCarrier(key)  # refuses what is no key
    if until is not None:
        _target.whole_step("until", until)
    if until is not None and until < 1:
        raise ValueError(f"until: got {until}; expected a step of at least 1, or None.")

    def init(params: PyTree) -> MethodState:
        return start(target.first(params, key, score), params)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        state = advance(grads, state, params)
        if until is None:
            return state
        return lax.cond(
            step == until,
            lambda s: replace_masks(s, all_kept(params), params),
            lambda s: s,
            state,
        )

    return Method(init, update, mask_gradients, None, masked_view)
