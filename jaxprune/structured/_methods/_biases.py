"""Biases that take over what removed units gave on average."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.calibration import SiteInputs, Statistics
from jaxprune.structured._methods._consumers import (
    check_alike,
    kept_inputs,
    statistic,
    trace_of,
)
from jaxprune.structured._methods._scores import by_path
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._facts import PRODUCTS, Fact, Facts, follow
from jaxprune.structured._reading._graph import Graph
from jaxprune.structured._reading._propagate import Record


def compensate(
    graph: Graph, plan: Plan, params: PyTree, statistics: Statistics
) -> PyTree:
    """Adds to biases what the units that a plan removes give on average.

    Where a product `x W + b` loses the inputs P, `b` becomes `b + Σ_{j in P} E[x_j] W_j`:
    exact where these inputs are constant, and otherwise the best constant in the mean
    square. In a convolution with padding the mean is over all windows, also those at
    borders, so that a constant input is exact only without padding. The means are those
    of the full model; what a plan removes earlier in the model changes them.

    Args:
      graph: of `trace`.
      plan: of this graph.
      params: of full size.
      statistics: of `jaxprune.calibrate` with `"mean"` (or `"variance"`), of these
        parameters.

    Returns:
      The parameters, of full size, with new biases: for `plan.shrink` or `plan.mask`.

    Raises:
      ValueError: if a statistic is missing, or a product that loses inputs has no bias of
        its own; `add_biases` gives it one.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"] + 1) @ params["down"] + params["bias"]
      >>> params = {
      ...     "up": jnp.array([[0.0, 1.0]]), "down": jnp.ones((2, 1)), "bias": jnp.zeros(1)
      ... }
      >>> x = jnp.array([[1.0], [2.0]])
      >>> graph = jp.structured.trace(fn, params, x)
      >>> plan = jp.structured.planned(graph, {"down:0": [1]})
      >>> stats = jp.calibrate(fn, params, [x], statistics=("mean",))
      >>> new = jp.structured.compensate(graph, plan, params, stats)
      >>> new["bias"].tolist(), plan.rewrite(fn)(plan.shrink(new), x).tolist()
      ([1.0], [[3.0], [4.0]])

    References:
      An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
      arXiv 2312.11983 (baseline bias compensation).
    """
    check_alike(plan)
    leaves = by_path(graph, params, "params")
    known = biases(graph)
    _check_statistics(graph, plan, params, statistics)
    shifts: dict[str, Array] = {}
    for path in plan.cuts:
        for use in statistics[path] if path in statistics else ():
            kept = kept_inputs(plan, use.site)
            if kept is None:
                continue
            bias = known.get(path)
            if bias is None or not _fits(graph, use, bias):
                raise ValueError(
                    f"params: {path} loses inputs, and no bias of its own is added to what "
                    "it is multiplied with. Give it one before tracing: fn, params = "
                    f"structured.add_biases(fn, params, *args, where={path!r})."
                )
            shifts[path] = _shift(use, leaves[path], kept)
    new = {}
    for path, shift in shifts.items():
        b = leaves[known[path]]
        wide = jnp.asarray(b, jnp.promote_types(b.dtype, jnp.float32))
        new[known[path]] = (wide + shift.reshape(b.shape)).astype(b.dtype)
    return replaced(params, new)


def _check_statistics(
    graph: Graph, plan: Plan, params: PyTree, statistics: Statistics
) -> None:
    for site in trace_of(graph, params).sites:
        if site.path not in statistics and kept_inputs(plan, site) is not None:
            raise ValueError(
                f"statistics: {site.path} loses inputs, and there are no statistics of them. "
                "Leave where= out of jaxprune.calibrate, or let it choose this leaf too."
            )


def replaced(params: PyTree, new: dict[str, Array]) -> PyTree:
    """The tree with other leaves at some paths."""
    paths, leaves, treedef = _tree.flatten(params)
    return treedef.unflatten(
        [new.get(p, x) for p, x in zip(paths, leaves, strict=True)]
    )


def _shift(use: SiteInputs, leaf: Array, kept: np.ndarray) -> Array:
    """What the removed inputs give on average: the leaf without its contracted axes."""
    site = use.site
    mean = statistic("compensate", use.inputs, "mean")
    lost = jnp.where(kept, 0, mean)[..., None]  # [stack, batch, K, 1]
    weights = site.to_matrix(leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
    each = site.from_matrix(weights * lost, jnp.zeros(leaf.shape, jnp.float32))
    return jnp.sum(each, axis=site.axes[2] if site.axes else ())


class _Walk:
    """Looks for leaves that are added to products of other leaves.

    Attributes:
      added: by kernel, what is done with its products: the leaf that is added, or `None`
        for anything else.
      uses: of each leaf, how many, but for moves.
    """

    def __init__(self):
        self.added: dict[str, set[str | None]] = {}
        self.uses: dict[str, int] = {}

    def step(self, record: Record, facts: list[Fact | None]) -> Facts:
        """One equation."""
        name, none = record.eqn.primitive.name, [None] * len(record.eqn.outvars)
        given = [f for f in facts if f is not None]
        leaves = [f for f in given if f.kind == "leaf"]
        products = [f for f in given if f.kind == "product"]
        if name == "add" and len(products) == len(leaves) == 1:
            self.lost(leaves)
            self.added.setdefault(products[0].path, set()).add(leaves[0].path)
            return none
        self.lost(facts)
        if name in PRODUCTS and len(leaves) == len(given) == 1:
            return [Fact("product", leaves[0].path)]
        return none

    def lost(self, facts: Facts) -> None:
        """Values that go where they are no longer followed."""
        for f in facts:
            if f is not None and f.kind == "product":
                self.added.setdefault(f.path, set()).add(None)
            elif f is not None:
                self.uses[f.path] = self.uses.get(f.path, 0) + 1


def biases(graph: Graph) -> dict[str, str]:
    """By path of a kernel, the leaf that is added to its product, and to nothing else."""
    traced = graph._traced
    walk = _Walk()
    facts = [*(Fact("leaf", p) for p in traced.paths), *(None for _ in traced.inputs)]
    walk.lost(follow(traced.program, facts, walk.step, walk.lost))
    found = {}
    for kernel, leaves in walk.added.items():
        bias = next(iter(leaves))
        alone = len(leaves) == 1 and walk.uses[kernel] == 1
        if bias is not None and alone and walk.uses[bias] == 1:
            found[kernel] = bias
    return found


def _fits(graph: Graph, use: SiteInputs, bias: str) -> bool:
    """Whether the axes of the bias are those of the kernel that are not contracted."""
    traced = graph._traced
    dims = dict(zip(traced.paths, traced.dims, strict=True))
    if use.site.axes is None:
        return False
    kernel = [
        d for i, d in enumerate(dims[use.site.path]) if i not in use.site.axes[2]
    ]  # fmt: skip
    a, b = (
        [leaf for d in axes for leaf in _dims.leaves(d) if leaf.size > 1]
        for axes in (kernel, dims[bias])
    )
    return a == b
