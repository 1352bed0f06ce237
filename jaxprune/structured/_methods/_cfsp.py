"""CFSP's fine scores: shares of the weights, times the size of what they meet."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxprune._tree import PyTree
from jaxprune.calibration import Statistics
from jaxprune.structured._methods import _consumers
from jaxprune.structured._methods._scores import as_real, by_path
from jaxprune.structured._reading._graph import INPUT, Graph, Member
from jaxprune.structured._reading._kinds import Kind


def relative_activation(
    graph: Graph,
    params: PyTree,
    statistics: Statistics,
    *,
    power: float = 1.0,
    kinds: Sequence[Kind] = ("neuron",),
) -> dict[str, np.ndarray]:
    """Scores of neurons by their shares of weights and the size of their activation.

    With `x_j` the activation of a unit, `‖x_j‖ = √E[x_j²]`, W what reads it and V each
    matrix that makes it, such as gate and up:
    `(mean_i |W_ij| ‖x_j‖ / Σ_k |W_ik| ‖x_k‖ + Σ_V mean_i |V_ij| / Σ_k |V_ik|) ‖x_j‖^power`,
    where sums are over the units of the group, so that the shares of a matrix sum to 1,
    and means over the other axis of the matrix.

    Args:
      graph: of `trace`.
      params: the parameters that it was traced with.
      statistics: of `jaxprune.calibrate` with `"square"`.
      power: of the size of the activation.
      kinds: of groups to score.

    Returns:
      Scores [units] by name of the group, to be compared within the group: `plan` with
      `overrides=block_ratios(...)`.

    Raises:
      ValueError: if the statistic is missing, or no product sums over any of these units.

    Example:
      >>> def fn(params, x):
      ...     return (x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.array([[1.0, 3.0]]), "down": jnp.array([[1.0], [1.0]])}
      >>> x = jnp.array([[1.0], [-1.0]])
      >>> graph = jp.structured.trace(fn, params, x)
      >>> stats = jp.calibrate(fn, params, [x])
      >>> scores = jp.structured.relative_activation(graph, params, stats, kinds=("rank",))
      >>> scores["down:0"].tolist()
      [0.5, 4.5]

    References:
      Wang et al., "CFSP: An Efficient Structured Pruning Framework for LLMs with
      Coarse-to-Fine Activation Information", arXiv 2409.13199; their code was read, the
      paper's equations were not. The code divides by sums over the axis that it then
      averages over, so that the shares of all units are equal and only the activation
      decides; ours are shares among units.
    """
    leaves = by_path(graph, params, "params")
    found = {}
    for group in _consumers.groups_of(graph, kinds):
        uses = _consumers.consumers(group, statistics)
        if not uses:
            continue
        share = np.zeros(group.size)
        square, places = np.zeros(group.size), np.zeros(group.size)
        for use in uses:
            x = _consumers.statistic("relative_activation", use.inputs, "square")
            scores = jnp.abs(use.matrix(leaves)) * jnp.sqrt(x)[..., None]
            known = jnp.asarray(use.units >= 0)[..., None]
            share += use.pooled(_shares(jnp.where(known, scores, 0), 2), group.size)[0]
            sums, counts = use.pooled(x, group.size)
            square, places = square + sums, places + counts
        read = {use.site.path for use in uses}
        for m in group.members:
            own = m.path not in read and not m.path.startswith(INPUT)
            if own and len(graph.shapes[m.path]) > 1:
                share += _shares_of(m, leaves[m.path], group.size)
        found[group.name] = share * (square / np.maximum(places, 1)) ** (power / 2)
    if not found:
        raise _consumers.nothing_scored(graph, statistics.paths, kinds)
    return found


def _shares(x: Array, axis: int) -> Array:
    """Of sums along an axis, averaged over the last and over the first ones."""
    total = jnp.sum(x, axis=axis, keepdims=True)
    shares = x / jnp.where(total > 0, total, 1)
    return jnp.mean(shares, axis=-1) / x.shape[0]


def _shares_of(member: Member, leaf: Array, size: int) -> np.ndarray:
    """Shares of units in a leaf, averaged over all other axes."""
    units = member.units
    x = jnp.moveaxis(jnp.abs(as_real(leaf)), member.axis, 0).reshape(len(units), -1)
    x = jnp.where(jnp.asarray(units >= 0)[:, None], x, 0)
    total = jnp.sum(x, axis=0, keepdims=True)
    each = jnp.mean(x / jnp.where(total > 0, total, 1), axis=1)
    hit = units >= 0
    return np.bincount(units[hit], np.asarray(each, np.float64)[hit], size)
