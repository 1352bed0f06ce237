"""The best of many random sub-networks before training (arXiv 2403.08265)."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxprune import _prune, _tree, scores
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.rounds._loop import at_least, check_key
from jaxprune.structures import Channel, Structure


class Found(NamedTuple):
    """The winner of a random search.

    Attributes:
      params: with pruned weights at 0, untrained.
      masks: of the winner.
      losses: of all trials, float32.
    """

    params: PyTree
    masks: PyTree
    losses: Float[Array, "trials"]


def random_search(
    loss: Callable[..., Float[Array, ""]],
    params: PyTree,
    sparsity: float | Fraction,
    *args: Any,
    key: Key[Array, ""],
    trials: int = 100,
    structure: Structure = Channel(),
    allocation: Allocation = "uniform",
    where: _tree.Where = None,
) -> Found:
    """Draws random masks of whole neurons and takes the one of the smallest loss.

    A baseline for any method that picks masks before training: the paper finds that what
    it picks trains no better than a random mask, which is `trials=1`. How many trials and
    which data the author used could not be found; here the caller says. Leave out the last
    layer, as in `where="!head/*"`: a class without its neuron cannot be learnt. Biases are
    not pruned.

    Args:
      loss: `loss(params, *args)` gives a number.
      params: untrained.
      sparsity: share of the neurons to prune, in [0, 1).
      *args: further arguments of the loss, such as a batch.
      key: draws the masks.
      trials: how many masks are compared, one after the other.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.
      where: which leaves may be pruned; see `jaxprune.prune`.

    Returns:
      The masked parameters, the masks and all losses.

    Raises:
      ValueError: if a value is out of range, or no loss is a finite number.
      TypeError: if `key` is no key.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> def loss(params):
      ...     return -jnp.sum(params["kernel"])
      >>> found = jp.rounds.random_search(loss, params, 0.5, key=jax.random.key(0))
      >>> found.masks["kernel"].tolist()
      [[True, False], [True, False]]

    References:
      Farahani, Random Search as a Baseline for Sparse Neural Network Architecture
      Search, arXiv 2403.08265.
    """
    at_least("trials", trials, 1)
    check_key(key)

    def draw(key: Key[Array, ""]) -> PyTree:
        return _prune.prune(
            params, sparsity, score=scores.random(params, key=key),
            structure=structure, allocation=allocation, where=where,
        )[1]  # fmt: skip

    def lose(key: Key[Array, ""]) -> Array:
        return loss(mask_trees.apply(params, draw(key)), *args)

    keys = jax.random.split(key, trials)
    losses = jax.jit(lambda keys: jax.lax.map(lose, keys))(keys)
    if losses.ndim != 1:
        raise ValueError(
            f"loss: gives an array of shape {losses.shape[1:]}; expected one number. Take "
            "the mean of it."
        )
    if not jnp.isfinite(losses).any():
        raise ValueError(
            "loss: gives NaN or infinity for every mask that was drawn. Check the loss of "
            "the dense parameters first."
        )
    best = jnp.nanargmin(jnp.where(jnp.isfinite(losses), losses, jnp.nan))
    found = draw(keys[best])
    return Found(mask_trees.apply(params, found), found, losses)
