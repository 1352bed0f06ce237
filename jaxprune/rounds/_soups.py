"""Sparse model soups: averages of replicas that share a mask (arXiv 2306.16788)."""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxprune import _prune, _tree
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation, exact
from jaxprune.rounds._imp import remaining_magnitudes
from jaxprune.rounds._loop import (
    Rounds,
    at_least,
    check_key,
    kept,
    open_folder,
    plan_all,
)
from jaxprune.structures import Structure, Unstructured


class TrainReplica(Protocol):
    """Retrains parameters under masks, with a key for the order of the data.

    It is mapped over keys with `jax.vmap`, so it must be a pure function that can be
    traced, such as a `lax.scan` over steps.
    """

    def __call__(
        self, params: PyTree, masks: PyTree, key: Key[Array, ""]
    ) -> PyTree: ...


def sparse_model_soups(
    train: TrainReplica,
    params: PyTree,
    sparsity: float | Fraction,
    *,
    key: Key[Array, ""],
    replicas: int = 3,
    rounds: int = 1,
    evaluate: Callable[[PyTree], float] | None = None,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
    where: _tree.Where = None,
    directory: str | os.PathLike[str] | None = None,
) -> Rounds:
    """Prunes, retrains several replicas under the same mask, averages them, and again.

    Every round prunes the same share of what is left, by magnitude. The replicas differ
    by their keys alone. Statistics of batch normalisation are to be computed anew for
    the average.

    Args:
      train: retrains a replica; see `TrainReplica`.
      params: trained, dense.
      sparsity: after the last round, in [0, 1).
      key: split to one for each round and replica.
      replicas: how many are averaged.
      rounds: in how many rounds the sparsity is reached.
      evaluate: a measure of parameters of which more is better, such as accuracy on
        held-out data. With it the soup is greedy: the best replica first, and each
        further one if the average gets no worse. Without, all are averaged.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.
      where: which leaves may be pruned; see `jaxprune.prune`.
      directory: each round is saved here; see `imp`.

    Returns:
      The last soup and its masks; see `Rounds`.

    Raises:
      ValueError: if a value is out of range.
      TypeError: if `key` is no key.

    Example:
      >>> def train(params, masks, key):
      ...     noise = 0.1 * jax.random.normal(key)  # in place of training
      ...     return jp.masks.apply(jax.tree.map(lambda w: w + noise, params), masks)
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> found = jp.rounds.sparse_model_soups(train, params, 0.5, key=jax.random.key(0))
      >>> (found.params["kernel"] != 0).tolist()
      [[True, False], [False, True]]

    References:
      Zimmer et al., Sparse Model Soups: A Recipe for Improved Pruning via Model
      Averaging, arXiv 2306.16788, Algorithm 1.
    """
    check_key(key)
    at_least("replicas", replicas, 1)
    at_least("rounds", rounds, 1)
    _prune.refuse_mapping(allocation)
    chosen = _tree.select(params, where)
    plan_all(chosen, _goals(sparsity, rounds), structure, allocation)
    folder = open_folder(directory, params, chosen, {
        "sparsity": sparsity, "key": jax.random.key_data(key).tolist(),
        "replicas": replicas, "rounds": rounds, "greedy": evaluate is not None,
        "structure": structure, "allocation": allocation,
    })  # fmt: skip
    retrain = jax.jit(jax.vmap(train, (None, None, 0)))
    masks = _tree.map_leaves(lambda x: jnp.ones_like(x, bool), chosen)
    soup_of_all, sparsities = params, [0.0]
    for i, goal in enumerate(_goals(sparsity, rounds), 1):
        _, masks = _prune.prune(
            soup_of_all, goal, score=remaining_magnitudes(soup_of_all, masks),
            structure=structure, allocation=allocation, where=where,
        )  # fmt: skip
        keys = jax.random.split(jax.random.fold_in(key, i), replicas)
        begun = mask_trees.apply(soup_of_all, masks)

        def cook(begun=begun, masks=masks, keys=keys):
            many = retrain(begun, masks, keys)
            tastes = [jax.tree.map(lambda x, j=j: x[j], many) for j in range(replicas)]
            if evaluate:
                tastes = _greedy(tastes, masks, evaluate)
            return soup(tastes, masks=masks)

        soup_of_all = kept(folder, f"round_{i}", params, cook)
        sparsities.append(mask_trees.sparsity(masks))
    return Rounds(soup_of_all, masks, params, tuple(sparsities))


def _goals(sparsity: float | Fraction, rounds: int) -> list[Fraction]:
    """The sparsities of the rounds, at equal ratios of density."""
    density = float(1 - exact(sparsity))
    steps = [Fraction(1 - density ** (i / rounds)) for i in range(1, rounds)]
    return [*steps, exact(sparsity)]


def soup(
    models: Sequence[PyTree],
    *,
    masks: PyTree = None,
    weights: Sequence[float] | None = None,
) -> PyTree:
    """The average of models that share a mask; it has the same zeros.

    Args:
      models: parameters of the same structure.
      masks: their masks; read off the first model where there are none.
      weights: of the models, with a sum of 1; equal by default.

    Returns:
      The average, in the dtypes of the models; pruned weights are exactly 0.

    Raises:
      ValueError: if a model has a weight that is not 0 where the masks prune.

    Example:
      >>> a, b = ({"kernel": jnp.array([[x, 0.0]])} for x in (1.0, 3.0))
      >>> jp.rounds.soup([a, b])["kernel"].tolist()
      [[2.0, 0.0]]

    References:
      Zimmer et al., arXiv 2306.16788; Wortsman et al., Model soups, arXiv 2203.05482.
    """
    if not models:
        raise ValueError("models: got none; expected at least one tree of parameters.")
    weights = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"weights: got {weights}; expected one for each of {len(models)} models, with "
            "a sum of 1."
        )
    masks = mask_trees.from_params(models[0]) if masks is None else masks
    for number, model in enumerate(models):
        for path, other in _outside(model, masks):
            raise ValueError(
                f"models: number {number} has {other} weights at {path} that the masks "
                "prune. Only models that share a mask average to one as sparse; "
                "retrain them from the same pruned parameters."
            )

    def mean(*xs):
        wide = jnp.promote_types(xs[0].dtype, jnp.float32)
        parts = [w * x.astype(wide) for w, x in zip(weights, xs, strict=True)]
        return sum(parts[1:], parts[0]).astype(xs[0].dtype)

    average = jax.tree.map(
        lambda x, *xs: mean(x, *xs) if _tree.is_float(x) else x, models[0], *models[1:]
    )
    return mask_trees.apply(average, masks)


def _outside(model: PyTree, masks: PyTree) -> list[tuple[str, int]]:
    paths, leaves, treedef = _tree.flatten(model)
    aligned = treedef.flatten_up_to(mask_trees.check(model, masks))
    found = [
        (p, int(jnp.sum((w != 0) & ~m)))
        for p, w, m in zip(paths, leaves, aligned, strict=True)
        if not _tree.is_hole(m)
    ]
    return [(p, n) for p, n in found if n]


def _greedy(models: list[PyTree], masks: PyTree, evaluate) -> list[PyTree]:
    values = [float(evaluate(m)) for m in models]
    order = sorted(range(len(models)), key=lambda i: -values[i])
    chosen, best = [models[order[0]]], values[order[0]]
    for i in order[1:]:
        value = float(evaluate(soup([*chosen, models[i]], masks=masks)))
        if value >= best:
            chosen, best = [*chosen, models[i]], value
    return chosen
