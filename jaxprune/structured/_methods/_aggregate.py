"""SPA: any scores of weights, leaf by leaf, normalised and put together for each unit."""

from collections.abc import Callable
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np

from jaxprune._tree import PyTree
from jaxprune.structured._methods._scores import as_real, by_path
from jaxprune.structured._reading._graph import INPUT, Graph, Group, Member

Reduction = Literal["sum", "mean", "max", "prod"]
Normalization = Literal["none", "sum", "mean", "max", "gaussian"]
_REDUCTIONS = {"sum": np.sum, "mean": np.mean, "max": np.max, "prod": np.prod}


def aggregate(
    graph: Graph,
    scores: PyTree,
    *,
    normalize: Normalization = "mean",
    reduction: Reduction = "sum",
) -> dict[str, np.ndarray]:
    """Scores of units from scores of weights, so that each leaf has a say.

    Scores of the weights of a unit are summed in each member of the group, an axis of a
    leaf; divided by the sum, the mean or the largest of the member's units, or moved to a
    mean of 0 and a deviation of 1; and reduced over the members. Without the division large
    leaves decide, as in `score_groups`.

    Args:
      graph: of `trace`.
      scores: a tree like the parameters, with a score for each weight: `jnp.abs` of them,
        `jaxprune.scores`, products with gradients.
      normalize: by what each member is divided; 0 is left as it is.
      reduction: over the members.

    Returns:
      Scores [units] by name of the group.

    Raises:
      ValueError: if an option is not known, or a tree does not have the leaves that were
        traced.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.array([[30.0, 10.0]]), "down": jnp.array([[1.0], [3.0]])}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 1)))
      >>> jp.structured.aggregate(graph, params)["down:0"].tolist()
      [2.0, 2.0]

    References:
      Wang et al., "Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
      arXiv 2403.18955, whose abstract and a summary were read: which normalisation and
      which reduction is theirs by default is not known here.
    """
    if normalize not in get_args(Normalization):
        raise ValueError(
            f"normalize: got {normalize!r}; expected one of {get_args(Normalization)}."
        )
    check_reduction(reduction)
    leaves = by_path(graph, scores, "scores")

    def places(member: Member) -> np.ndarray:
        x = as_real(leaves[member.path])
        rest = tuple(i for i in range(x.ndim) if i != member.axis)
        return np.asarray(jnp.sum(x, axis=rest, dtype=jnp.float32), np.float64)

    return {
        g.name: reduced(
            [_normalized(x, normalize) for x in by_member(g, places)], reduction
        )
        for g in graph.groups
    }


def by_member(group: Group, places: Callable[[Member], np.ndarray]) -> list[np.ndarray]:
    """Scores `[units]` of each member, from scores of the places along its axis."""
    found = []
    for m in group.members:
        if not m.path.startswith(INPUT):
            units, each = m.units, places(m)
            hit = units >= 0
            found.append(np.bincount(units[hit], each[hit], group.size))
    return found


def reduced(members: list[np.ndarray], reduction: Reduction) -> np.ndarray:
    """One score for each unit."""
    return _REDUCTIONS[reduction](members, axis=0)


def check_reduction(reduction: str) -> None:
    """Refuses a name that is not known."""
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"reduction: got {reduction!r}; expected one of {get_args(Reduction)}."
        )


def _normalized(x: np.ndarray, how: Normalization) -> np.ndarray:
    if how == "none":
        return x
    if how == "gaussian":
        x, size = x - x.mean(), x.std()
    else:
        size = {"sum": np.sum, "mean": np.mean, "max": np.max}[how](x)
    return x / size if size > 0 else x
