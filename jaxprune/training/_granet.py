"""GraNet: gradual pruning with neuroregeneration (Liu et al., arXiv 2106.10404)."""

from fractions import Fraction

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from jaxprune import masks, schedules
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.schedules import Schedule
from jaxprune.structures import Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    arrays,
    mask_gradients,
    masked_view,
    packed_masks,
    replace_each,
    start,
)
from jaxprune.training._prune_grow import (
    KeyCarrier,
    check_drop,
    exchange,
    largest,
)


def granet(
    sparsity: float | Fraction | Schedule | None = None,
    *,
    begin: int = 0,
    end: int | None = None,
    every: int = 100,
    initial: float | Fraction = 0.0,
    until: int | None = None,
    drop: float = 0.5,
    key: Key[Array, ""] | None = None,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
) -> Method:
    """Gradual magnitude pruning that regrows some of each leaf at every update.

    An update prunes to the schedule's sparsity by magnitude; then each leaf drops a
    further share of its smallest weights and grows as many with the largest gradients,
    those just pruned among them. So the counts are those of `jaxprune.gmp`. The share
    falls from `drop` to 0.005 on half a cosine from `begin` to `until`.

    Sparse to sparse: `initial=0.5` with a key begins with random masks. The paper divides
    those by ERK and prunes globally after that; here one allocation serves for both.

    Args:
      sparsity: at the end, in [0, 1), or a `Schedule`, which then holds begin, end, every
        and initial. May be left out with `NM`.
      begin: step of the first update.
      end: step at which the final sparsity is reached.
      every: steps between updates.
      initial: sparsity from the first step on.
      until: step of the last exchange, `end` or later; in the authors' code the last of
        the run. `None` means `end`.
      drop: share of each leaf's active weights that an update exchanges at first.
      key: draws the initial masks, where `initial` is above 0; without it they are those
        of the largest weights.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a schedule is given twice, `end` is missing, or a value is out of
        range.

    Example:
      >>> method = jp.granet(0.9, end=5000, until=7500, every=100)

    References:
      Liu et al., Sparse Training via Boosting Pruning Plasticity with Neuroregeneration,
      arXiv 2106.10404, section 4. The floor of 0.005 is in the authors' code.
    """
    check_drop(drop)
    target = _target.rising(
        sparsity, structure, allocation,
        begin=begin, end=end, every=every, initial=initial, method="granet",
        usual=100,
    )  # fmt: skip
    rise = target.schedule
    last = rise.end if until is None else until
    _target.whole_step("until", last)
    if last < rise.end:
        raise ValueError(
            f"until: got {until}; expected a step of at least end={rise.end}."
        )
    if key is not None and not target.initial:
        raise ValueError(
            "key: got one with initial=0, where there are no masks to draw. Give initial=0.5 "
            "to train sparse to sparse, or leave the key out."
        )
    exchanged = schedules.cosine(min(0.005, drop), rise.begin, last, rise.every, drop)
    keys = None if key is None else KeyCarrier(key)

    def init(params: PyTree) -> MethodState:
        first = target.first(params, None if keys is None else keys.at(-1))
        return start(first, params)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        plan, weights = target.plan(params), arrays(params)
        due = exchanged.due(step) | rise.due(step)

        def prune(packed):
            found = [masks.as_bool(m) for m in packed_masks(packed)]
            pruned = largest(plan, target.kept(params, step), weights, found)
            old = packed_masks(packed)
            return [masks.repack(m, like) for m, like in zip(pruned, old, strict=True)]

        def exchange_some(i, mask, w, g, pruned):
            del mask
            left, share = masks.as_bool(pruned), exchanged(step)
            return exchange(plan.paths[i], structure, left, w, jnp.abs, g, share)

        pruned = lax.cond(due, prune, packed_masks, state.masks)
        new = advance(grads, state, params)
        return replace_each(new, params, due, exchange_some, arrays(grads), pruned)

    return Method(init, update, mask_gradients, None, masked_view)
