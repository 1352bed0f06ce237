"""Prune-and-grow: what all methods share whose masks move at constant sparsity."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float, Key, UInt32

from jaxprune import _prune, _select, _wide, masks, schedules
from jaxprune._tree import PyTree
from jaxprune._wide import Wide
from jaxprune.structures import NM, Structure, Unstructured
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    arrays,
    mask_gradients,
    masked_view,
    replace_each,
    start,
)
from jaxprune.training._target import Target

# Scores of growth end here: those of a whole leaf still add up in float32.
_MOST = 1e19

# (grads of a leaf, key of leaf and step) -> what its scores of growth are made of
Growth: TypeAlias = Callable[[Array, Key[Array, ""]], Array]


def regrowing(
    target: Target,
    key: Key[Array, ""],
    drop: float,
    score: _prune.Score,
    growth: Growth,
) -> Method:
    """Random masks at first; then every update exchanges a share of each leaf's weights.

    The share falls from `drop` to 0 on half a cosine over the target's schedule.
    """
    check_drop(drop)
    steps = target.schedule
    exchanged = schedules.cosine(0.0, steps.begin, steps.end, steps.every, drop)
    keys = KeyCarrier(key)

    def init(params: PyTree) -> MethodState:
        return start(target.first(params, keys.at(-1)), params, keys.data)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step, paths = state.step, target.plan(params).paths
        drawn = keys.at(step, state.own)

        def exchange_some(i, mask, w, g):
            grown = growth(g, jax.random.fold_in(drawn, i))
            share = exchanged(step)
            return exchange(paths[i], target.structure, mask, w, score, grown, share)

        new = advance(grads, state, params)
        due = steps.due(step)
        return replace_each(new, params, due, exchange_some, arrays(grads))

    return Method(init, update, mask_gradients, None, masked_view)


def exchange(
    path: str,
    structure: Structure,
    found: Bool[Array, "..."],
    w: Array,
    score: _prune.Score,
    growth: Array,
    share: Float[Array, ""],
) -> Bool[Array, "..."]:
    """Drops the smallest active weights of a leaf and grows as many others.

    A unit that was just dropped may grow again. With `NM` single weights are dropped, and
    each group fills up from its own members.

    Args:
      path: of the leaf.
      structure: what is kept or pruned as one; the number of units stays.
      found: the mask.
      w: weights, whose magnitude decides what is dropped.
      score: elementwise score of what grows, read from `growth`.
      growth: an array of the leaf's shape.
      share: of the active units, how many are exchanged; rounded half up.
    """
    plan = _prune.Plan((path,), structure, (), (0,))
    kept = _active_units(structure, path, found)
    dropping, active = plan, kept
    if isinstance(structure, NM):
        dropping = _prune.Plan(plan.paths, Unstructured(), (), plan.groups)
        active = masks.count_leaf(found)
    left = _wide.subtract(active, _wide.share(active, share))
    (stay,) = largest(dropping, [left], [w], [found])
    stay &= found  # NaN ranks below what is pruned: nothing may stay that was not there
    (grown,) = _prune.decide(
        plan, [kept], lambda x, m: above_all(score(x), m), [(growth, stay)]
    )
    return grown


def above_all(scores: Array, mask: Bool[Array, "..."]) -> Array:
    """`scores`, and infinity for what `mask` keeps; no sum of the others is infinite."""
    most = min(float(jnp.finfo(scores.dtype).max), _MOST)
    return jnp.where(mask, jnp.inf, jnp.minimum(scores, most))


def largest(
    plan: _prune.Plan,
    kept: Sequence[Wide],
    weights: Sequence[Array],
    found: Sequence[Bool[Array, "..."]],
) -> list[Bool[Array, "..."]]:
    """Masks of the largest weights among those that `found` keeps."""
    leaves = list(zip(weights, found, strict=True))
    return _prune.decide(plan, kept, _active_magnitude, leaves)


def check_drop(drop: float) -> None:
    """Raises `ValueError` unless `drop` is a share."""
    wanted = (
        "the share of active weights that an update exchanges, in [0, 1]; 0.3 is usual"
    )
    _prune.require("drop", drop, lambda x: 0 <= x <= 1, wanted)


class KeyCarrier:
    """A key that travels in a state as plain integers, which every checkpoint can hold."""

    def __init__(self, key: Key[Array, ""]):
        if not jnp.issubdtype(getattr(key, "dtype", jnp.int32), jax.dtypes.prng_key):
            raise TypeError(
                f"key: got {key!r}; expected one made by jax.random.key(0)."
            )
        with jax.ensure_compile_time_eval():
            data = jax.random.key_data(key)
        # On the host: a state may be donated, the caller's key may not.
        self._data = data if isinstance(data, core.Tracer) else np.asarray(data)
        self._impl = jax.random.key_impl(key)

    @property
    def data(self) -> UInt32[Array, " words"]:
        """What a state keeps."""
        return jnp.asarray(self._data)

    def at(self, step: Array | int, data: Array | None = None) -> Key[Array, ""]:
        """The key of a step; -1 is for the initial masks."""
        data = self.data if data is None else data
        key = jax.random.wrap_key_data(data, impl=self._impl)
        return jax.random.fold_in(key, jnp.asarray(step) + 1)


def _active_units(structure: Structure, path: str, mask) -> Wide:
    """Units kept; with `NM` the groups that do not obey."""
    unit = structure.scored(path, lambda m: m.astype(jnp.float32), mask)
    return _select.count(unit.score(*unit.operands), lambda x: x > 0)


def _active_magnitude(w: Array, mask: Bool[Array, "..."]) -> Array:
    return jnp.where(mask, jnp.abs(w), -1)
