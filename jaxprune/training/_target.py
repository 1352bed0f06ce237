"""How many weights a method keeps at each step, in which structure, and where."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jaxprune import _prune, _wide, schedules, scores
from jaxprune._tree import PyTree
from jaxprune._wide import Wide
from jaxprune.allocation import Allocation, allocate, exact
from jaxprune.schedules import Schedule
from jaxprune.structures import NM, Structure
from jaxprune.training._method import arrays

FOREVER = 2**31 - 2  # the last step that an int32 can count on from


@dataclasses.dataclass(frozen=True)
class Target:
    """Counts that move from those of an initial sparsity to those of a final one.

    Attributes:
      schedule: when masks are decided, and how far the way is gone.
      initial: sparsity at first; `None` for counts that stand still.
      final: sparsity in the end; `None` where structure or allocation say it.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves.
    """

    schedule: Schedule
    initial: Fraction | None
    final: Fraction | None
    structure: Structure
    allocation: Allocation

    def plan(self, params: PyTree) -> _prune.Plan:
        """What stays in the end; refuses leaves that do not fit."""
        return self._plan(params, self.final, self.allocation)

    def kept(self, params: PyTree, step: Int[Array, ""] | int) -> list[Wide]:
        """Units kept in each group of the plan at a step."""
        last = self.plan(params).kept
        if self.initial is None:
            return [_wide.from_int(k) for k in last]
        # A mapping says what its leaves end with, not what they begin with; and at 0 there
        # is nothing to divide.
        fixed = isinstance(self.allocation, Mapping) or (
            callable(self.allocation) and self.initial == 0
        )
        allocation = "uniform" if fixed else self.allocation
        first = self._plan(params, self.initial, allocation).kept
        # A leaf whose own final sparsity is below the initial one keeps that throughout.
        first = [max(a, b) for a, b in zip(first, last, strict=True)]
        return [
            _wide.interpolate(a, b, self.schedule.fraction(step))
            for a, b in zip(first, last, strict=True)
        ]

    def decide(
        self, params: PyTree, step: Int[Array, ""] | int, score: _prune.Score
    ) -> list[Bool[Array, "..."]]:
        """Masks of the best weights at a step, in the order of the leaves."""
        plan, leaves = self.plan(params), arrays(params)
        structure, stands = self.structure, self.initial is None
        if isinstance(structure, NM) and stands and not any(plan.kept):
            # All groups obey at all times: nothing to search for.
            return [
                structure.best(path, score(x))
                for path, x in zip(plan.paths, leaves, strict=True)
            ]
        kept = self.kept(params, step)
        return _prune.decide(plan, kept, score, [(x,) for x in leaves])

    def first(
        self,
        params: PyTree,
        key: Key[Array, ""] | None = None,
        score: _prune.Score = scores.magnitude,
    ) -> PyTree:
        """Masks to begin with: random with a key, else by score."""
        self.plan(params)  # refuses leaves that do not fit
        if self.initial == 0:
            return jax.tree.map(lambda x: jnp.ones_like(x, bool), params)
        kept = self.kept(params, -1)
        operands = params if key is None else scores.random(params, key=key)
        leaves = [(x,) for x in arrays(operands)]
        score = score if key is None else _same
        return scaffold(params, _prune.decide(self.plan(params), kept, score, leaves))

    def _plan(self, params, sparsity, allocation) -> _prune.Plan:
        return _prune.plan(
            params, sparsity=sparsity, structure=self.structure, allocation=allocation
        )


def fixed(
    sparsity: float | Fraction | None,
    structure: Structure,
    allocation: Allocation,
    *,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
) -> Target:
    """Counts that stand still; masks are decided from `begin` to `end`, or for good.

    Raises:
      ValueError: if the sparsity is outside [0, 1), or the steps make no schedule.
    """
    _check_name(allocation)
    if sparsity is None and not isinstance(structure, NM):
        _check_mapping(allocation)
    final = None if sparsity is None else exact(sparsity)
    end = FOREVER if end is None else end
    schedule = schedules.cubic(0.0, begin, end, every)
    return Target(schedule, None, final, structure, allocation)


def rising(
    sparsity: float | Fraction | Schedule | None,
    structure: Structure,
    allocation: Allocation,
    *,
    begin: int,
    end: int | None,
    every: int,
    initial: float | Fraction,
    method: str,
    ramp: Callable[..., Schedule] = schedules.cubic,
    usual: int = 1,
) -> Target:
    """Counts on a ramp, the cubic of Zhu & Gupta, or on a schedule given as sparsity.

    `usual` is the default of `every`, which a schedule takes the place of.

    Raises:
      ValueError: if a schedule is given twice, `end` or the sparsity is missing, or a
        value is out of range.
    """
    if isinstance(sparsity, Schedule):
        if (begin, end, every, initial) != (0, None, usual, 0.0):
            raise ValueError(
                "sparsity: got a Schedule together with begin, end, every or initial; the "
                "schedule holds those. Leave them out, or give sparsity as a number."
            )
        final, initial, schedule = sparsity.final, sparsity.initial, sparsity
    else:
        if sparsity is None and isinstance(structure, NM):
            sparsity = 1 - Fraction(structure.n, structure.m)
        if end is None:
            raise ValueError(
                "end: got None; expected the step of the last mask update, as in "
                f"{method}(0.9, begin=200, end=800, every=20)."
            )
        if sparsity is None:
            raise ValueError(
                "sparsity: got None; expected the share to prune in the end, as in "
                f"{method}(0.9, end=800). With a mapping as allocation it is what leaves "
                "get that match no pattern."
            )
        final = sparsity
        schedule = ramp(0.0, begin, end, every)
    _check_name(allocation)
    first, last = exact(initial, "initial"), exact(final, "sparsity")
    if first > last:
        raise ValueError(
            f"initial: got {initial}; expected at most the final sparsity of {final}, since "
            f"{method} prunes more and more."
        )
    return Target(schedule, first, last, structure, allocation)


def _check_name(allocation: Any) -> None:
    """Raises `ValueError` for a name that is none, before there are leaves."""
    if not (isinstance(allocation, Mapping) or callable(allocation)):
        allocate(allocation, {}, 0)


def _check_mapping(allocation: Allocation) -> None:
    """Raises `ValueError` where nothing says how much is pruned."""
    if not isinstance(allocation, Mapping):
        raise ValueError(
            f"sparsity: got None; expected a number in [0, 1) with allocation={allocation!r}."
        )


def until_hard(
    ramp: Schedule, harden: int
) -> Callable[[Int[Array, ""]], Bool[Array, ""]]:
    """When soft masks are decided: as often as the ramp says, and on until they harden.

    Raises:
      ValueError: if `harden` comes before the ramp ends.
    """
    whole_step("harden", harden)
    if harden < ramp.end:
        raise ValueError(
            f"harden: got {harden}; expected a step of at least end={ramp.end}."
        )

    def due(step: Int[Array, ""]) -> Bool[Array, ""]:
        regular = (step >= ramp.begin) & ((step - ramp.begin) % ramp.every == 0)
        return (regular & (step < harden)) | (step == ramp.end) | (step == harden)

    return due


def whole_step(name: str, step: object) -> None:
    """Raises `TypeError` unless `step` is a whole number."""
    if not hasattr(step, "__index__"):
        raise TypeError(
            f"{name}: got {step!r}; expected a whole number of training steps, written as "
            "an int."
        )


def scaffold(params: PyTree, found: Sequence[Array]) -> PyTree:
    """Arrays of the leaves in order, as a tree."""
    leaves = iter(found)
    return jax.tree.map(lambda _: next(leaves), params)


def _same(x: Array) -> Array:
    return x
