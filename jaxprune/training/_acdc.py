"""AC/DC: alternating compressed and decompressed training (arXiv 2106.12379)."""

from fractions import Fraction

import jax.numpy as jnp
from jax import lax

from jaxprune import _prune, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.structures import Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    all_kept,
    mask_gradients,
    masked_view,
    replace_masks,
    start,
)


def acdc(
    sparsity: float | Fraction | None = None,
    *,
    begin: int,
    end: int,
    every: int,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
) -> Method:
    """Sparse and dense phases in turn, at full sparsity from the first one on.

    Dense up to `begin`; then phases of `every` steps, sparse and dense in turn; sparse for
    good from `end` on. A sparse phase that would run into the last one is left dense, so
    that a long dense phase comes before it, as in the paper. At the start of a sparse
    phase the masks are drawn by magnitude; at its end the pruned weights start from 0,
    with fresh moments. The authors zero all momentum there, that of kept weights too.

    Args:
      sparsity: share of the weights that sparse phases prune; may be left out with `NM`.
      begin: step of the first sparse phase; in the paper a tenth of the run.
      end: step of the last one; in the paper at 85 % of the run.
      every: steps of a phase.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> method = jp.acdc(0.9, begin=1000, end=8500, every=500)

    References:
      Peste et al., AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
      Networks, arXiv 2106.12379, Algorithm 1; the phases of the authors' configurations.
    """
    _target.whole_step("end", end)
    target = _target.fixed(
        sparsity, structure, allocation, begin=begin, end=end, every=every
    )

    def compresses(step):
        phase, within = jnp.divmod(step - begin, every)
        starts = (within == 0) & (phase % 2 == 0) & (step + every < end)
        return (step >= begin) & starts | (step == end)

    def decompresses(step):
        phase, within = jnp.divmod(step - begin, every)
        return (step > begin) & (step < end) & (within == 0) & (phase % 2 == 1)

    def init(params: PyTree) -> MethodState:
        target.plan(params)  # a leaf that does not fit is refused here
        return start(_target.scaffold(params, all_kept(params)), params)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        state = lax.cond(
            compresses(step),
            lambda s: replace_masks(s, target.decide(params, step, score), params),
            lambda s: s,
            advance(grads, state, params),
        )
        return lax.cond(
            decompresses(step),
            lambda s: replace_masks(s, all_kept(params), params),
            lambda s: s,
            state,
        )

    return Method(init, update, mask_gradients, None, masked_view)
