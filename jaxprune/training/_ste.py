"""Straight-through training: dense weights, a sparse forward pass (STE, SR-STE)."""

import math
from fractions import Fraction

import jax.numpy as jnp

from jaxprune import _prune, _tree, masks, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.structures import Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._dense import behind_mask
from jaxprune.training._method import Method, MethodState, finite


def ste(
    sparsity: float | Fraction | None = None,
    *,
    every: int = 1,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """Straight-through estimator: the forward pass is masked, the gradient is not.

    The weights stay dense, and the loss must see `jaxprune.sparse_params(params,
    opt_state)`. The gradient by the masked weights is applied to all.

    Args:
      sparsity: share of the weights that the forward pass prunes; may be left out with
        `NM`.
      every: steps between two decisions of the masks, from the weights at hand.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> tx = jp.masked(optax.sgd(0.1), jp.ste(0.5))
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> state = tx.init(params)
      >>> jp.sparse_params(params, state)["kernel"].tolist()
      [[3.0, 0.0], [0.0, 2.0]]

    References:
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons,
      arXiv 1308.3432, section 4; as a baseline in Zhou et al., arXiv 2102.04010.
    """
    return sr_ste(
        sparsity, decay=0.0, every=every, score=score, structure=structure,
        allocation=allocation,
    )  # fmt: skip


def sr_ste(
    sparsity: float | Fraction | None = None,
    *,
    decay: float = 2e-4,
    every: int = 1,
    score: _prune.Score = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "uniform",
) -> Method:
    """Sparse-refined straight-through estimator: pruned weights decay towards 0.

    As `jaxprune.ste`, but the inner optimizer sees `g + decay (1 - mask) w`, which keeps
    masks from flipping. It goes through the optimizer like any gradient: under Adam it is
    divided by the size of the gradients, too.

    Args:
      sparsity: share of the weights that the forward pass prunes; may be left out with
        `NM`.
      decay: the paper's lambda.
      every: steps between two decisions of the masks; the paper decides at each step.
      score: elementwise score of a weight array; higher is kept.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> method = jp.sr_ste(structure=jp.NM(2, 4))

    References:
      Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch, arXiv 2102.04010, section 3.2.
    """
    _prune.require(
        "decay", decay, lambda x: 0 <= x < math.inf, "at least 0, such as 2e-4"
    )
    target = _target.fixed(sparsity, structure, allocation, every=every)

    def gradients(grads: PyTree, state: MethodState, params: PyTree) -> PyTree:
        if decay == 0:
            return grads
        return _tree.map_leaves(
            lambda g, w, m: (
                g + decay * jnp.where(masks.as_bool(m), 0, finite(w)).astype(g.dtype)
            ),
            grads,
            params,
            state.masks,
        )

    return behind_mask(target, score, gradients=gradients)
