"""Coupled groups of a function, as `trace` finds them."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune import _tree
from jaxprune._groups import Groups
from jaxprune.structured._reading import (
    _coupled,
    _dims,
    _local,
    _picture,
)
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._kinds import Kind
from jaxprune.structured._reading._propagate import Program, Rule
from jaxprune.structured._reading._values import Dims

INPUT = "input "
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
        check_patterns("ignore", ignore, list(self.shapes))
        reads = set()
        if not readers:
            leaves = {p: (s, self._dtypes[p]) for p, s in self.shapes.items()}
            traced = self._traced
            reads = _coupled.readers(traced.program, traced.paths, leaves)

        def stays(m: Member) -> bool:
            if m.path.startswith(INPUT) or matches(m.path, ignore):
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
        check_patterns("where", where, paths)
        paths = [p for p in paths if matches(p, where)]
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


def matches(path: str, patterns: Patterns) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatch.fnmatchcase(path, p) for p in patterns)


def check_patterns(name: str, patterns: Patterns, paths: Sequence[str]) -> None:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    _tree.check_patterns(paths, dict.fromkeys(patterns), name=name)
