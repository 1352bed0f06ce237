"""Reads which axes of which leaves lose their units together, off the jaxpr of a function.

DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900) finds
such groups from a graph of modules. Here they come from the primitives of a jaxpr, with
factors and segments of axes, and nothing is guessed: what is not understood stays whole.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._reading import (
    _dims,
    _kinds,
    _values,
    _zeros,
)
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._graph import (
    INPUT,
    Graph,
    Group,
    Member,
    Patterns,
    Traced,
    check_patterns,
    matches,
)
from jaxprune.structured._reading._propagate import Program, Propagation, Rule
from jaxprune.structured._reading._values import Operand
from jaxprune.tracing._walk import CALLS


def trace(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    ignore: Patterns = (),
    tie: Iterable[tuple[str, str]] = (),
    freeze_outputs: bool | Patterns = True,
    resizable_inputs: Patterns = (),
    rules: Mapping[str, Rule] | None = None,
) -> Graph:
    """Groups of units of `params` that `fn(params, *args)` can do without.

    The function is traced once, on shapes. Each axis of each value is a dimension;
    primitives say which of them are one. Dimensions of inputs and outputs keep their
    sizes, and so does everything that passes a primitive which mixes units in a way that
    is not followed, such as a sort; `frozen` says which, and why.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: all variables that depend on the sizes, batch statistics too; or shapes.
      *args: an example: arrays or shapes of them.
      ignore: glob patterns of leaves all of whose axes stay as they are.
      tie: pairs of names of groups that lose the same units, though the function does
        not couple them: a module may ask for query and value heads of one width.
      freeze_outputs: whether outputs keep their shapes; or glob patterns of those that
        do, by path, such as `"0"` where new batch statistics are the second output.
      resizable_inputs: glob patterns of arguments that may become smaller, such as
        `"1/*"` for a cache of keys and values that is the third argument of `fn`: paths
        in the tuple of the arguments behind `params`. Outputs that go with them do too.
      rules: by name of a primitive that is not known here, what it does with axes.

    Raises:
      ValueError: if a pattern matches nothing, `tie` names no groups of one size, or two
        leaves have one path.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]
      >>> params = {"up": jnp.ones((2, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 3))}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
      >>> [(g.name, g.kind, g.size) for g in graph.groups]
      [('down:0', 'neuron', 8)]
      >>> [(m.path, m.axis) for m in graph.groups[0].members]
      [('bias', 0), ('down', 0), ('up', 1)]
      >>> graph.frozen
      {'down:1': ('output',), 'up:0': ('input 0',)}
    """
    traced = read(fn, params, args, rules)
    _check_unique(traced.paths)
    check_patterns("ignore", ignore, traced.paths)
    check_patterns("resizable_inputs", resizable_inputs, traced.input_paths)
    for path, dims in zip(traced.paths, traced.dims, strict=True):
        if matches(path, ignore):
            _dims.freeze(dims, "ignored")
    for dims, used in zip(traced.dims, _used(traced.program), strict=False):
        if not used:  # those of inputs follow
            _dims.freeze(dims, "not used")
    resizable: set[Dim] = set()
    for path, dims in zip(traced.input_paths, traced.inputs, strict=True):
        if matches(path, resizable_inputs):
            resizable |= {leaf for d in dims for leaf in _dims.leaves(d)}
        else:
            _dims.freeze(dims, f"input {path}")
    resizable = {leaf for d in resizable for leaf in _dims.leaves(d)}
    for out in _fixed(traced, freeze_outputs):
        for leaf in (x for d in out.dims for x in _dims.leaves(d)):
            if leaf not in resizable:
                _dims.freeze(leaf, "output")
    axes = _axes(traced, resizable_inputs)
    for pair in tie:
        _tie(axes, pair)
    paths, found, _ = _tree.flatten(params)
    leaves = {p: x for p, x in zip(paths, found, strict=True) if not _tree.is_hole(x)}
    groups, frozen = _grouped(traced, axes, rules or {})
    return Graph(
        groups=groups,
        frozen=frozen,
        unknown=dict(traced.unknown),
        shapes={p: _values.shape_of(x) for p, x in leaves.items()},
        _traced=traced,
        _dtypes={p: jax.dtypes.result_type(x) for p, x in leaves.items()},
        _rules=rules or {},
    )


def read(
    fn: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    rules: Mapping[str, Rule] | None,
) -> Traced:
    """Dimensions of everything in `fn(params, *args)`; nothing is frozen by its place."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
    _values.check_sizes(closed.jaxpr.invars)
    paths, inputs = _tree.paths(params), _tree.paths(args)
    dims = [_dims.fresh(v.aval.shape) for v in closed.jaxpr.invars]
    operands = [Operand(d, i >= len(paths)) for i, d in enumerate(dims)]
    propagation = Propagation(rules)
    program = propagation.run(closed.jaxpr, closed.consts, operands)
    return Traced(
        program,
        tuple(paths),
        tuple(dims[: len(paths)]),
        tuple(inputs),
        tuple(dims[len(paths) :]),
        jax.tree.structure(shape),
        propagation.unknown,
    )


def _fixed(traced: Traced, which: bool | Patterns) -> list[Operand]:
    """Outputs that keep their shapes."""
    outs = list(traced.program.outs)
    if isinstance(which, bool):
        return outs if which else []
    paths = _tree.paths(traced.out_tree.unflatten(range(len(outs))))
    check_patterns("freeze_outputs", which, paths)
    return [x for p, x in zip(paths, outs, strict=True) if matches(p, which)]


def _used(program: Program) -> list[bool]:
    """Whether anything is done with each operand."""
    place = {id(v): i for i, v in enumerate(program.jaxpr.invars)}
    used = [False] * len(place)
    for x in program.jaxpr.outvars:
        if id(x) in place:
            used[place[id(x)]] = True
    for record in program.records:
        eqn = record.eqn
        call = eqn.primitive.name in CALLS
        inner = _used(record.inner[0]) if call else [True] * len(eqn.invars)
        for x, is_used in zip(eqn.invars, inner, strict=True):
            if is_used and id(x) in place:
                used[place[id(x)]] = True
    return used


def _axes(traced: Traced, resizable: Patterns) -> list[tuple[str, int, Dim]]:
    """Axes that may become smaller: of parameters, then of resizable inputs."""
    found = list(zip(traced.paths, traced.dims, strict=True))
    for path, dims in zip(traced.input_paths, traced.inputs, strict=True):
        if matches(path, resizable):
            found.append((f"{INPUT}{path}", dims))
    return [(path, i, d) for path, dims in found for i, d in enumerate(dims)]


def _grouped(
    traced: Traced,
    axes: Sequence[tuple[str, int, Dim]],
    rules: Mapping[str, Rule],
) -> tuple[tuple[Group, ...], dict[str, tuple[str, ...]]]:
    of_params = len([d for dims in traced.dims for d in dims])
    met: dict[Dim, list[tuple[str, int, Dim]]] = {}
    frozen: dict[str, tuple[str, ...]] = {}
    for i, (path, axis, d) in enumerate(axes):
        parts = _dims.leaves(d)
        for k, leaf in enumerate(parts):
            if leaf.size > 1 and leaf.frozen:
                name = f"{path}:{axis}" + (f".{k}" if len(parts) > 1 else "")
                frozen[name] = tuple(leaf.frozen)
        for leaf in dict.fromkeys(parts):
            if leaf.size > 1 and not leaf.frozen and (i < of_params or leaf in met):
                met.setdefault(leaf, []).append((path, axis, d))
    names = {leaf: _name(leaf, places, traced) for leaf, places in met.items()}
    resized = {path for path, _, _ in axes}
    zeroed = [*traced.dims]
    for path, dims in zip(traced.input_paths, traced.inputs, strict=True):
        zeroed.append(dims if f"{INPUT}{path}" in resized else ())
    notes = _zeros.look(traced.program, zeroed, set(met), rules).notes
    groups = []
    for leaf, places in met.items():
        members = tuple(
            Member(path, axis, _expression(d, leaf, names[leaf]), d, leaf)
            for path, axis, d in places
        )
        what = _kinds.kind(leaf, [d for _, _, d in places])
        why = tuple(notes.get(leaf, ()))
        groups.append(
            Group(
                names[leaf], what, leaf.size, min(leaf.minimum, leaf.size), members, why
            )
        )
    return tuple(groups), frozen


def _name(leaf: Dim, places: Sequence[tuple[str, int, Dim]], traced: Traced) -> str:
    """Of an axis that is nothing else, of the leaf with the most axes, where it can be."""
    ranks = {p: len(dims) for p, dims in zip(traced.paths, traced.dims, strict=True)}

    def order(place: tuple[str, int, Dim]) -> tuple[Any, ...]:
        path, _, d = place
        return path not in ranks, _dims.find(d) is not leaf, -ranks.get(path, 0)

    path, axis, d = min(places, key=order)
    parts = _dims.leaves(d)
    return f"{path}:{axis}" + (f".{parts.index(leaf)}" if len(parts) > 1 else "")


def _expression(d: Dim, leaf: Dim, name: str) -> str:
    d = _dims.find(d)
    if d.form == "leaf":
        return name if d is leaf else str(d.size)
    sign = "*" if d.form == "product" else "+"
    return f"({sign.join(_expression(p, leaf, name) for p in _dims.parts(d))})"


def _tie(axes: Sequence[tuple[str, int, Dim]], pair: tuple[str, str]) -> None:
    known: dict[str, Dim] = {}
    if isinstance(pair, str) or len(pair) != 2:
        raise ValueError(
            f"tie: got {pair!r}; expected pairs of names, such as [('q:1', 'v:1')]."
        )
    for path, axis, d in axes:
        parts = _dims.leaves(d)
        known[f"{path}:{axis}"] = d
        known.update({f"{path}:{axis}.{k}": x for k, x in enumerate(parts)})
    for name in pair:
        if name not in known:
            raise ValueError(
                f"tie: no axis is called {name!r}. Write path:axis, or path:axis.part as "
                f"groups are named. The axes are: {_tree.listing(list(known))}."
            )
    a, b = (_dims.find(known[name]) for name in pair)
    if a.size != b.size:
        raise ValueError(
            f"tie: {pair[0]} has {a.size} units and {pair[1]} has {b.size}. Tie groups of "
            "one size."
        )
    _dims.unify(a, b)


def _check_unique(paths: Sequence[str]) -> None:
    if twice := [p for p, n in collections.Counter(paths).items() if n > 1]:
        raise ValueError(
            f"params: several leaves have the path {twice[0]}, so that they cannot be told "
            "apart. A leading params/ and a / in a key do not count. Rename one of them."
        )
