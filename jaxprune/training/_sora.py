"""SoRA: gates on the ranks of an adapter, driven to zero (Ding et al., arXiv 2311.11696)."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxprune import _prune, _tree, penalties
from jaxprune._tree import PyTree
from jaxprune.training import _target, _units
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    arrays,
    mask_gradients,
    masked_view,
    replace_masks,
    start,
)


def sora(threshold: float | Callable[[Array], Array], *, end: int) -> Method:
    r"""Soft-thresholds gates after every step of the optimizer, and drops those at 0.

    An adapter `x A diag(g) B` has one gate `g` a rank. After each step every gate is
    moved towards 0 by `threshold`, and set to 0 if it is smaller: the proximal step of an
    l1 penalty, so that gates become exactly 0. Until `end` they may come back; then
    those that are 0 are masked, and the others train on without the penalty.

    It prunes what `jaxprune.masked` selects: say `where="*/gate"`, as the name of your
    gates is. Their ranks are cut out afterwards by a plan of `jaxprune.structured` that
    keeps, in each group of kind `"rank"`, `jnp.flatnonzero(gate)`.

    Read for this: the authors' code (src/sparse_optimizer.py and src/lora.py), whose
    `sparse_lambda` of the optimizer is `threshold`. Differences: there the threshold
    rises from one training run to the next, here it is any function of the step; they
    shrink up to the end of training and mask nothing; gates of exactly the threshold
    become 0 here.

    Args:
      threshold: how far a gate moves towards 0 in a step, the learning rate times the
        coefficient of the penalty; or a function of the step, such as
        `jaxprune.schedules.linear(1e-3, 0, 1000)`.
      end: step at which zeros are masked, and shrinking stops.

    Raises:
      ValueError: if the threshold is negative or `end` is out of range.

    Example:
      >>> tx = jp.masked(optax.adamw(1e-3), jp.sora(5e-4, end=1000), where="*/gate")

    References:
      Ding et al., Sparse Low-rank Adaptation of Pre-trained Language Models,
      arXiv 2311.11696; github.com/TsinghuaC3I/SoRA.
    """
    if not callable(threshold):
        _prune.require(
            "threshold", threshold, lambda x: 0 <= x < math.inf,
            "at least 0, or a function of the step",
        )  # fmt: skip
    _target.whole_step("end", end)
    _prune.require("end", end, lambda x: x >= 1, "a step of at least 1")

    def init(params: PyTree) -> MethodState:
        return start(_units.all_masks(params), params)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        found = [w != 0 for w in arrays(params)]
        return lax.cond(
            state.step == end,
            lambda s: replace_masks(s, found, params),
            lambda s: s,
            advance(grads, state, params),
        )

    def project(new: PyTree, state: MethodState, old: PyTree) -> PyTree:
        del old
        step = state.step - 1
        pull = threshold(step) if callable(threshold) else threshold
        pull = jnp.where(step < end, jnp.float32(pull), 0)
        return _tree.map_leaves(lambda w: penalties.soft_threshold(w, pull), new)

    return Method(init, update, mask_gradients, project, masked_view)
