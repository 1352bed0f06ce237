"""Gradual magnitude pruning, and masks that are chosen once (arXiv 1710.01878)."""

from collections.abc import Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import _prune, _wide, masks, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation, exact
from jaxprune.schedules import Schedule, cubic
from jaxprune.structures import NM, Structure, Unstructured
from jaxprune.training._masked import advance
from jaxprune.training._method import (
    Method,
    MethodState,
    arrays,
    mask_gradients,
    replace_masks,
    start,
)


def static(
    sparsity: float | Fraction | None = None,
    *,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """Masks chosen from the initial weights, and never changed.

    Args:
      sparsity: share of the weights to prune, in [0, 1); may be left out with `NM`.
      score: elementwise score of a weight array; higher is kept. For random masks make
        them with `jaxprune.prune(params, s, score=jaxprune.scores.random(params,
        key=key))` and pass them to `masked`.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> state = jp.masked(optax.sgd(0.1), jp.static(0.5)).init(params)
      >>> jp.get_masks(state)["kernel"].tolist()
      [[True, False], [False, True]]
    """
    if sparsity is not None:
        exact(sparsity)

    def init(params: PyTree) -> MethodState:
        plan = _prune.plan(
            params, sparsity=sparsity, structure=structure, allocation=allocation
        )
        kept = [_wide.from_int(k) for k in plan.kept]
        found = iter(_prune.decide(plan, kept, score, [(x,) for x in arrays(params)]))
        return start(jax.tree.map(lambda _: next(found), params), params)

    return Method(init, advance, mask_gradients, None, masks.apply)


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
    if isinstance(sparsity, Schedule):
        if (begin, end, every, initial) != (0, None, 1, 0.0):
            raise ValueError(
                "sparsity: got a Schedule together with begin, end, every or initial; the "
                "schedule holds those. Leave them out, or give sparsity as a number."
            )
        schedule = sparsity
    else:
        if sparsity is None and isinstance(structure, NM):
            sparsity = 1 - Fraction(structure.n, structure.m)
        if end is None:
            raise ValueError(
                "end: got None; expected the step of the last mask update, as in "
                "gmp(0.9, begin=200, end=800, every=20)."
            )
        if sparsity is None:
            raise ValueError(
                "sparsity: got None; expected the share to prune in the end, as in "
                "gmp(0.9, end=800). With a mapping as allocation it is what leaves get that "
                "match no pattern."
            )
        schedule = cubic(exact(sparsity), begin, end, every, exact(initial, "initial"))
    exact(schedule.final, "sparsity")
    exact(schedule.initial, "initial")

    def plans(params: PyTree) -> tuple[_prune.Plan, _prune.Plan]:
        # A mapping says what its leaves end with, not what they begin with.
        first = "uniform" if isinstance(allocation, Mapping) else allocation
        return (
            _prune.plan(
                params, sparsity=schedule.initial, structure=structure, allocation=first
            ),
            _prune.plan(
                params,
                sparsity=schedule.final,
                structure=structure,
                allocation=allocation,
            ),
        )

    def decide(params: PyTree, fraction) -> list:
        first, last = plans(params)
        kept = [
            _wide.interpolate(a, b, fraction)
            for a, b in zip(first.kept, last.kept, strict=True)
        ]
        return _prune.decide(last, kept, score, [(x,) for x in arrays(params)])

    def init(params: PyTree) -> MethodState:
        plans(params)  # a leaf that does not fit is refused here
        if schedule.initial == 0:
            return start(jax.tree.map(lambda x: jnp.ones_like(x, bool), params), params)
        found = iter(decide(params, schedule.fraction(-1)))
        return start(jax.tree.map(lambda _: next(found), params), params)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        return lax.cond(
            schedule.due(step),
            lambda s: replace_masks(s, decide(params, schedule.fraction(step)), params),
            lambda s: s,
            advance(grads, state, params),
        )

    return Method(init, update, mask_gradients, None, masks.apply)
