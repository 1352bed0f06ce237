"""PDP: parameter-free differentiable pruning (Cho et al., arXiv 2305.11203)."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import _prune, _select, _tree, masks, schedules, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.schedules import Schedule
from jaxprune.structures import NM, Block, Channel, Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    all_gradients,
    arrays,
    either,
    packed_masks,
    replace_masks,
    softly,
    start,
)


class PDPState(NamedTuple):
    """What the soft mask is made of, beside the masks.

    Attributes:
      thresholds: `t**2` for each leaf, float32: one number, with `NM` one a group; -inf
        where nothing is pruned.
      tau: temperature.
      hard: whether the masks are final.
    """

    thresholds: list[Float[Array, "..."]]
    tau: Float[Array, ""]
    hard: Bool[Array, ""]


def pdp(
    sparsity: float | Fraction | Schedule | None = None,
    *,
    begin: int = 0,
    end: int | None = None,
    harden: int,
    every: int = 1,
    tau: float = 1e-4,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
) -> Method:
    """Soft masks made of the weights themselves, without parameters of their own.

    The forward pass sees `w m(w)` with `m = sigmoid((w**2 - t**2) / tau)`, where `t` lies
    halfway between the smallest magnitude kept and the largest pruned. Gradients pass
    through `m` as well, but not through `t`. The sparsity rises on a straight line from
    `begin` to `end`; at `harden` the masks become hard, and what is kept trains on. The
    weights are dense behind the mask: the loss must see `jaxprune.sparse_params`, whose
    derivative is taken in reverse mode.

    Of blocks and channels the norm takes the place of the magnitude; with `NM` each group
    has a `t` of its own. No code of the authors is public. In the paper the share of each
    leaf is fixed by one global sort at the end of a dense warm-up; here `"global"` compares
    magnitudes across leaves at every decision.

    Args:
      sparsity: at the end, in [0, 1), or a `Schedule`, which then holds begin, end and
        every. May be left out with `NM`.
      begin: step at which pruning sets in, after a dense warm-up.
      end: step at which the final sparsity is reached.
      harden: step from which masks are hard and stand still.
      every: steps between two decisions of `t`; the paper decides at each step.
      tau: temperature, in the unit of squared weights.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a schedule is given twice, `end` is missing, or a value is out of
        range.

    Example:
      >>> method = jp.pdp(0.9, begin=1000, end=6000, harden=8000)

    References:
      Cho et al., PDP: Parameter-free Differentiable Pruning is All You Need,
      arXiv 2305.11203, section 3.
    """
    _prune.require(
        "tau", tau, lambda x: 0 < x < math.inf, "a temperature above 0, such as 1e-4"
    )
    target = _target.rising(
        sparsity, structure, allocation, begin=begin, end=end, every=every,
        initial=0.0, method="pdp", ramp=schedules.linear,
    )  # fmt: skip
    ramp = target.schedule
    # The order of units must be that of their soft masks.
    score = _square if isinstance(structure, Block | Channel) else scores.magnitude
    due = _target.until_hard(ramp, harden)

    def init(params: PyTree) -> MethodState:
        plan = target.plan(params)
        state = start(target.first(params), params)
        own = PDPState(
            _thresholds(plan, state, arrays(params)), jnp.float32(tau), jnp.bool_(False)
        )
        return state._replace(own=own)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def decide(state: MethodState) -> MethodState:
            found = target.decide(params, step, score)
            state = replace_masks(state, found, params)
            limits = _thresholds(target.plan(params), state, arrays(params))
            own = PDPState(limits, state.own.tau, step >= harden)
            return state._replace(own=own)

        return lax.cond(due(step), decide, lambda s: s, advance(grads, state, params))

    return Method(init, update, all_gradients, None, _View(structure), dense=True)


@dataclasses.dataclass(frozen=True)
class _View:
    """`w m(w)`, or the hard masks when they are final."""

    structure: Structure

    def __hash__(self) -> int:
        return hash(type(self.structure))  # axes may be given by a mapping

    def __call__(self, params: PyTree, state: MethodState) -> PyTree:
        own: PDPState = state.own
        paths, limits = iter(_tree.paths(params)), iter(own.thresholds)

        def see(w, mask):
            path = next(paths)

            def hard(w, mask, limit, tau):
                del limit, tau
                return jnp.where(masks.as_bool(mask), w, 0)

            def soft(w, mask, limit, tau):
                del mask
                return softly(w, _soft(self.structure, path, w, limit, tau))

            return either(own.hard, hard, soft, w, mask, next(limits), own.tau)

        return _tree.map_leaves(see, params, state.masks)


def _soft(structure: Structure, path: str, w: Array, limit: Array, tau) -> Array:
    """The soft mask of each weight."""
    limit = lax.stop_gradient(limit)
    if isinstance(structure, NM):
        limit = structure.spread(path, limit, w)
        return jax.nn.sigmoid((_square(w) - limit) / tau)
    units = structure.scored(path, _square, jnp.where(jnp.isnan(w), 0, w))
    soft = jax.nn.sigmoid((units.score(*units.operands) - limit) / tau)
    return structure.spread(path, soft, w)


def _thresholds(
    plan: _prune.Plan, state: MethodState, weights: Sequence[Array]
) -> list[Array]:
    """`t**2` of each leaf, from its masks; leaves of a group share one."""
    structure = plan.structure
    bounds = []
    for path, w, m in zip(plan.paths, weights, packed_masks(state.masks), strict=True):
        mask = masks.as_bool(m)
        if isinstance(structure, NM):
            low, high = (
                structure.by_group(path, f, _square(w), mask)
                for f in (
                    lambda x, kept, axis: jnp.max(_if_pruned(x, kept), axis),
                    lambda x, kept, axis: jnp.min(_if_kept(x, kept), axis),
                )
            )
            bounds.append((low, high))
            continue
        units = structure.scored(path, _square, w)
        kept = structure.scored(path, _number, mask)
        split = len(units.operands)

        def among(choose, *xs, units=units, kept=kept, split=split):
            return choose(units.score(*xs[:split]), kept.score(*xs[split:]) > 0)

        low, high = (
            _select.reduced(
                _select.scored(
                    functools.partial(among, choose), *units.operands, *kept.operands
                ),
                combine,
                initial,
            )
            for choose, combine, initial in (
                (_if_pruned, jnp.maximum, -jnp.inf),
                (_if_kept, jnp.minimum, jnp.inf),
            )
        )
        bounds.append((low, high))
    if isinstance(structure, NM):
        return [_between(low, high) for low, high in bounds]
    limits: list[Array] = []
    for group in plan.groups:
        some = [b for b, g in zip(bounds, plan.groups, strict=True) if g == group]
        low = jnp.max(jnp.stack([b[0] for b in some]))
        limits.append(_between(low, jnp.min(jnp.stack([b[1] for b in some]))))
    return limits


def _if_pruned(squares: Array, kept: Array) -> Array:
    return jnp.where(kept | jnp.isnan(squares), -jnp.inf, squares)


def _if_kept(squares: Array, kept: Array) -> Array:
    return jnp.where(kept, squares, jnp.inf)


def _between(low: Array, high: Array) -> Array:
    """Halfway between the magnitudes, squared; -inf where nothing is pruned."""
    halfway = jnp.square((jnp.sqrt(jnp.maximum(low, 0)) + jnp.sqrt(high)) / 2)
    return jnp.where(jnp.isneginf(low), -jnp.inf, halfway)


def _square(w: Array) -> Array:
    return jnp.square(w.astype(jnp.promote_types(w.dtype, jnp.float32)))


def _number(mask: Array) -> Array:
    return mask.astype(jnp.float32)
