"""DHSPG, the optimizer of OTO: half-space projection of redundant units."""

import math
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from jaxprune import _prune, _tree
from jaxprune._groups import Groups
from jaxprune._tree import PyTree
from jaxprune.training import _units
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    finite,
    mask_gradients,
    masked_view,
    start,
)

_TINY = 1e-8


class DhspgState(NamedTuple):
    """What DHSPG keeps beside masks.

    Attributes:
      redundant: the units that are penalised; groups stand one behind another.
      gone: those of them that have been projected to zero.
    """

    redundant: Bool[Array, "units"]
    gone: Bool[Array, "units"]


def dhspg(
    groups: Groups,
    sparsity: float | Fraction,
    *,
    begin: int,
    end: int,
    penalty: float = 1e-5,
    amplify: float = 20.0,
    largest: float = 1e3,
    epsilon: float = 0.0,
) -> Method:
    r"""Shrinks redundant units by an adaptive group penalty, and projects them to zero.

    At `begin` the redundant units are chosen once: with `x` the weights of a unit and `g`
    their gradient, those of the highest sum of `x·g / (|x| |g|)`, which says that the
    gradient drives the unit to zero, and of `size / |x|`, both divided by their l2 norms
    over all units. From then on each step of the optimizer, which leads from `x` to
    `x - d`, goes on for them with::

        x̂ = x - d - λ x / |x|,      and x <- 0 if x̂·x < ε |x|²,

    where `λ` is `penalty`, but for units whose step leads away from zero, `x·d < 0`::

        lower = -x·d / |x|,  upper = -|d|² |x| / x·d
        λ = clip(amplify lower, penalty, largest penalty), or (lower + upper) / 2 where
            that is not below upper,

    with which the norm falls and `x` still moves along a descent direction, unless the
    clip cuts `λ` short. A unit that was projected stays 0. All other weights take the
    optimizer's steps.

    Read for this: the authors' code of OTOv2 (dhspg.py of only_train_once before it was
    replaced by a version that fades units out as HESSO does); the paper's own text was
    not at hand. Differences: `d` is the whole step of any optimizer, there learning rate
    times preconditioned gradient, so that `penalty` is their `lr · lmbda`, with defaults
    of their adam; what is left of redundant units at `end` is pruned, so that the count
    is exact, there more units than wanted are penalised (`tolerance_group_sparsity`) and
    it stops when enough are zero; one unit of each group stays; numbers kept are not
    rounded to a multiple. OTOv3 (arXiv 2312.09411) erases whole operators under a test
    that the graph stays connected; units of a group cannot disconnect it here.

    Args:
      groups: the coupled groups; leaves without a member are not masked. The authors'
        groups, in which no weight lies twice, are `graph.as_groups(readers=False)`.
      sparsity: share of all units that is pruned at `end`, in [0, 1).
      begin: step at which redundant units are chosen.
      end: step at which what is left of them is pruned.
      penalty: how much the norm of a redundant unit falls a step, at the least. A unit of
        norm `|x|` needs about `|x| / (end - begin)` to be at zero in time.
      amplify: factor on the least `λ` under which the norm falls.
      largest: bound on `λ`, in units of `penalty`.
      epsilon: in [0, 1), how far into its half-space a unit must stay; larger projects
        sooner. Authors' examples have 0.95, their default is 0.

    Raises:
      ValueError: if a value is out of range, or the groups do not fit the parameters.
      TypeError: if `groups` are no `Groups`.

    Example:
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
      >>> groups = jp.Groups.along({"hidden": {"up": 1}}, params)
      >>> tx = jp.masked(optax.sgd(0.1), jp.dhspg(groups, 0.5, begin=100, end=500))

    References:
      Chen et al., OTOv2: Automatic, Generic, User-Friendly, arXiv 2303.06862;
      Chen et al., Only Train Once, arXiv 2107.07467, for the half-space step;
      github.com/tianyic/only_train_once.
    """
    _units.check_groups(groups)
    _units.check_steps(begin, end, 1, "a step to shrink in")
    for name, value in (
        ("penalty", penalty),
        ("amplify", amplify),
        ("largest", largest),
    ):
        _prune.require(name, value, lambda x: 0 < x < math.inf, "a positive number")
    _prune.require("epsilon", epsilon, lambda x: 0 <= x < 1, "a number in [0, 1)")
    number = _units.removed(groups, sparsity)

    def init(params: PyTree) -> MethodState:
        groups.check(params)
        own = DhspgState(_units.none(groups), _units.none(groups))
        return start(_units.all_masks(params), params, own)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def choose(state: MethodState) -> MethodState:
            found = _units.lowest(groups, _scores(groups, params, grads), number)
            return state._replace(own=state.own._replace(redundant=found))

        def draw(state: MethodState) -> MethodState:
            found = _units.draw(state, groups, gone, params)
            return found._replace(own=state.own._replace(gone=gone))

        state = advance(grads, state, params)
        state = lax.cond(step == begin, choose, lambda s: s, state)
        # Units that the last step has projected; at the end, all.
        zero = _units.dot(groups, params, params) == 0
        gone = state.own.redundant & (zero | (step == end))
        new = (step > begin) & (step <= end) & jnp.any(gone & ~state.own.gone)
        return lax.cond(new, draw, lambda s: s, state)

    def project(new: PyTree, state: MethodState, old: PyTree) -> PyTree:
        penalised = state.own.redundant & ~state.own.gone
        moved = _tree.map_leaves(lambda x, y: finite(x) - finite(y), old, new)
        norm = jnp.sqrt(_units.dot(groups, old, old))
        inner, length = (_units.dot(groups, moved, x) for x in (old, moved))
        strength = jnp.where(
            penalised & (norm > 0),
            _strength(norm, inner, length, penalty, amplify, largest),
            0,
        )
        share = strength / jnp.maximum(norm, _TINY)
        along = groups.spread(new, _units.split(groups, share))
        pulled = _tree.map_leaves(
            lambda x, w, s: (x - (s * finite(w))).astype(x.dtype), new, old, along
        )
        falls = _units.dot(groups, pulled, old) < epsilon * jnp.square(norm)
        return _units.scaled(groups, pulled, penalised & falls, jnp.float32(0))

    return Method(
        init, update, mask_gradients, project, masked_view, where=groups.paths
    )


def _scores(groups: Groups, params: PyTree, grads: PyTree) -> Array:
    """Less for units that are small, and that the gradient drives to zero."""
    norm = jnp.sqrt(_units.dot(groups, params, params))
    slope = jnp.sqrt(_units.dot(groups, grads, grads))
    cosine = _units.dot(groups, params, grads) / (norm + _TINY) / (slope + _TINY)
    size = jnp.asarray(_units.joined_counts(groups, params), jnp.float32)
    small = 1 / (norm / size + 1e-6)
    return -_units.normalized(cosine) - _units.normalized(small)


def _strength(
    norm: Array, inner: Array, length: Array, penalty: float, amplify: float,
    largest: float,
) -> Array:  # fmt: skip
    """λ: of weights of this norm, their product with the step, and its square."""
    away = inner < 0
    lower = -inner / jnp.maximum(norm, _TINY)
    upper = length * norm / jnp.where(away, -inner, 1)
    found = jnp.clip(amplify * lower, penalty, largest * penalty)
    found = jnp.where(found >= upper, (lower + upper) / 2, found)
    return jnp.where(away, found, penalty)
