"""The plan that removes what training has brought to 0."""

from collections.abc import Sequence

import numpy as np

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._methods._scores import as_real, score_groups
from jaxprune.structured._plans import _choose
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._plans._planned import planned
from jaxprune.structured._reading._graph import Graph, Patterns, check_patterns, matches
from jaxprune.structured._reading._kinds import Kind


def without_zeros(
    graph: Graph,
    params: PyTree,
    *,
    kinds: Kind | Sequence[Kind] | None = None,
    ignore: Patterns = (),
) -> Plan:
    """The plan that removes the units whose weights are all 0, in every member.

    Layers of a scan and heads, where they may keep units of their own
    (`Graph.within`), keep as many as the one with the most, each its own, filled up with
    units that are 0. A group keeps at least one unit.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with, with zeros where they are pruned:
        after `jaxprune.neuroprune_fold`, or `masks.apply`.
      kinds: of groups to remove units of; all but `"layer"` and `"row"`.
      ignore: glob patterns of leaves that do not count, such as `"batch_stats/*"`: a
        variance is not 0 where weights are.

    Raises:
      ValueError: if no group is of these kinds, a leaf is missing or has another shape, or
        a pattern matches none.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> up, down = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[1.0], [0.0], [0.0]])
      >>> params = {"up": up, "down": down}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 1)))
      >>> plan = jp.structured.without_zeros(graph, params)
      >>> plan.shrink(params)["up"].tolist()
      [[1.0, 2.0]]
    """
    check_patterns("ignore", ignore, list(graph.shapes))
    nonzero = _tree.map_with_path(
        lambda path, x: (as_real(x) != 0) & (not matches(path, ignore)), params
    )
    counts = score_groups(graph, params, nonzero, apart=True)
    kept = {}
    for group in _choose.groups_of(graph, kinds):
        alive = counts[group.name] > 0
        n = max(int(alive.sum(-1).max()), group.minimum, 1)
        kept[group.name] = _choose.best(alive.astype(np.float64), n)
    return planned(graph, kept)
