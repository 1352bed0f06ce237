"""How much each unit of each group matters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._reading import _local
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._graph import INPUT, Graph, Member


def score_groups(
    graph: Graph,
    params: PyTree,
    criterion: Any = "l2",
    *,
    gradients: PyTree = None,
    apart: bool = False,
) -> dict[str, np.ndarray]:
    """A score for each unit of each group: more is kept.

    The weights of a unit are all slices that go with it, in every member of the group. A
    weight that lies in two of its axes, as in a recurrent kernel, counts for each.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      criterion: `"l2"`, the root of the sum of w²; `"l1"`, the sum of `|w|`; `"taylor"`, the
        sum of `|w ∂L/∂w|`, the change of the loss of first order, weight by weight
        (LLM-Pruner's element-wise form); or a pytree shaped like `params` with a score
        for each weight, which are summed.
      gradients: of the loss, shaped like `params`; for `"taylor"`.
      apart: whether units of different layers of a scan, and of different heads, are
        scored apart, where they may be chosen so; see `Graph.within`.

    Returns:
      Scores, float32 [units], by name of the group; with `apart`,
      `[*owners, units]`.

    Raises:
      ValueError: if the criterion is not known, gradients are missing, or a tree does not
        have the leaves that were traced.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [1.0]])}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 1)))
      >>> jp.structured.score_groups(graph, params, "l2")
      {'down:0': array([5., 1.], dtype=float32)}

    References:
      Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models",
      arXiv 2305.11627, equations 3 and 5. Molchanov et al., "Importance Estimation for
      Neural Network Pruning", arXiv 1906.10771.
    """
    weights = by_path(graph, params, "params")
    if isinstance(criterion, str):
        scored = _by_name(graph, weights, criterion, gradients)
    else:
        scored = by_path(graph, criterion, "criterion")
    owners = graph._owners() if apart else {}
    found = {}
    for group in graph.groups:
        held = owners.get(group.members[0]._leaf, ())
        sizes = *(h.size for h in held), group.size
        sums = jnp.zeros(math.prod(sizes), jnp.float32)
        for member in group.members:
            if member.path.startswith(INPUT):
                continue
            x, places = scored[member.path], _numbers(graph, member, held)
            rest = tuple(i for i in range(x.ndim) if places.shape[i] == 1 < x.shape[i])
            each = _whole(
                jnp.sum(x, axis=rest, dtype=jnp.float32, keepdims=True)
            ).ravel()
            hit = np.flatnonzero(places >= 0)
            sums = sums.at[places.ravel()[hit]].add(each[hit])
        sums = jnp.sqrt(sums) if criterion_is(criterion, "l2") else sums
        found[group.name] = np.asarray(sums).reshape(sizes)
    return found


def _whole(x: Any) -> Any:
    """The same on every device, so that units can be found by number."""
    sharding = jax.typeof(x).sharding
    whole = sharding.update(spec=jax.P())
    return jax.sharding.reshard(x, whole) if any(sharding.spec) else x


def _numbers(graph: Graph, member: Member, held: tuple[Dim, ...]) -> np.ndarray:
    """Of the unit that each place belongs to, counted over all owners; -1 for none.

    It is of the rank of the leaf, of size 1 in axes that do not matter.
    """
    traced, axis = graph._traced, member.axis
    dims = traced.dims[traced.paths.index(member.path)]
    found = _local.along(dims, axis, member._leaf)
    ahead, step = np.zeros_like(found), member._leaf.size
    for h in held[::-1]:
        ahead = ahead + step * _local.along(dims, _local.axis_of(dims, axis, h), h)
        step *= h.size
    return np.where(found < 0, -1, found + ahead)


def criterion_is(criterion: Any, name: str) -> bool:
    """Whether it is this name, and no tree."""
    return isinstance(criterion, str) and criterion == name


def by_path(graph: Graph, tree: PyTree, name: str) -> dict[str, Any]:
    """Leaves of a tree like the parameters.

    Raises:
      ValueError: if a leaf is missing, or has another shape.
    """
    paths, leaves, _ = _tree.flatten(tree)
    found = {p: x for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)}
    for path, shape in graph.shapes.items():
        if path not in found:
            raise ValueError(
                f"{name}: there is no leaf {path}, which was traced. Pass a tree with the "
                f"leaves of the parameters. It has: {_tree.listing(list(found))}."
            )
        if np.shape(found[path]) != shape:
            raise ValueError(
                f"{name}: {path} has the shape {np.shape(found[path])}, and had {shape} when "
                "it was traced. Pass the parameters that the graph was traced with."
            )
    return found


def _by_name(graph: Graph, weights: dict[str, Any], criterion: str, gradients: PyTree):
    if criterion == "l2":
        return {p: jnp.square(as_real(x)) for p, x in weights.items()}
    if criterion == "l1":
        return {p: jnp.abs(as_real(x)) for p, x in weights.items()}
    if criterion != "taylor":
        raise ValueError(
            f"criterion: got {criterion!r}; expected 'l1', 'l2', 'taylor', or a pytree with "
            "a score for each weight."
        )
    if gradients is None:
        raise ValueError(
            "gradients: the criterion 'taylor' needs them. Pass gradients=jax.grad(loss)"
            "(params, batch)."
        )
    paths, leaves, _ = _tree.flatten(gradients)
    grads = {p: x for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)}
    found = {}
    for path, w in weights.items():
        g = grads.get(path)  # statistics and integers have none
        if g is None:
            found[path] = jnp.zeros(np.shape(w), jnp.float32)
        elif np.shape(g) != np.shape(w):
            raise ValueError(
                f"gradients: {path} has the shape {np.shape(g)}, and the weight has "
                f"{np.shape(w)}. Pass gradients of the parameters."
            )
        else:
            found[path] = jnp.abs(as_real(w) * as_real(g))
    return found


def as_real(x: Any) -> Any:
    """In float32 at least; 0 for what is no number, such as a key."""
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jnp.number):
        x = jnp.asarray(x)
        x = jnp.abs(x) if jnp.iscomplexobj(x) else x
        return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    return jnp.zeros(np.shape(x), jnp.float32)
