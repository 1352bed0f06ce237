"""Iterative magnitude pruning with rewinding (arXiv 1803.03635, 1903.01611)."""

import os
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxprune import _prune, _tree
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation, exact
from jaxprune.rounds._loop import Rounds, Train, at_least, plan_all, run
from jaxprune.structures import Structure, Unstructured


def imp(
    train: Train,
    params: PyTree,
    *,
    rate: float | Fraction = 0.2,
    rounds: int,
    rewind: int | None = 0,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
    where: _tree.Where = None,
    directory: str | os.PathLike[str] | None = None,
) -> Rounds:
    """Iterative magnitude pruning: trains, prunes a share of what is left, rewinds.

    After `n` rounds `(1 - rate)**n` of the weights are left, rounded once from the whole
    and not round by round. With `rewind=0` these are lottery tickets; with a step `k`
    each round starts again from the weights that the dense network had at step `k`, in
    its learning rates and data too, but with a new optimizer state, unless `train` brings
    one; `None` trains on, without rewinding.

    Args:
      train: trains parameters under masks; see `Train`.
      params: at initialisation.
      rate: share of the remaining weights that a round prunes.
      rounds: how many, after a dense one.
      rewind: step to rewind to.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.
      where: which leaves may be pruned; see `jaxprune.prune`.
      directory: each round is saved here; called again with the same arguments, rounds
        that are there are not repeated.

    Returns:
      The last round's parameters and masks; see `Rounds`.

    Raises:
      ValueError: if a value is out of range, or `train` leaves a pruned weight that is
        not 0.

    Example:
      >>> def train(params, masks, *, start, stop):
      ...     return jp.masks.apply(params, masks)  # and train
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> found = jp.rounds.imp(train, params, rate=0.5, rounds=2)
      >>> found.sparsities, found.params["kernel"].tolist()
      ((0.0, 0.5, 0.75), [[3.0, 0.0], [0.0, 0.0]])

    References:
      Frankle & Carbin, The Lottery Ticket Hypothesis, arXiv 1803.03635, section 2;
      Frankle et al., Stabilizing the Lottery Ticket Hypothesis, arXiv 1903.01611,
      section 3.
    """
    left = 1 - exact(rate, "rate")
    at_least("rounds", rounds, 1)
    _prune.refuse_mapping(allocation)
    goals = [1 - left**i for i in range(1, rounds + 1)]
    plan_all(_tree.select(params, where), goals, structure, allocation)

    def choose(found: PyTree, masks: PyTree, number: int) -> PyTree:
        return _prune.prune(
            found,
            goals[number - 1],
            score=remaining_magnitudes(found, masks),
            structure=structure,
            allocation=allocation,
            where=where,
        )[1]

    return run(
        train, params, choose,
        rounds=rounds, rewind=rewind, where=where, directory=directory,
        settings={"rate": rate, "structure": structure, "allocation": allocation},
    )  # fmt: skip


def remaining_magnitudes(params: PyTree, masks: PyTree) -> PyTree:
    """`|w|` where a weight is kept and -1 elsewhere, so that none comes back."""
    return jax.tree.map(
        lambda m, w: w if _tree.is_hole(m) else jnp.where(m, jnp.abs(w), -1),
        masks,
        params,
        is_leaf=_tree.is_hole,
    )
