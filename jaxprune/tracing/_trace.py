"""Reads a function once, without running it: every site of every leaf."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from jaxprune import _tree
from jaxprune._tree import PyTree, Where
from jaxprune.tracing import _layout, _moves, _walk
from jaxprune.tracing._sites import Reading, Site


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a function does with its parameters.

    Attributes:
      sites: in the order of evaluation.
      untraced: uses of leaves that are no sites, by path: names of primitives, or what
        else became of the leaf. A tied embedding has sites and is looked up too, so that
        it is in both.
      readings: the activations, by the number that sites have.
    """

    sites: tuple[Site, ...]
    untraced: dict[str, tuple[str, ...]]
    readings: tuple[Reading, ...]


def sites(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    where: Where = None,
    rules: Mapping[str, _walk.Rule] | None = None,
    batch_axes: Mapping[str, int | tuple[int, ...]] | None = None,
) -> Trace:
    """Where each leaf of `params` is contracted in `fn(params, *args)`.

    Leaves are followed through casts, transpositions, reshapes, slices, concatenations,
    elementwise operations with other parameters and constants, calls, checkpoints,
    functions with derivatives of their own, scans, `cond` and `while`, to products,
    convolutions and ragged products. Where a leaf goes anywhere else, it is reported.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters, or shapes of them.
      *args: an example: arrays or shapes of them.
      where: leaves to follow, as in `jaxprune.prune`; by default all.
      rules: by name of a primitive that is not known here, a function
        `rule(params, *operands) -> [Contraction, ...]` that says which operands it
        contracts. It gets the parameters of the equation and shapes of the operands; an
        operand in no contraction is reported.
      batch_axes: `{pattern: axes}`, contracted axes of a leaf that are to count as batch
        axes. A sum over experts, contracted together with their inputs, then is a matrix
        for each expert, without the terms between experts.

    Raises:
      ValueError: if a pattern matches no leaf, or a leaf lacks an axis.

    Example:
      >>> from jaxprune import tracing
      >>> def fn(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3)), "bias": jnp.ones(3)}
      >>> trace = tracing.sites(fn, params, jnp.ones((5, 2)))
      >>> [(site.path, site.matrix.K, site.matrix.N) for site in trace.sites]
      [('up', 2, 8), ('down', 8, 3)]
      >>> trace.untraced
      {'bias': ('add with an activation',)}
    """
    closed = jax.make_jaxpr(fn)(params, *args)
    return of_jaxpr(closed, params, where=where, rules=rules, batch_axes=batch_axes)


def of_jaxpr(
    closed: ClosedJaxpr,
    params: PyTree,
    *,
    where: Where = None,
    rules: Mapping[str, _walk.Rule] | None = None,
    batch_axes: Mapping[str, int | tuple[int, ...]] | None = None,
) -> Trace:
    """As `sites`, of a jaxpr whose first inputs are the leaves of `params`."""
    paths, leaves, _ = _tree.flatten(params)
    if where is None:
        chosen = [True] * len(paths)
    else:
        chosen = _tree.selection(params, where)
    found = [
        (path, leaf, yes)
        for path, leaf, yes in zip(paths, leaves, chosen, strict=True)
        if not _tree.is_hole(leaf)
    ]
    shapes = {path: leaf.shape for path, leaf, _ in found if hasattr(leaf, "shape")}
    walk = _walk.Walk(rules or {}, axes_by_leaf(shapes, batch_axes or {}))
    values = []
    for path, leaf, yes in found:
        shape = tuple(leaf.shape) if hasattr(leaf, "shape") else ()
        parts = (_moves.Part(path, shape, _layout.row_major(shape)),) if yes else ()
        values.append(_walk.Value(walk.fresh(), False, parts))
    rest = len(closed.jaxpr.invars) - len(values)
    values += [_walk.Value(walk.fresh(), True) for _ in range(rest)]
    out = walk.run(closed.jaxpr, closed.consts, values, _walk.Scope(()))
    for value in out:
        walk.note(value.parts, "the output")
    used = {s.path for s in walk.sites} | walk.others.keys()
    for path, _, yes in found:
        if yes and path not in used:
            walk.others[path] = ["not used"]
    untraced = {p: tuple(walk.others[p]) for p, _, _ in found if p in walk.others}
    return Trace(tuple(walk.sites), untraced, tuple(walk.readings))


def axes_by_leaf(
    shapes: Mapping[str, tuple[int, ...]],
    table: Mapping[str, int | tuple[int, ...]],
) -> dict[str, frozenset[int]]:
    """`batch_axes` of the leaves that have some, counted from the first axis."""
    _tree.check_patterns(list(shapes), table, name="batch_axes")
    axes: dict[str, frozenset[int]] = {}
    for path, shape in shapes.items():
        wanted = _tree.lookup(path, table)
        if wanted is None:
            continue
        wanted = wanted if isinstance(wanted, Iterable) else (wanted,)
        ndim = len(shape)
        for a in wanted:
            if not -ndim <= a < ndim:
                raise ValueError(
                    f"batch_axes: {path} has the shape {shape}, and no axis {a}. "
                    f"Pass axes of {path} between {-ndim} and {ndim - 1}."
                )
        axes[path] = frozenset(a % ndim for a in wanted)
    return axes
