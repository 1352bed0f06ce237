"""Coupled groups as data: which slices of which leaves are one unit."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune import _tree
from jaxprune._tree import PyTree


@dataclasses.dataclass(frozen=True)
class Member:
    """One axis of one leaf along which units of a group lie.

    Args:
      path: of the leaf, as `layers/0/up/kernel`.
      axis: which, counted from the front.
      units: for each place along the axis the unit that it belongs to, or -1.
    """

    path: str
    axis: int
    units: tuple[int, ...] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(int(u) for u in self.units))


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that go one by one, each with all its slices.

    Args:
      name: of the group.
      size: how many units.
      members: axes that they lie along.
      minimum: the least number of units that the model can do with, as experts of which
        each token is sent to two.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    minimum: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if not self.members:
            raise ValueError(f"groups: {self.name} has no members. Leave it out.")
        for m in self.members:
            found = {u for u in m.units if u >= 0}
            if not found or found != set(range(self.size)) or min(m.units) < -1:
                raise ValueError(
                    f"groups: {m.path} has places of {len(found)} units along axis "
                    f"{m.axis}; expected each of the {self.size} units of {self.name}, "
                    "counted from 0, and -1 for what belongs to none."
                )


@dataclasses.dataclass(frozen=True)
class Groups:
    """Coupled groups of a model, for methods that prune whole units; hashable.

    `jaxprune.structured.trace(fn, params, *args).as_groups()` reads them off a function,
    `Groups.along` takes them from you.

    A weight may lie in several groups, as a kernel between two hidden layers does, and
    twice in one, as a recurrent kernel does: it is kept where all of its units are.

    Args:
      groups: with different names.

    Raises:
      ValueError: if there are no groups, two have one name, or a member lacks units.

    Example:
      >>> params = {"up": jnp.array([[3.0, 0.0]]), "down": jnp.array([[4.0], [1.0]])}
      >>> groups = jp.Groups.along({"hidden": {"up": 1, "down": 0}}, params)
      >>> {name: sums.tolist() for name, sums in groups.sums(params).items()}
      {'hidden': [7.0, 1.0]}
      >>> groups.masks(params, {"hidden": jnp.array([True, False])})["up"].tolist()
      [[True, False]]
    """

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        names = [g.name for g in self.groups]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"groups: got the names {names}; expected at least one group, and each "
                "name once. Name them by path and axis, such as 'up/kernel:1'."
            )

    @classmethod
    def along(
        cls,
        table: Mapping[str, Mapping[str, int | Iterable[int]]],
        params: PyTree,
    ) -> "Groups":
        """Groups whose units are the places along whole axes.

        Args:
          table: `{name: {path: axis}}`; several axes where a leaf has more than one.
          params: the parameters, or shapes of them.

        Raises:
          ValueError: if there is no such leaf or axis, or the axes of a group differ in
            length.
        """
        shapes = _shapes(params)
        groups = []
        for name, axes in table.items():
            members = []
            for path, axis in axes.items():
                for a in (axis,) if isinstance(axis, int) else axis:
                    shape = _shape(path, shapes)
                    if not -len(shape) <= a < len(shape):
                        raise ValueError(
                            f"groups: {path} has the shape {shape}, and no axis {a}. Give "
                            f"one below {len(shape)}."
                        )
                    place = a % len(shape)
                    members.append(Member(path, place, tuple(range(shape[place]))))
            lengths = {f"{m.path}:{m.axis}": len(m.units) for m in members}
            if len(set(lengths.values())) != 1:
                raise ValueError(
                    f"groups: the axes of {name} have the lengths {lengths}; expected one "
                    "length. Where an axis holds other units too, write Member(path, "
                    "axis, units)."
                )
            groups.append(Group(name, next(iter(lengths.values())), tuple(members)))
        return cls(tuple(groups))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units, by name."""
        return {g.name: g.size for g in self.groups}

    @functools.cached_property
    def paths(self) -> tuple[str, ...]:
        """Leaves that have members, each once."""
        return tuple(dict.fromkeys(m.path for g in self.groups for m in g.members))

    def check(self, params: PyTree) -> None:
        """Raises `ValueError` unless the leaves are there, with axes of these lengths."""
        shapes = _shapes(params)
        for g in self.groups:
            for m in g.members:
                shape = _shape(m.path, shapes)
                if m.axis >= len(shape) or shape[m.axis] != len(m.units):
                    raise ValueError(
                        f"groups: {m.path} has the shape {shape}; expected {len(m.units)} "
                        f"places along axis {m.axis}, which {g.name} has. Make the groups "
                        "from these parameters."
                    )

    def weights(self, params: PyTree) -> dict[str, np.ndarray]:
        """How many weights each unit has, int64 [units], by name."""
        shapes = _shapes(params)
        found = {}
        for g in self.groups:
            found[g.name] = np.zeros(g.size, np.int64)
            for m in g.members:
                each = math.prod(shapes[m.path]) // max(len(m.units), 1)
                places = np.asarray(m.units)
                np.add.at(found[g.name], places[places >= 0], each)
        return found

    def sums(self, tree: PyTree) -> dict[str, Float[Array, "units"]]:
        """The sum over each unit's slices, in float32 at least, by name.

        Args:
          tree: with the leaves of the parameters that have members: weights, gradients,
            scores. A weight that lies in a unit twice counts twice.
        """
        leaves = _by_path(tree)
        return {
            g.name: functools.reduce(
                operator.add, (sum_along(leaves[m.path], m, g.size) for m in g.members)
            )
            for g in self.groups
        }

    def spread(self, tree: PyTree, values: Mapping[str, Array]) -> PyTree:
        """Gives every weight the sum of the values of its units; 0 where it has none.

        Args:
          tree: like the parameters; holes stay.
          values: [units], by name of the group.

        Returns:
          Arrays that broadcast to the leaves; `None` for leaves without members.
        """
        return self._map(tree, values, operator.add, 0)

    def masks(self, tree: PyTree, kept: Mapping[str, Bool[Array, "units"]]) -> PyTree:
        """Masks, True where all units of a weight are kept.

        Args:
          tree: like the parameters; holes stay.
          kept: booleans [units], by name of the group.

        Returns:
          Booleans of the shapes of the leaves; `None` for leaves without members.
        """
        found = self._map(tree, kept, operator.and_, True)
        return _tree.map_leaves(
            lambda m, x: m & jnp.ones_like(x, bool), found, self._only(tree)
        )

    def alive(self, tree: PyTree) -> dict[str, Bool[Array, "units"]]:
        """Which units have a weight that is not 0, by name."""
        nonzero = _tree.map_leaves(lambda x: jnp.asarray(x) != 0, self._only(tree))
        return {name: x > 0 for name, x in self.sums(nonzero).items()}

    def _map(self, tree: PyTree, values: Mapping[str, Array], combine, neutral):
        axes: dict[str, list[tuple[int, Array]]] = {}
        for g in self.groups:
            x = replicated(jnp.asarray(values[g.name]))
            for m in g.members:
                places = np.asarray(m.units)
                along = (
                    x if _is_plain(m) else jnp.where(places >= 0, x[places], neutral)
                )
                axes.setdefault(m.path, []).append((m.axis, along))

        def leaf(path, x):
            parts = [
                jnp.expand_dims(v, [a for a in range(x.ndim) if a != axis])
                for axis, v in axes[path]
            ]
            return functools.reduce(combine, parts)

        return self._only(tree, leaf)

    def _only(self, tree: PyTree, f=lambda path, x: x) -> PyTree:
        """The leaves with members through `f(path, leaf)`, `None` for the others."""
        return _tree.map_with_path(
            lambda path, x: f(path, x) if path in self.paths else None, tree
        )


def replicated(x: Array) -> Array:
    """A small array whole on every device of an explicit mesh, to be indexed freely."""
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.P()))


def sum_along(x: Array, member: Member, size: int) -> Float[Array, "units"]:
    """Sums over the slices of each unit along one axis of a leaf, in float32 at least."""
    rest = [a for a in range(x.ndim) if a != member.axis]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    each = replicated(jnp.sum(x, axis=rest, dtype=wide))  # [places]
    if _is_plain(member):
        return each
    places = np.asarray(member.units)
    hit = np.flatnonzero(places >= 0)
    return jnp.zeros(size, each.dtype).at[places[hit]].add(each[hit])


def _is_plain(member: Member) -> bool:
    return member.units == tuple(range(len(member.units)))


def _by_path(tree: PyTree) -> dict[str, Any]:
    paths, leaves, _ = _tree.flatten(tree)
    return {p: x for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)}


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    return {p: tuple(np.shape(x)) for p, x in _by_path(params).items()}


def _shape(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if path not in shapes:
        raise ValueError(
            f"groups: there is no leaf {path} to prune. Leave it out of the groups, or "
            f"pass parameters that have it. They have: {_tree.listing(list(shapes))}."
        )
    return shapes[path]
