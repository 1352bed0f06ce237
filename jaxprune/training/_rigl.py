"""RigL: grows where the gradient is largest (Evci et al., arXiv 1911.11134)."""

from fractions import Fraction

import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxprune.allocation import Allocation
from jaxprune.structures import Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._method import Method
from jaxprune.training._prune_grow import regrowing


def rigl(
    sparsity: float | Fraction | None = None,
    *,
    key: Key[Array, ""],
    begin: int = 0,
    end: int,
    every: int = 100,
    drop: float = 0.3,
    structure: Structure = Unstructured(),
    allocation: Allocation = "erk",
) -> Method:
    """Drops the smallest weights and grows those with the largest gradients.

    At each update a leaf with `K` active weights loses its `f K` smallest, and the `f K`
    largest gradients among all others (those just dropped too) take their place, where
    `f = drop / 2 (1 + cos(pi t / T))`. New weights start from 0 with fresh moments; one
    that is dropped and grown at once keeps its value.

    The gradients of pruned weights must be there: take them by the parameters, or through
    `jaxprune.sparse_params`, not behind a mask of your own.

    Differences from the authors' code: on an update step the optimizer steps too, with
    the new masks; there the exchange takes the place of the step. Ties go to the lower
    index, there to chance.

    Args:
      sparsity: share of the weights to prune, constant; may be left out with `NM`.
      key: draws the initial masks.
      begin: step of the first exchange. At step 0 the weights are as they were given, so that
        those grown then keep their values, unless training begins from
        `jaxprune.sparse_params(params, state)`.
      end: step of the last one; the paper's is at three quarters of the run.
      every: steps between exchanges.
      drop: share of the active weights of each leaf that is exchanged at first.
      structure: what is kept or pruned as one; scores of a unit are summed.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.
      TypeError: if `key` is no key.

    Example:
      >>> method = jp.rigl(0.9, key=jax.random.key(0), end=7500)

    References:
      Evci et al., Rigging the Lottery: Making All Tickets Winners, arXiv 1911.11134,
      section 3 and Algorithm 1.
    """
    _target.whole_step("end", end)
    target = _target.fixed(
        sparsity, structure, allocation, begin=begin, end=end, every=every
    )
    return regrowing(target, key, drop, jnp.abs, lambda g, key: g)
