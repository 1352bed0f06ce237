"""AMP: units by the size of what they give, averaged over tokens."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree
from jaxprune.structured._methods import _consumers, _taps
from jaxprune.structured._methods._flap import UNITS
from jaxprune.structured._methods._taps import TokenWeights, Use
from jaxprune.structured._reading._graph import Graph
from jaxprune.structured._reading._kinds import Kind


def amp(
    graph: Graph,
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    kinds: Sequence[Kind] = UNITS,
    projected: Sequence[Kind] = ("head", "kv_group"),
    token_weights: TokenWeights = None,
) -> dict[str, np.ndarray]:
    """Scores of units by what they give to the product that reads them.

    With x the inputs of that product which belong to a unit, and W their rows: the mean
    over tokens of `‖x W‖₁`, the part of the output that is the unit's, for kinds in
    `projected`; and of `‖x‖₁` for others. Heads are projected and neurons are not, as in
    the paper. `plan` with a `ratio` then removes as many from each layer.

    Args:
      graph: of `trace`.
      fn: the function that was traced: `fn(params, *args)`.
      params: the parameters that it was traced with.
      batches: tuples of arguments `args`; anything else is one argument.
      kinds: of groups to score.
      projected: kinds whose scores are of the output rather than the input.
      token_weights: `token_weights(*args)` gives a weight for each token, 0 for padding,
        as in `jaxprune.calibrate`.

    Returns:
      Scores [units] by name of the group. Sums over all products that read a unit, and
      over the layers of a scan. Groups that no product reads have no score.

    Raises:
      ValueError: if there is no batch, no unit is read by a product, or a product is none
        that is followed here, such as a convolution.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.array([[1.0, -1.0]]), "down": jnp.array([[2.0], [5.0]])}
      >>> x = jnp.array([[1.0], [-3.0]])
      >>> graph = jp.structured.trace(fn, params, x)
      >>> jp.structured.amp(graph, fn, params, [x])["down:0"].tolist()
      [0.5, 1.5]
      >>> jp.structured.amp(graph, fn, params, [x], projected=("neuron",))["down:0"].tolist()
      [1.0, 7.5]

    References:
      Mugnaini et al., "Efficient LLMs with AMP: Attention Heads and MLP Pruning", arXiv
      2504.21174, and their code. They average the means of prompts; we weigh all tokens
      alike.
    """

    def uses_of(trace: tracing.Trace) -> list[Use]:
        return _uses(graph, trace, kinds, projected)

    return _taps.means(fn, params, batches, uses_of, token_weights)


def _uses(graph: Graph, trace: tracing.Trace, kinds, projected) -> list[Use]:
    found = []
    for group in _consumers.groups_of(graph, kinds):
        for m in group.members:
            for site in (s for s in trace.sites if s.path == m.path):
                units = _consumers.units_of_inputs(site, m.units, m.axis)
                if units is None:
                    continue
                measure = functools.partial(
                    _by_unit, units=units[0], size=group.size,
                    projected=group.kind in projected,
                )  # fmt: skip
                reading = trace.readings[site.activation]
                found.append(Use(group.name, site, reading, group.size, measure))
    if not found:
        groups = [f"{g.name} ({g.kind})" for g in graph.groups]
        raise ValueError(
            f"kinds: no product sums over the units of a group of the kinds {tuple(kinds)}. "
            f"The groups are: {_tree.listing(groups)}."
        )
    return found


def _by_unit(
    x: Float[Array, "batch K rows"],
    w: Float[Array, "batch K N"],
    weights: Float[Array, " rows"],
    *,
    units: np.ndarray,  # [batch, K]
    size: int,
    projected: bool,
) -> Float[Array, " units"]:
    """Sums over rows of `‖x‖₁` or `‖x W‖₁`, of the inputs of each unit."""
    x = x * weights
    if not projected:
        each = jnp.sum(jnp.abs(x), axis=-1).reshape(-1)
        places = units.reshape(-1)
        hit = np.flatnonzero(places >= 0)
        return jnp.zeros(size).at[places[hit]].add(each[hit])
    most = max(np.bincount(row[row >= 0], minlength=size).max() for row in units)
    index = np.zeros((size, len(units), most), int)
    there = np.zeros((size, len(units), most), bool)
    for b, row in enumerate(units):
        for u in range(size):
            places = np.flatnonzero(row == u)
            index[u, b, : len(places)] = places
            there[u, b, : len(places)] = True

    def one(of_unit: tuple[Array, Array]) -> Array:
        places, mask = of_unit  # [batch, places of a unit]
        a, b = (jnp.take_along_axis(m, places[..., None], axis=1) for m in (x, w))
        a = jnp.where(mask[..., None], a, 0)
        y = jnp.einsum("bkr,bkn->brn", a, b, precision=lax.Precision.HIGHEST)
        return jnp.sum(jnp.abs(y))

    return lax.map(one, (jnp.asarray(index), jnp.asarray(there)))
