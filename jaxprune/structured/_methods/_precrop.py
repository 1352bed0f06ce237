"""PreCropping: channels cut before training, by the densities of layers alone."""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from jaxprune import _tree
from jaxprune.structured._plans import _choose
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._reading._graph import Graph


def precrop(graph: Graph, densities: Mapping[str, float | Fraction]) -> Plan:
    """The plan that keeps the first `√p` of the units that a leaf of density `p` puts out.

    A kernel keeps `√p` of its outputs, and of its inputs what the layer before puts out:
    `p` of its weights where that layer has the same density, otherwise more or less;
    `plan.after` says what is left of the whole. It is for fresh weights, which are all
    alike, so that any units may go: the first ones stay. Where several leaves put out the
    same units, as along a residual stream, the densest of them decides.

    The densities come from `jaxprune.allocation.water_filling`, the paper's own, or from
    any other allocation or unstructured masks. Read for this: the abstracts of both
    versions; how coupled layers are served is ours.

    Args:
      graph: of `trace`.
      densities: share of weights kept, in (0, 1], by path of the leaf. Groups whose units
        are put out by none of these stay whole.

    Returns:
      A plan; `plan.shrink(params)` crops what an initialiser has drawn, whose scale is
      still that of the wide layers: draw anew by `plan.small_shapes` where that matters.

    Raises:
      ValueError: if a density is out of range, or a path is not known.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
      >>> sparsities = jp.allocation.water_filling({"up": (2, 8), "down": (8, 3)}, 0.75)
      >>> densities = {path: 1 - s for path, s in sparsities.items()}
      >>> jp.structured.precrop(graph, densities).shrink(params)["up"].shape
      (2, 4)

    References:
      Cai et al., Structured Pruning is All You Need for Pruning CNNs at Initialization,
      arXiv 2203.02549.
    """
    for path, density in densities.items():
        if path not in graph.shapes:
            raise ValueError(
                f"densities: there is no leaf {path}. The leaves are: "
                f"{_tree.listing(list(graph.shapes))}."
            )
        if not 0 < density <= 1:
            raise ValueError(
                f"densities: got {float(density)} for {path}; expected the share of its "
                "weights that is kept, above 0 and at most 1."
            )
    kept = {}
    for group in graph.as_groups(readers=False).groups:
        found = [densities[m.path] for m in group.members if m.path in densities]
        if found:
            number = round(group.size * math.sqrt(max(found)))
            number = max(number, graph[group.name].minimum, 1)
            kept[group.name] = np.arange(min(number, group.size))
    return _choose.planned(graph, kept)
