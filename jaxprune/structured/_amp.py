"""AMP: units by the size of what they give, averaged over tokens."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree
from jaxprune.structured import _consumers
from jaxprune.structured._flap import UNITS
from jaxprune.structured._kinds import Kind
from jaxprune.structured._trace import Graph


class _Sums(NamedTuple):
    """Sums over tokens, one for each unit, and how many tokens."""

    sums: Float[Array, "*stack units"]
    tokens: Float[Array, "*stack"]


class _Use(NamedTuple):
    """A product that sums over the units of a group."""

    group: str
    site: tracing.Site
    reading: tracing.Reading
    units: np.ndarray  # [batch, K]
    size: int
    projected: bool


def amp(
    graph: Graph,
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    kinds: Sequence[Kind] = UNITS,
    projected: Sequence[Kind] = ("head", "kv_group"),
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
    total: dict[Any, _Sums] = {}
    steps: dict[Any, Any] = {}
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        key = tuple(map(jax.typeof, jax.tree.leaves(args))), jax.tree.structure(args)
        if key not in steps:
            steps[key] = _step(graph, fn, params, args, kinds, projected)
        uses, step = steps[key]
        for use, new in zip(uses, step(params, args), strict=True):
            place = use.group, use.site.place
            total[place] = _add(total[place], new) if place in total else new
    if not steps:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for fn."
        )
    found: dict[str, np.ndarray] = {}
    for (group, _), x in total.items():
        mean = np.asarray(x.sums, np.float64) / np.asarray(x.tokens)[..., None]
        found[group] = found.get(group, 0) + mean.reshape(-1, mean.shape[-1]).sum(0)
    return found


def _step(graph: Graph, fn, params: PyTree, args, kinds, projected):
    """What is read in a batch of these shapes, and a compiled function that reads it."""
    closed = jax.make_jaxpr(fn)(params, *args)
    trace = tracing.of_jaxpr(closed, params)
    uses = _uses(graph, trace, kinds, projected)
    if not uses:
        groups = [f"{g.name} ({g.kind})" for g in graph.groups]
        raise ValueError(
            f"kinds: no product sums over the units of a group of the kinds {tuple(kinds)}. "
            f"The groups are: {_tree.listing(groups)}."
        )
    taps = {i: _tap(use) for i, use in enumerate(uses)}

    @jax.jit
    def step(params: PyTree, args: tuple[Any, ...]) -> list[_Sums]:
        leaves = [x for x in _tree.flatten(params)[1] if not _tree.is_hole(x)]
        _, found = tracing.tap(closed, [*leaves, *jax.tree.leaves(args)], taps)
        return [found[i] for i in range(len(uses))]

    return uses, step


def _uses(graph: Graph, trace: tracing.Trace, kinds, projected) -> list[_Use]:
    found = []
    for group in _consumers.groups_of(graph, kinds):
        for m in group.members:
            for site in (s for s in trace.sites if s.path == m.path):
                units = _consumers.units_of_inputs(site, m.units, m.axis)
                if units is None:
                    continue
                reading = trace.readings[site.activation]
                _check(site, reading, units)
                big = group.kind in projected
                found.append(_Use(group.name, site, reading, units[0], group.size, big))
    return found


def _check(site: tracing.Site, reading: tracing.Reading, units: np.ndarray) -> None:
    why = ""
    if site.primitive != "dot_general":
        why = f"is used in a {site.primitive}"
    elif reading.place != site.place or reading.indices or reading.moved:
        why = "shares what it is multiplied with, or is indexed with a computed number"
    elif any(w is not None for w in reading.windows):
        why = "meets a part of an activation"
    elif (units != units[:1]).any():
        why = "has other units in other layers"
    if why:
        raise ValueError(
            f"kinds: {site.path} {why}, which is not followed here. Leave its group out with "
            "kinds=, or score it otherwise, such as by fluctuation."
        )


def _tap(use: _Use) -> tracing.Tap:
    reading = use.reading

    def read(eqn: Any, operands: Sequence[Any], indices: Any) -> _Sums:
        x, w = operands[reading.operand], operands[1 - reading.operand]
        own, other = _axes(eqn, reading.operand)
        pairs = dict(zip(own, other, strict=True))
        first = (*reading.batch_axes, *reading.k_axes)
        batch, k = reading.shape
        x = jnp.moveaxis(x, first, range(len(first)))
        w = jnp.moveaxis(w, [pairs[a] for a in first], range(len(first)))
        x, w = (a.astype(jnp.float32).reshape(batch, k, -1) for a in (x, w))
        sums = _by_unit(x, w if use.projected else None, use.units, use.size)
        return _Sums(sums, jnp.full((), x.shape[2], jnp.float32))

    zero = jax.eval_shape(lambda: _Sums(jnp.zeros(use.size), jnp.zeros(())))
    return tracing.Tap(
        place=reading.place, read=read, merge=_add, zero=zero, loops=reading.loops
    )


def _axes(eqn: Any, operand: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of an operand that meet axes of the other: contracted, and batch axes."""
    contracted, batch = eqn.params["dimension_numbers"]
    own, other = ((*contracted[i], *batch[i]) for i in (operand, 1 - operand))
    return own, other


def _by_unit(
    x: Float[Array, "batch K rows"],
    w: Float[Array, "batch K N"] | None,
    units: np.ndarray,
    size: int,
) -> Float[Array, " units"]:
    """Sums over rows of `‖x‖₁` or `‖x W‖₁`, of the inputs of each unit."""
    if w is None:
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


def _add(a: _Sums, b: _Sums) -> _Sums:
    return _Sums(a.sums + b.sums, a.tokens + b.tokens)
