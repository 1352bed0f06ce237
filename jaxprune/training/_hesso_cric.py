"""HESSO-CRIC: redundant units are tried at zero before they are chosen (arXiv 2409.09085)."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxprune import _prune, _tree
from jaxprune._groups import Groups
from jaxprune._tree import PyTree
from jaxprune.training import _target, _units
from jaxprune.training._hesso import fade
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    mask_gradients,
    masked_view,
    start,
)


class CricState(NamedTuple):
    """What HESSO-CRIC keeps beside masks; groups stand one behind another in arrays.

    Attributes:
      origin: the weights to which each cycle goes back, from the step `begin` on.
      scores: sum of all scores so far, float32 [units].
      samples: how many scores were summed, int32.
      cycle: cycles begun, int32.
      trying: units that fade in this cycle.
      tried: units that have faded in any.
      suspected: units that have been among the lowest and were not tried.
      back: whether this step goes back to `origin`.
      settled: whether the choice is made.
      redundant: the units that go; none before that.
    """

    origin: PyTree
    scores: Float[Array, "units"]
    samples: Int[Array, ""]
    cycle: Int[Array, ""]
    trying: Bool[Array, "units"]
    tried: Bool[Array, "units"]
    suspected: Bool[Array, "units"]
    back: Bool[Array, ""]
    settled: Bool[Array, ""]
    redundant: Bool[Array, "units"]


def hesso_cric(
    groups: Groups,
    sparsity: float | Fraction,
    *,
    begin: int,
    end: int,
    samples: int,
    cycles: int = 10,
    tolerance: int = 0,
    criteria: Sequence[_units.Criterion] = _units.CRITERIA,
) -> Method:
    r"""HESSO whose redundant units have been tried on the way to zero.

    A score that is taken far from zero says little about what the loss of a unit would
    cost. So before the choice come up to `cycles` cycles of `samples` steps each (the
    corrective redundant identification cycle). In the first, the `K` units of the lowest
    scores fade linearly to zero, while scores are taken at every step. Units that come
    among the lowest `K` on the way, and have not been tried, fade in the next cycle. Each
    cycle starts from the weights of the step `begin`. It is over when no more than
    `tolerance` units are left to be tried; then the `K` units of the lowest mean score
    are redundant, training goes on from the weights of `begin`, and they fade until
    `end`, when they are masked.

    The choice falls at `begin + samples · cycles` at the latest; the steps before it
    train only leaves without members and the moments of the optimizer.

    Read for this: the authors' code (hesso_cric.py of only_train_once). Differences, beside
    those of `hesso`: there the mean score of each unit gets, before the cycles, a term for
    how much the loss grows when 25, 50 and 75 % of the units of its group are zero, which
    needs the loss in the optimizer, and is left out; leaves without members hold still
    during cycles there; a cycle's first step, which goes back, is lost here, there the
    step is taken at once from the old weights; at most `cycles` cycles are run, there one
    less.

    Args:
      groups: the coupled groups; leaves without a member are not masked.
      sparsity: share of all units that is pruned at `end`, in [0, 1).
      begin: step at which the first cycle begins.
      end: step at which redundant units are masked.
      samples: steps of a cycle.
      cycles: how many at most; the authors' default.
      tolerance: how many units may be left untried.
      criteria: as in `hesso`.

    Raises:
      ValueError: if a value is out of range, or the groups do not fit the parameters.
      TypeError: if `groups` are no `Groups`.

    Example:
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
      >>> groups = jp.Groups.along({"hidden": {"up": 1, "down": 0}}, params)
      >>> method = jp.hesso_cric(groups, 0.5, begin=100, end=500, samples=20)
      >>> tx = jp.masked(optax.adamw(1e-3), method)

    References:
      Chen et al., HESSO: Towards Automatic Efficient and User Friendly Any Neural Network
      Training and Pruning, arXiv 2409.09085; github.com/microsoft/only_train_once.
    """
    _units.check_groups(groups)
    criteria = _units.check_criteria(criteria)
    for name, value in (("samples", samples), ("cycles", cycles)):
        _target.whole_step(name, value)
        _prune.require(name, value, lambda x: x >= 1, "at least 1")
    _target.whole_step("tolerance", tolerance)
    _prune.require("tolerance", tolerance, lambda x: x >= 0, "at least 0")
    least = samples * cycles + 1
    _units.check_steps(begin, end, least, f"behind {cycles} cycles of {samples} steps")
    number = _units.removed(groups, sparsity)

    def init(params: PyTree) -> MethodState:
        groups.check(params)
        units = [_units.none(groups) for _ in range(4)]
        own = CricState(
            origin=jax.tree.map(jnp.copy, params),
            scores=units[0].astype(jnp.float32),
            samples=jnp.int32(0),
            cycle=jnp.int32(0),
            trying=units[0],
            tried=units[1],
            suspected=units[2],
            back=jnp.bool_(False),
            settled=jnp.bool_(False),
            redundant=units[3],
        )
        return start(_units.all_masks(params), params, own)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def look(own: CricState) -> CricState:
            origin = lax.cond(
                step == begin, lambda a, b: a, lambda a, b: b, params, own.origin
            )
            scores = _units.saliency(groups, params, grads, criteria)
            scores = scores.astype(own.scores.dtype)
            low = _units.lowest(groups, scores, number)
            own = own._replace(
                origin=origin,
                scores=own.scores + scores,
                samples=own.samples + 1,
                back=jnp.bool_(False),
            )
            first = (step - begin) % samples == 0
            own = lax.cond(first, turn, lambda own, low: own, own, low)
            return own._replace(suspected=(own.suspected | low) & ~own.tried)

        def turn(own: CricState, low: Array) -> CricState:
            """The next cycle, or the choice."""
            trying = jnp.where(own.cycle == 0, low, own.suspected & ~own.tried)
            over = (own.cycle > 0) & (jnp.sum(trying) <= tolerance)
            settled = over | (own.cycle >= cycles)
            mean = own.scores / own.samples
            return own._replace(
                cycle=own.cycle + ~settled,
                trying=trying & ~settled,
                tried=own.tried | (trying & ~settled),
                back=own.cycle > 0,
                settled=settled,
                redundant=_units.lowest(groups, mean, number) & settled,
            )

        state = advance(grads, state, params)
        tries = (step >= begin) & ~state.own.settled
        idle = lambda own: own._replace(back=jnp.bool_(False))  # noqa: E731
        state = state._replace(own=lax.cond(tries, look, idle, state.own))
        return lax.cond(
            step == end,
            lambda s: _units.draw(s, groups, s.own.redundant, params),
            lambda s: s,
            state,
        )

    def project(new: PyTree, state: MethodState, old: PyTree) -> PyTree:
        del old
        own: CricState = state.own
        step = state.step - 1
        new = _tree.map_leaves(
            lambda x, x0: jnp.where(own.back, x0, x), new, own.origin
        )
        left = samples - 1 - (step - begin) % samples
        left = jnp.where(own.settled, end - step, left)
        return _units.scaled(groups, new, own.trying | own.redundant, fade(left))

    return Method(
        init, update, mask_gradients, project, masked_view, where=groups.paths
    )
