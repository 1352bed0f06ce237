"""Soft top-k masks by regularised transportation (Spartan, arXiv 2205.14107)."""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import _prune, _select, _tree, masks, schedules
from jaxprune._select import Scored, scored
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.schedules import Schedule
from jaxprune.structures import NM, Structure, Unstructured
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
    straight_through,
)

_ROUNDS = 30  # passes of the search for the offset, at most
_MASS = 1e-5  # by which share of the budget the masks may miss it


class SoftTopKState(NamedTuple):
    """What the soft mask is made of, beside the masks.

    Attributes:
      offsets: `mu` of each leaf; +inf where nothing is pruned.
      beta: sharpness.
      hard: whether the masks are final.
    """

    offsets: list[Float[Array, ""]]
    beta: Float[Array, ""]
    hard: Bool[Array, ""]


def soft_top_k(
    sparsity: float | Fraction | Schedule | None = None,
    *,
    begin: int = 0,
    end: int | None = None,
    harden: int,
    every: int = 1,
    beta: float = 20.0,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
) -> Method:
    """Soft top-k: masks of the right mass that sharpen to the k largest weights.

    `m = sigmoid(beta |w| + mu)`, with the one `mu` for which the masks sum to the budget.
    The forward pass sees `w m` for the k largest weights and 0 for the others. The
    gradient is that of `w m` for all of them, through `mu` as well. `beta` rises on a
    straight line from 1 at `begin` to its final value at `harden`, the sparsity from 0 at
    `begin` to its own at `end`. At `harden` the weights take up the soft masks, the masks
    stand still, and what is kept trains on. The weights are dense behind the mask: the
    loss must see `jaxprune.sparse_params`, whose derivative is taken in reverse mode.

    While masks are soft, what is kept shrinks too: weights small against `1 / beta` to
    about the density of their size. Of blocks and channels the mean magnitude takes the
    place of the magnitude. Differences
    from the authors' code: `mu` is found by a bracketed Newton search to a 10**-5 of the
    budget, there by Sinkhorn steps to a hundredth; the frozen soft masks go into the
    weights at `harden`, there at the end of training.

    Args:
      sparsity: at the end, in [0, 1), or a `Schedule`, which then holds begin, end and
        every.
      begin: step at which pruning sets in.
      end: step at which the final sparsity is reached; in the paper a fifth of the run.
      harden: step from which masks are hard; in the paper four fifths of the run.
      every: steps between two decisions of masks and `mu`; each step in the paper.
      beta: final sharpness, per unit of weight.
      structure: what is kept or pruned as one; not `NM`.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a schedule is given twice, `end` is missing, or a value is out of
        range.

    Example:
      >>> method = jp.soft_top_k(0.9, end=2000, harden=8000)

    References:
      Tai, Tian & Lim, Spartan: Differentiable Sparsity via Regularized Transportation,
      arXiv 2205.14107, section 3.
    """
    _prune.require(
        "beta", beta, lambda x: 0 < x < math.inf, "a sharpness above 0, such as 20"
    )
    if isinstance(structure, NM):
        raise ValueError(
            f"structure: got {structure}; expected Unstructured, Block or Channel, since "
            "the budget is one of whole leaves. For N:M take pdp or sr_ste."
        )
    target = _target.rising(
        sparsity, structure, allocation, begin=begin, end=end, every=every,
        initial=0.0, method="soft_top_k", ramp=schedules.linear,
    )  # fmt: skip
    ramp = target.schedule
    due = _target.until_hard(ramp, harden)
    sharpness = schedules.linear(beta, ramp.begin, harden, 1, min(1.0, beta))
    shared = allocation == "global"

    def solve(params: PyTree, step, sharp) -> list[Array]:
        """The offset of each leaf."""
        plan = target.plan(params)
        values = [
            _values(structure, p, w)
            for p, w in zip(plan.paths, arrays(params), strict=True)
        ]
        found = [
            _offset(some, kept.to_float(), sharp)
            for some, kept in zip(
                _grouped(values, shared), target.kept(params, step), strict=True
            )
        ]
        return [jnp.copy(found[g]) for g in plan.groups]  # a state may be donated

    def init(params: PyTree) -> MethodState:
        state = start(target.first(params), params)
        sharp = sharpness(0)
        own = SoftTopKState(solve(params, -1, sharp), sharp, jnp.bool_(False))
        return state._replace(own=own)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step

        def decide(state: MethodState) -> MethodState:
            plan, kept = target.plan(params), target.kept(params, step)
            means = [
                (_scaled(structure, p, w),)
                for p, w in zip(plan.paths, arrays(params), strict=True)
            ]
            found = _prune.decide(plan, kept, jnp.abs, means)
            state = replace_masks(state, found, params)
            sharp = sharpness(step)
            own = SoftTopKState(solve(params, step, sharp), sharp, step >= harden)
            return state._replace(own=own)

        return lax.cond(due(step), decide, lambda s: s, advance(grads, state, params))

    def take_up(new: PyTree, state: MethodState, old: PyTree) -> PyTree:
        """At `harden` the weights become what the forward pass saw of them."""
        del old

        paths, weights = _tree.paths(new), arrays(new)
        found: list[Array] = []
        for group, mu in _groups(len(paths), shared, state.own):  # one branch for each

            def weigh(ws, mu, beta, group=group):
                return _weigh(structure, paths[group], ws, mu, beta)

            due = state.step == harden
            operands = weights[group], mu, state.own.beta
            found += lax.cond(due, weigh, lambda ws, *_: ws, *operands)
        seen = iter(found)
        return _tree.map_leaves(lambda w: next(seen), new)

    view = _View(structure, shared)
    return Method(init, update, all_gradients, take_up, view, dense=True)


@dataclasses.dataclass(frozen=True)
class _View:
    """`w m` for the k largest weights, with the gradient of `w m` for all."""

    structure: Structure
    shared: bool

    def __hash__(self) -> int:
        return hash((type(self.structure), self.shared))  # axes may be a mapping

    def __call__(self, params: PyTree, state: MethodState) -> PyTree:
        own: SoftTopKState = state.own
        paths, weights = _tree.paths(params), arrays(params)
        packed = packed_masks(state.masks)
        found: list[Array] = []
        for group, mu in _groups(len(paths), self.shared, own):

            def hard(ws, keeps, mu, beta):
                del mu, beta
                return _kept(ws, keeps)

            def soft(ws, keeps, mu, beta, group=group):
                us = _weigh(self.structure, paths[group], ws, mu, beta)
                seen = _kept(us, keeps)
                return [straight_through(*xs) for xs in zip(us, seen, strict=True)]

            operands = weights[group], packed[group], mu, own.beta
            found += either(own.hard, hard, soft, *operands)
        new = iter(found)
        return _tree.map_leaves(lambda w: next(new), params)


def _kept(ws: Sequence[Array], packed: Sequence[masks.PackedMask]) -> list[Array]:
    keeps = map(masks.as_bool, packed)
    return [jnp.where(keep, w, 0) for keep, w in zip(keeps, ws, strict=True)]


def _groups(
    count: int, shared: bool, own: SoftTopKState
) -> list[tuple[slice, Float[Array, ""]]]:
    """The leaves that share an offset, and it."""
    if shared:
        return [(slice(None), own.offsets[0])]
    return [(slice(i, i + 1), own.offsets[i]) for i in range(count)]


def _weigh(
    structure: Structure,
    paths: Sequence[str],
    weights: Sequence[Array],
    mu: Array,
    beta: Array,
) -> list[Array]:
    """`w m`, whose gradient takes into account that the masks keep their mass."""
    values = [
        _score(_values(structure, p, w)) for p, w in zip(paths, weights, strict=True)
    ]
    offset = _attached(mu, beta, values)
    soft = [
        structure.spread(p, jax.nn.sigmoid(beta * x + offset), w)
        for p, x, w in zip(paths, values, weights, strict=True)
    ]
    return [softly(w, m) for w, m in zip(weights, soft, strict=True)]


@jax.custom_vjp
def _attached(mu: Array, beta: Array, values: list[Array]) -> Array:
    """`mu`, with the derivative that the mass of the masks gives it."""
    del beta, values
    return mu


def _attached_forward(mu, beta, values):
    return mu, (mu, beta, values)


def _attached_backward(residuals, g):
    mu, beta, values = residuals

    def slope(x):
        return _slope(beta * x + mu)

    total = sum(_total(scored(slope, x), jnp.add, 0) for x in values)
    factor = -g * beta / jnp.where(total > 0, total, 1)
    return jnp.zeros_like(mu), jnp.zeros_like(beta), [factor * slope(x) for x in values]


_attached.defvjp(_attached_forward, _attached_backward)


def _values(structure: Structure, path: str, w: Array) -> Scored:
    """Magnitudes, of blocks and channels their means, in float32."""
    unit = structure.scored(path, _magnitude, w)
    share = structure.units(path, w) / max(w.size, 1)
    return scored(lambda *xs: unit.score(*xs) * share, *unit.operands)


def _score(x: Scored) -> Array:
    return x.score(*x.operands)


def _total(x: Scored, combine, initial: float, f=lambda x: x) -> Array:
    return _select.reduced(
        scored(lambda *xs: f(x.score(*xs)), *x.operands), combine, initial
    )


def _scaled(structure: Structure, path: str, w: Array) -> Array:
    """Weights whose sums over a block or channel are the means of `w`."""
    share = structure.units(path, w) / max(w.size, 1)
    return w if share == 1 else _wide(w) * share


def _magnitude(w: Array) -> Array:
    return _wide(jnp.where(jnp.isfinite(w), jnp.abs(w), 0))


def _wide(w: Array) -> Array:
    return w.astype(jnp.promote_types(w.dtype, jnp.float32))


def _grouped(values: list[Scored], shared: bool) -> list[list[Scored]]:
    return [values] if shared else [[x] for x in values]


def _slope(x: Array) -> Array:
    """Derivative of the logistic function."""
    m = jax.nn.sigmoid(x)
    return m * (1 - m)


def _offset(values: Sequence[Scored], mass: Array, beta: Array) -> Array:
    """The `mu` for which `sigmoid(beta x + mu)` sums to `mass`; +inf if that is all."""
    size = sum(jax.eval_shape(x.score, *x.operands).size for x in values)
    if not size:
        return jnp.float32(jnp.inf)
    share = mass / size
    middle = jnp.log(share) - jnp.log1p(-share)
    most = jnp.stack([_total(x, jnp.maximum, 0) for x in values])
    least = jnp.stack([_total(x, jnp.minimum, jnp.inf) for x in values])
    low, high = middle - beta * jnp.max(most), middle - beta * jnp.min(least)

    def narrow(state):
        low, high, mu, _, i = state
        # Tied to the loop: what does not change in it would be stored in front of it.
        operands, _ = lax.optimization_barrier(([x.operands for x in values], mu))
        tied = [x._replace(operands=o) for x, o in zip(values, operands, strict=True)]

        def soft(x):
            return jax.nn.sigmoid(beta * x + mu)

        def slope_at(x):
            return _slope(beta * x + mu)

        excess = sum(_total(x, jnp.add, 0, soft) for x in tied) - mass
        slope = sum(_total(x, jnp.add, 0, slope_at) for x in tied)
        low, high = jnp.where(excess < 0, mu, low), jnp.where(excess < 0, high, mu)
        newton = mu - excess / jnp.where(slope > 0, slope, 1)
        inside = (newton >= low) & (newton <= high) & (slope > 0)
        return low, high, jnp.where(inside, newton, (low + high) / 2), excess, i + 1

    def unfinished(state):
        *_, excess, i = state
        return (jnp.abs(excess) > _MASS * mass) & (i < _ROUNDS)

    start = (low, high, (low + high) / 2, jnp.full_like(low, jnp.inf), 0)
    mu = lax.while_loop(unfinished, narrow, start)[2]
    return jnp.where(share >= 1, jnp.inf, mu)
