"""HESSO: redundant units fade out while the others train (Chen et al., arXiv 2409.09085)."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxprune import _prune, _wide
from jaxprune._groups import Groups
from jaxprune._tree import PyTree
from jaxprune.training import _target, _units
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    mask_gradients,
    masked_view,
    start,
)


class HessoState(NamedTuple):
    """What HESSO keeps beside masks.

    Attributes:
      redundant: the units that go, those that are gone among them; groups stand one
        behind another.
    """

    redundant: Bool[Array, "units"]


def hesso(
    groups: Groups,
    sparsity: float | Fraction,
    *,
    begin: int,
    end: int,
    periods: int = 10,
    criteria: Sequence[_units.Criterion] = _units.CRITERIA,
) -> Method:
    r"""Chooses redundant units, and lets them fade linearly to zero as training goes on.

    The steps from `begin` to `end` are divided into `periods`. At the begin of each, the
    units of the lowest scores join the redundant ones, `K / periods` of all `K` that are
    to go; units of all groups are compared. With `r` steps left in the period, each step
    of the optimizer is followed by::

        w <- r / (r + 1) w

    for the weights of redundant units, which still take that step, so that a weight
    without gradient falls on a straight line to 0; then they are masked for good. All
    other weights take the optimizer's steps and nothing else.

    The score is the sum of up to five criteria, each divided by its l2 norm over all
    units: with `x` the weights of a unit and `g` their gradient::

        norm |x|, mean_norm |x| / size, cosine 1 - x·g / (|x| |g|), taylor |x·g|,
        taylor2 (x·g)² / 2.

    Read for this: the abstract and introduction, and the authors' code (hesso.py of
    only_train_once). Differences from the code: gradients are those of the loss, there
    the optimizer's preconditioned direction; the cosine has the sign of their DHSPG, so
    that a unit which the gradient drives to zero is redundant, whereas in hesso.py it
    scores high; a period uses all of its steps, there all but the first; numbers kept
    are not rounded to a multiple, one unit of each group always stays, and the count is
    exact. `size` counts the weights of a unit once for each of its slices.

    Args:
      groups: the coupled groups; leaves without a member are not masked. The authors'
        groups are `graph.as_groups(readers=False)`.
      sparsity: share of all units that is pruned at `end`, in [0, 1).
      begin: step of the first choice.
      end: step at which the last of them are masked.
      periods: how often units are chosen; 10 as in the authors' examples, where their
        code has 1 by default.
      criteria: what the score is made of.

    Raises:
      ValueError: if a value is out of range, or the groups do not fit the parameters.
      TypeError: if `groups` are no `Groups`.

    Example:
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
      >>> groups = jp.Groups.along({"hidden": {"up": 1, "down": 0}}, params)
      >>> tx = jp.masked(optax.adamw(1e-3), jp.hesso(groups, 0.5, begin=100, end=500))

    References:
      Chen et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network
      Training and Pruning, arXiv 2409.09085; github.com/microsoft/only_train_once.
    """
    _units.check_groups(groups)
    criteria = _units.check_criteria(criteria)
    _target.whole_step("periods", periods)
    _prune.require("periods", periods, lambda x: x >= 1, "at least one period")
    _units.check_steps(begin, end, periods, "a step for each period")
    number = _units.removed(groups, sparsity)
    # Step of each choice, and how many are redundant from there on.
    bounds = [begin + (end - begin) * p // periods for p in range(periods + 1)]
    counts = [number * (p + 1) // periods for p in range(periods)]

    def init(params: PyTree) -> MethodState:
        groups.check(params)
        own = HessoState(_units.none(groups))
        return start(_units.all_masks(params), params, own)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def draw(state: MethodState) -> MethodState:
            return _units.draw(state, groups, state.own.redundant, params)

        def choose(state: MethodState) -> MethodState:
            scores = _units.saliency(groups, params, grads, criteria)
            period = jnp.searchsorted(jnp.asarray(bounds[:-1]), step)
            wanted = jax.tree.map(lambda x: x[period], _wide.from_ints(counts))
            gone = state.own.redundant
            found = _units.lowest(groups, scores, wanted, gone)
            return state._replace(own=HessoState(found | gone))

        state = advance(grads, state, params)
        ends, begins = (_is_any(step, x) for x in (bounds[1:], bounds[:-1]))
        state = lax.cond(ends, draw, lambda s: s, state)
        return lax.cond(begins, choose, lambda s: s, state)

    def project(new: PyTree, state: MethodState, old: PyTree) -> PyTree:
        del old
        step = state.step - 1  # of this update
        left = jnp.min(jnp.where(jnp.asarray(bounds) > step, jnp.asarray(bounds), end))
        factor = fade(left - step)
        return _units.scaled(groups, new, state.own.redundant, factor)

    return Method(
        init, update, mask_gradients, project, masked_view, where=groups.paths
    )


def fade(left: Array) -> Array:
    """What a weight is multiplied with, `left` steps before its last."""
    left = jnp.maximum(left, 0).astype(jnp.float32)
    return left / (left + 1)


def _is_any(step: Array, steps: Sequence[int]) -> Array:
    return jnp.any(step == jnp.asarray(steps))
