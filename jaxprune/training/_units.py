"""What methods that prune whole units share: their scores, their choice, their masks."""

import functools
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune import _prune, _select, _tree, _wide
from jaxprune._groups import Groups
from jaxprune._tree import PyTree
from jaxprune._wide import Wide
from jaxprune.allocation import exact
from jaxprune.training import _target
from jaxprune.training._method import MethodState, arrays, finite, replace_masks

Criterion = Literal["norm", "mean_norm", "cosine", "taylor", "taylor2"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
_TINY = 1e-8


class Parts(NamedTuple):
    """Sums over units, each float32 [units of all groups].

    Attributes:
      squares: of the weights.
      slopes: of the gradients, squared.
      products: of weights and gradients.
    """

    squares: Array
    slopes: Array
    products: Array


def joined(groups: Groups, by_name: dict[str, Array]) -> Array:
    """Numbers of all units in one array, group behind group."""
    return jnp.concatenate([by_name[g.name] for g in groups.groups])


def split(groups: Groups, units: Array) -> dict[str, Array]:
    """Numbers of units by name of their group."""
    ends = np.cumsum([g.size for g in groups.groups])[:-1]
    parts = jnp.split(units, ends)
    return {g.name: x for g, x in zip(groups.groups, parts, strict=True)}


def total(groups: Groups, tree: PyTree) -> Float[Array, "units"]:
    """Sums over the slices of every unit; what is not finite counts as 0."""
    clean = _tree.map_leaves(
        lambda x: finite(x.astype(jnp.promote_types(x.dtype, jnp.float32))), tree
    )
    return joined(groups, groups.sums(clean))


def dot(groups: Groups, a: PyTree, b: PyTree) -> Float[Array, "units"]:
    """Inner products of the slices of every unit, in float32."""
    wide = jnp.float32
    return total(
        groups,
        _tree.map_leaves(lambda x, y: finite(x).astype(wide) * finite(y), a, b),
    )


def saliency(
    groups: Groups, params: PyTree, grads: PyTree, criteria: Sequence[Criterion]
) -> Float[Array, "units"]:
    """The sum of criteria, each divided by its norm over all units; more is kept."""
    size = jnp.asarray(joined_counts(groups, params), jnp.float32)
    norm = jnp.sqrt(dot(groups, params, params))
    slope = jnp.sqrt(dot(groups, grads, grads))
    product = dot(groups, params, grads)
    found = {
        "norm": lambda: norm,
        "mean_norm": lambda: norm / size,
        "cosine": lambda: 1 - product / (norm + _TINY) / (slope + _TINY),
        "taylor": lambda: jnp.abs(product),
        "taylor2": lambda: jnp.square(product) / 2,
    }
    return functools.reduce(operator.add, (normalized(found[c]()) for c in criteria))


def normalized(x: Array) -> Array:
    """`x` divided by its norm, and by its largest entry first, against overflow."""
    x = x / (jnp.max(jnp.abs(x)) + jnp.finfo(x.dtype).tiny)
    return x / (jnp.linalg.norm(x) + _TINY)


def joined_counts(groups: Groups, params: PyTree) -> np.ndarray:
    """Weights of each unit."""
    found = groups.weights(params)
    return np.concatenate([found[g.name] for g in groups.groups])


def removed(groups: Groups, sparsity: float | Fraction) -> int:
    """How many units go, rounded half up; one of each group must be able to stay."""
    everything = sum(g.size for g in groups.groups)
    number = int(exact(sparsity) * everything + Fraction(1, 2))
    most = everything - len(groups.groups)
    if number > most:
        raise ValueError(
            f"sparsity: {sparsity} of {everything} units are {number}; expected at most "
            f"{most}, so that each of the {len(groups.groups)} groups keeps one. Prune "
            "less, or leave groups out."
        )
    return number


def lowest(
    groups: Groups, scores: Array, number: Wide | int, gone: Array | bool = False
) -> Bool[Array, "units"]:
    """The `number` units of the lowest scores, first of all those that are `gone`.

    The best unit of each group stays. Ties go to the lower number; NaN loses.
    """
    scores = jnp.where(gone, -jnp.inf, jnp.nan_to_num(scores, nan=-3e38))
    best = jnp.concatenate(
        [jnp.arange(len(x)) == jnp.argmax(x) for x in split(groups, scores).values()]
    )
    scores = jnp.where(best, jnp.inf, scores)
    if isinstance(number, int):
        number = _wide.from_int(number)
    kept = _wide.subtract(_wide.from_int(scores.size), number)
    (cut,) = _select.cuts([_select.stored(scores)], [kept], [0])
    return ~_select.keep_stored(scores, cut)


def draw(
    state: MethodState, groups: Groups, gone: Array, params: PyTree
) -> MethodState:
    """The state with masks of the units that are not gone."""
    found = groups.masks(params, split(groups, ~gone))
    return replace_masks(state, arrays(found), params)


def all_masks(params: PyTree) -> PyTree:
    """Masks that prune nothing."""
    return _tree.map_leaves(lambda x: jnp.ones_like(x, bool), params)


def scaled(groups: Groups, params: PyTree, going: Array, factor: Array) -> PyTree:
    """The weights, those of units that are going times a factor."""
    kept = groups.masks(params, split(groups, ~going))
    return _tree.map_leaves(
        lambda w, k: jnp.where(k, w, (factor * w).astype(w.dtype)), params, kept
    )


def none(groups: Groups) -> Bool[Array, "units"]:
    """No unit."""
    return jnp.zeros(sum(g.size for g in groups.groups), bool)


def check_criteria(criteria: Sequence[Criterion]) -> tuple[Criterion, ...]:
    """Raises `ValueError` unless they are names of criteria, each once."""
    found = tuple(criteria)
    if not found or set(found) - set(CRITERIA) or len(set(found)) < len(found):
        raise ValueError(
            f"criteria: got {criteria!r}; expected some of {', '.join(CRITERIA)}, each "
            "once."
        )
    return found


def check_groups(groups: object) -> None:
    """Raises `TypeError` unless they are `Groups`."""
    if not isinstance(groups, Groups):
        raise TypeError(
            f"groups: got a {type(groups).__name__}; expected jaxprune.Groups. Take "
            "jaxprune.structured.trace(fn, params, *args).as_groups()."
        )


def check_steps(begin: int, end: int, least: int, why: str) -> None:
    """Raises unless both are whole steps, and `end` comes `least` steps behind `begin`."""
    _target.whole_step("begin", begin)
    _target.whole_step("end", end)
    _prune.require("begin", begin, lambda x: x >= 0, "a step of at least 0")
    if end - begin < least:
        raise ValueError(
            f"end: got {end} with begin={begin}; expected at least {begin + least}, {why}."
        )
