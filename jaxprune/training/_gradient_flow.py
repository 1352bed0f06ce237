"""Progressive gradient flow: N:M training by mask or structure decay (arXiv 2402.04744)."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

import jax.numpy as jnp
from jax import lax

from jaxprune import _prune, _tree, masks, schedules, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.schedules import Schedule
from jaxprune.structures import NM, Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._dense import behind_mask
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    all_gradients,
    all_kept,
    masked_view,
    replace_masks,
    start,
    straight_through,
)


def mdgf(
    sparsity: float | Fraction | None = None,
    *,
    leak: Schedule,
    every: int = 1,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """Mask decay gradient flow: pruned weights fade out of the forward pass.

    The forward pass sees `w (mask + (1 - mask) D)`, where `D` falls from 1 to 0 on a
    schedule. The gradient goes to all weights as it is: `D = 1` is dense training,
    `D = 0` is `jaxprune.ste`. The loss must see `jaxprune.sparse_params`.

    The paper speaks of restricting the gradient flow to pruned weights; in the authors'
    code, which we follow, the gradient is not scaled by `D`.

    Args:
      sparsity: share of the weights that fade; may be left out with `NM`.
      leak: `D` by step, as `jaxprune.schedules.linear(0.0, begin=0, end=5000,
        initial=1.0)` or `exponential(1e-4, end=20000)`.
      every: steps between two decisions of the masks; the authors decide at each step.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range, or `leak` does not start at 1.
      TypeError: if `leak` is no schedule.

    Example:
      >>> leak = jp.schedules.linear(0.0, begin=0, end=5000, initial=1.0)
      >>> method = jp.mdgf(leak=leak, structure=jp.NM(1, 8))

    References:
      Bambhaniya et al., Progressive Gradient Flow for Robust N:M Sparsity Training in
      Transformers, arXiv 2402.04744, mask decay.
    """
    if not isinstance(leak, Schedule):
        raise TypeError(
            f"leak: got {leak!r}; expected a schedule, such as "
            "jaxprune.schedules.linear(0.0, begin=0, end=5000, initial=1.0)."
        )
    if leak.initial != 1 or not 0 <= leak.final <= 1:
        raise ValueError(
            f"leak: goes from {float(leak.initial):g} to {float(leak.final):g}; expected from "
            "1 to a value in [0, 1]. Give initial=1.0 to the schedule."
        )
    target = _target.fixed(sparsity, structure, allocation, every=every)
    return behind_mask(target, score, view=leaky_view, own=leak)


def leaky_view(params: PyTree, state: MethodState) -> PyTree:
    """`w` where it is kept and `D w` elsewhere, with `D` in `state.own`."""
    leak = state.own

    def see(w, mask):
        faded = jnp.where(leak > 0, (leak * w).astype(w.dtype), 0)  # no -0, no NaN
        return straight_through(w, jnp.where(masks.as_bool(mask), w, faded))

    return _tree.map_leaves(see, params, state.masks)


def sdgf(
    structure: NM,
    *,
    begin: int = 0,
    end: int,
    every: int = 1,
    decay: Literal["stepwise", "geometric"] = "stepwise",
    score: _prune.Score = scores.magnitude,
) -> Method:
    """Structure decay gradient flow: the pattern tightens in stages to the wanted N:M.

    Each stage trains as `jaxprune.ste`. Dense before `begin`, the stages follow at equal
    distances, and the wanted pattern is reached at `end`. In the authors' code `end` is
    where the last stage, as long as the others, is over.

    Args:
      structure: the pattern in the end.
      begin: step of the first stage.
      end: step of the last one.
      every: steps between two decisions of the masks.
      decay: `"stepwise"` keeps the group size M: (M-1):M, M/2:M, M/4:M, ..., N:M.
        `"geometric"` keeps the ratio: 8N:8M, 4N:4M, 2N:2M, N:M, whose groups need an
        axis that is a multiple of 8M.
      score: elementwise score of a weight array; higher is kept.

    Raises:
      ValueError: if a stage does not exist or the steps make no schedule.
      TypeError: if `structure` is no `NM`.

    Example:
      >>> method = jp.sdgf(jp.NM(1, 8), end=8000)

    References:
      Bambhaniya et al., arXiv 2402.04744, structure decay; the stages are those of the
      authors' code.
    """
    stages = nm_stages(structure, decay)
    schedules.linear(0.0, begin, end, every)  # checks the steps
    last = len(stages) - 1
    changes = [begin + math.ceil(i * (end - begin) / max(last, 1)) for i in range(last)]
    changes = jnp.asarray([*changes, end])
    targets = [_target.fixed(None, stage, "uniform") for stage in stages]

    def init(params: PyTree) -> MethodState:
        for target in targets:
            target.plan(params)  # a stage that does not fit is refused here
        first = all_kept(params)
        if begin == 0:
            first = targets[-1 if end == 0 else 0].decide(params, 0, score)
        return start(_target.scaffold(params, first), params)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        stage = jnp.sum(step >= changes) - 1
        due = (step >= begin) & ((step - begin) % every == 0) | jnp.any(step == changes)

        def decide(state: MethodState) -> MethodState:
            found = lax.switch(
                jnp.clip(stage, 0, last),
                [lambda p, t=target: t.decide(p, 0, score) for target in targets],
                params,
            )
            return replace_masks(state, found, params)

        return lax.cond(due, decide, lambda s: s, advance(grads, state, params))

    return Method(init, update, all_gradients, None, masked_view, dense=True)


def nm_stages(
    structure: NM, decay: Literal["stepwise", "geometric"] = "stepwise"
) -> tuple[NM, ...]:
    """The patterns that `sdgf` goes through, the wanted one last.

    Example:
      >>> [(s.n, s.m) for s in jp.training.nm_stages(jp.NM(1, 8))]
      [(7, 8), (4, 8), (2, 8), (1, 8)]
      >>> [(s.n, s.m) for s in jp.training.nm_stages(jp.NM(1, 8), "geometric")]
      [(8, 64), (4, 32), (2, 16), (1, 8)]
    """
    if not isinstance(structure, NM):
        raise TypeError(f"structure: got {structure!r}; expected NM, such as NM(1, 8).")
    n, m = structure.n, structure.m
    if decay == "geometric":
        pairs = [(k * n, k * m) for k in (8, 4, 2, 1)]
    elif decay == "stepwise":
        halves, kept = [], m // 2
        while kept > n:
            halves.append(kept)
            kept //= 2
        pairs = [(k, m) for k in (m - 1, *halves, n)]
    else:
        raise ValueError(f"decay: got {decay!r}; expected 'stepwise' or 'geometric'.")
    pairs = list(dict.fromkeys(pairs))
    return tuple(dataclasses.replace(structure, n=n, m=m) for n, m in pairs)
