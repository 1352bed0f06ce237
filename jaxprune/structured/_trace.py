"""Reads which axes of which leaves lose their units together, off the jaxpr of a function.

DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900) finds
such groups from a graph of modules. Here they come from the primitives of a jaxpr, with
factors and segments of axes, and nothing is guessed: what is not understood stays whole.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._groups import Groups
from jaxprune._tree import PyTree
from jaxprune.structured import (
    _coupled,
    _dims,
    _kinds,
    _local,
    _picture,
    _state,
    _values,
    _zeros,
)
from jaxprune.structured._dims import Dim
from jaxprune.structured._kinds import Kind
from jaxprune.structured._propagate import Program, Propagation, Rule
from jaxprune.structured._values import Dims, Operand
from jaxprune.tracing._walk import CALLS

Patterns = str | Sequence[str]


class Traced(NamedTuple):
    """A function, read.

    Attributes:
      program: all of it.
      paths: of the leaves of the parameters.
      dims: of these leaves.
      input_paths: of the leaves of the other arguments.
      inputs: dimensions of these.
      out_tree: treedef of the output.
      unknown: primitives that are not known, and how often they came.
    """

    program: Program
    paths: tuple[str, ...]
    dims: tuple[Dims, ...]
    input_paths: tuple[str, ...]
    inputs: tuple[Dims, ...]
    out_tree: Any
    unknown: dict[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One axis of one leaf that loses units.

    Attributes:
      path: of the leaf.
      axis: which.
      expression: how the axis is made of parts, such as `(heads*(32+32))`: the group is
        written by its name, other parts by their sizes.
    """

    path: str
    axis: int
    expression: str
    _dim: Dim = dataclasses.field(repr=False)
    _leaf: Dim = dataclasses.field(repr=False)

    @property
    def units(self) -> np.ndarray:
        """For each place along the axis the unit that it belongs to, or -1."""
        return _dims.units(self._dim, self._leaf)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units that are removed one by one, each with all its slices.

    Attributes:
      name: path and axis of one of its members, such as `layers/0/up/kernel:1`; with the
        position of a part, such as `attn/qkv:1.2`, where an axis has several.
      kind: what the units are, told from what is done along them: a label for choosing
        and reading, on which nothing else depends. A `row` is one of a table.
      size: how many units.
      minimum: how many must stay.
      members: axes of leaves of the parameters, and of resizable inputs.
      notes: why a function without some of the units may differ from the one where their
        weights are 0; empty where both are equal.
    """

    name: str
    kind: Kind
    size: int
    minimum: int
    members: tuple[Member, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The coupled groups of a function; `str(graph)` is a table of them.

    Attributes:
      groups: what can be pruned.
      frozen: axes of leaves that cannot, or parts of axes, by name; and why.
      unknown: names of primitives that have no rule, and how often they came.
      shapes: of the leaves, by path.
    """

    groups: tuple[Group, ...]
    frozen: dict[str, tuple[str, ...]]
    unknown: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    _traced: Traced = dataclasses.field(repr=False)
    _dtypes: dict[str, Any] = dataclasses.field(repr=False)
    _rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Group:
        """The group of this name, or of an axis `path:axis` that is all of a member."""
        for group in self.groups:
            axes = (
                f"{m.path}:{m.axis}"
                for m in group.members
                if m.expression == group.name
            )
            if name in (group.name, *axes):
                return group
        names = _tree.listing([g.name for g in self.groups])
        why = (
            f" It is frozen: {'; '.join(self.frozen[name])}."
            if name in self.frozen
            else ""
        )
        raise KeyError(f"no group is called {name!r}.{why} The groups are: {names}.")

    def as_groups(
        self,
        *,
        kinds: Sequence[Kind] | None = None,
        ignore: Patterns = (),
        readers: bool = True,
    ) -> Groups:
        """The groups as data, for methods that prune whole units while they train.

        Leaves of integers, which no optimizer trains, are no members.

        Args:
          kinds: of groups to take. By default all but `"layer"` and `"row"`.
          ignore: glob patterns of leaves that are left out, such as `"batch_stats/*"`,
            which no optimizer trains.
          readers: whether axes along which a leaf is contracted belong to the units.
            Without these, a unit is what puts it out: its column of the kernel, its bias,
            its scale. If what follows maps 0 to 0, as relu does, zeros there are enough
            for the unit to do nothing: the zero-invariant groups of OTO (Chen et al.,
            arXiv 2107.07467), in which no weight lies twice.

        Raises:
          ValueError: if nothing is left, or a pattern matches no leaf.

        Example:
          >>> def fn(params, x):
          ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
          >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
          >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
          >>> graph.as_groups().paths, graph.as_groups(readers=False).paths
          (('down', 'up'), ('up',))
        """
        _check_patterns("ignore", ignore, list(self.shapes))
        reads = set()
        if not readers:
            leaves = {p: (s, self._dtypes[p]) for p, s in self.shapes.items()}
            traced = self._traced
            reads = _coupled.readers(traced.program, traced.paths, leaves)

        def stays(m: Member) -> bool:
            if m.path.startswith(INPUT) or _matches(m.path, ignore):
                return False
            trained = jnp.issubdtype(self._dtypes[m.path], jnp.floating)
            return trained and (m.path, m.axis) not in reads

        return _coupled.as_groups(self.groups, kinds, stays)

    def within(self, name: str) -> tuple[str, ...]:
        """Groups for each unit of which a group may keep units of its own.

        Layers of a scan, and heads, keep as many units each, but may keep other ones, where
        nothing relates those of one to those of another; see `structured.planned`.

        Args:
          name: of the group, as `graph[name]` knows it.

        Returns:
          Names of groups, in the order of the axes of such an array; often none.
        """
        leaf = self[name].members[0]._leaf
        names = {g.members[0]._leaf: g.name for g in self.groups}
        return tuple(names[h] for h in self._owners()[leaf])

    def _owners(self) -> dict[Dim, tuple[Dim, ...]]:
        among = [g.members[0]._leaf for g in self.groups]
        found = _local.owners(self._traced.program, among, self._rules)
        for g in self.groups:
            if any(m.path.startswith(INPUT) for m in g.members):
                found[g.members[0]._leaf] = ()  # inputs are cut the same everywhere
        return _local.one_way(found)

    def plot(self, plan: Any = None, *, where: Patterns = "*", ax: Any = None) -> Any:
        """Draws where the units of each group lie; needs matplotlib.

        A row is a leaf, a strip one of its axes, and a colour a group; odd units are a
        little lighter. Where several groups make up an axis, as heads and their width do,
        the strip has a layer for each.

        Args:
          plan: of this graph, if any: places that it removes are white.
          where: glob patterns of the leaves to draw.
          ax: axes of matplotlib; without them there is a new figure.

        Returns:
          The axes.

        Raises:
          ValueError: if a pattern matches no leaf.
        """
        paths = [p for p, shape in self.shapes.items() if shape]
        _check_patterns("where", where, paths)
        paths = [p for p in paths if _matches(p, where)]
        return _picture.draw(self, paths, plan, ax)

    def __str__(self) -> str:
        rows = [("group", "kind", "units", "axes", "notes")]
        for g in self.groups:
            axes = len(g.members)
            rows.append((g.name, g.kind, str(g.size), str(axes), "; ".join(g.notes)))
        lines = align(rows)
        lines += [f"frozen: {n}: {'; '.join(why)}" for n, why in self.frozen.items()]
        lines += [
            f"unknown primitive: {n} ({k} times)" for n, k in self.unknown.items()
        ]
        return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


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
    _state.check_unique(traced.paths)
    _check_patterns("ignore", ignore, traced.paths)
    _check_patterns("resizable_inputs", resizable_inputs, traced.input_paths)
    for path, dims in zip(traced.paths, traced.dims, strict=True):
        if _matches(path, ignore):
            _dims.freeze(dims, "ignored")
    for dims, used in zip(traced.dims, _used(traced.program), strict=False):
        if not used:  # those of inputs follow
            _dims.freeze(dims, "not used")
    resizable: set[Dim] = set()
    for path, dims in zip(traced.input_paths, traced.inputs, strict=True):
        if _matches(path, resizable_inputs):
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
    _check_patterns("freeze_outputs", which, paths)
    return [x for p, x in zip(paths, outs, strict=True) if _matches(p, which)]


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
        if _matches(path, resizable):
            found.append((f"{INPUT}{path}", dims))
    return [(path, i, d) for path, dims in found for i, d in enumerate(dims)]


INPUT = "input "


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


def _matches(path: str, patterns: Patterns) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(path, p) for p in patterns)


def _check_patterns(name: str, patterns: Patterns, paths: Sequence[str]) -> None:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    _tree.check_patterns(paths, dict.fromkeys(patterns), name=name)
