"""Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878)."""

from fractions import Fraction

from jax import lax

from jaxprune import _prune, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.schedules import Schedule
from jaxprune.structures import Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    mask_gradients,
    masked_view,
    replace_masks,
    start,
)


def gmp(
    sparsity: float | Fraction | Schedule | None = None,
    *,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    initial: float | Fraction = 0.0,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """Gradual magnitude pruning: sparsity rises on a schedule, the smallest weights go.

    At steps `begin, begin + every, ..., end` the masks are decided afresh from the
    weights before the step. The number kept in each leaf moves from what `initial` gives
    it to what `sparsity` gives it, by the cubic of Zhu & Gupta, and is exact at both
    ends. Pruned weights are 0 and get no gradient; a pruned weight can only return if a
    structure or a global threshold makes room for it.

    Args:
      sparsity: at the end, in [0, 1), or a `Schedule` for other curves, which then holds
        begin, end, every and initial. May be left out with `NM`.
      begin: step of the first mask update.
      end: step of the last one.
      every: steps between updates.
      initial: sparsity from the first step on.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one. With `NM` the share of groups that obey
        grows, those that lose least first.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`. With `"erk"`
        the counts move straight from the initial to the final division.

    Raises:
      ValueError: if a schedule is given twice, `end` is missing, or a value is out of
        range.

    Example:
      >>> method = jp.gmp(0.9, begin=200, end=800, every=20)
      >>> method = jp.gmp(0.5, begin=200, end=800, every=20, structure=jp.NM(2, 4))

    References:
      Zhu & Gupta, To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model
      Compression, arXiv 1710.01878, section 3.
    """
    target = _target.rising(
        sparsity, structure, allocation,
        begin=begin, end=end, every=every, initial=initial, method="gmp",
    )  # fmt: skip

    def init(params: PyTree) -> MethodState:
        return start(target.first(params, score=score), params)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        return lax.cond(
            target.schedule.due(step),
            lambda s: replace_masks(s, target.decide(params, step, score), params),
            lambda s: s,
            advance(grads, state, params),
        )

    return Method(init, update, mask_gradients, None, masked_view)
