"""S2FT: fine-tuning a few units of each group, brought side by side by a permutation."""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._reading._graph import INPUT, Graph


def permuted(
    graph: Graph, params: PyTree, orders: Mapping[str, Sequence[int]]
) -> PyTree:
    """The parameters with the units of groups in another order, in all members alike.

    The function stays as it was, up to the order of sums, where it treats all units of a
    group alike, as it does channels, neurons, heads and ranks. It does not where a unit
    knows its number: pairs of a rotation, rows that are looked up, layers of a scan.

    Args:
      graph: of `trace`.
      params: the parameters, in the tree that was traced: any leaves of these paths.
      orders: `{group: numbers}`: unit `i` of the result is unit `numbers[i]`.

    Raises:
      ValueError: if a group is not known, its units are not all there once, or it is of
        the kind `"layer"` or `"row"`.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[3.0], [4.0]])}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 1)))
      >>> swapped = jp.structured.permuted(graph, params, {"down:0": [1, 0]})
      >>> swapped["up"].tolist(), swapped["down"].tolist()
      ([[2.0, 1.0]], [[4.0], [3.0]])
    """
    places: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, order in orders.items():
        group = _group(graph, name)
        order = np.asarray(order, int)
        if sorted(order.tolist()) != list(range(group.size)):
            raise ValueError(
                f"orders: got {order.tolist()} for {group.name}; expected each number from "
                f"0 to {group.size - 1} once."
            )
        for m in group.members:
            if not m.path.startswith(INPUT):
                taken = _places(m.units, order)
                places.setdefault(m.path, []).append((m.axis, taken))

    def take(path, x):
        for axis, taken in places.get(path, ()):
            x = jnp.take(x, taken, axis=axis)
        return x

    return _tree.map_with_path(take, params)


@dataclasses.dataclass(frozen=True)
class Slices:
    """Which parts of which leaves are fine-tuned; made by `s2ft`.

    Attributes:
      lengths: by path of a leaf, the axis along which its first places are trained, and
        how many.
    """

    lengths: dict[str, tuple[int, int]]

    def split(self, params: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The parameters, to be held fixed, and what of them is trained, by path."""
        found: dict[str, Any] = {}

        def cut(path, x):
            if path in self.lengths:
                axis, length = self.lengths[path]
                found[path] = lax.slice_in_dim(x, 0, length, axis=axis)
            return x

        return _tree.map_with_path(cut, params), found

    def merge(self, fixed: PyTree, trained: Mapping[str, Any]) -> PyTree:
        """The parameters with what was trained in its place; for the loss, and at the end.

        Everything else gets no gradient, and stays as it is to the bit.
        """

        def put(path, x):
            x = lax.stop_gradient(x)
            if path not in self.lengths:
                return x
            axis, _ = self.lengths[path]
            part = trained[path].astype(x.dtype)
            return lax.dynamic_update_slice_in_dim(x, part, 0, axis=axis)

        return _tree.map_with_path(put, fixed)


def s2ft(
    graph: Graph,
    params: PyTree,
    chosen: Mapping[str, Sequence[int]],
    *,
    train: str | Sequence[str] | None = None,
) -> tuple[PyTree, Slices]:
    """Brings chosen units to the front, and says which slices of leaves train.

    A few units of each group learn, and all else is frozen. In the leaves that read them,
    such as the output projection of attention for heads and the second kernel of an MLP
    for neurons, their rows then stand side by side, and are trained as dense matrices:
    `grads` of them, moments and updates are as small as they are. What has been learnt is
    a change of these rows alone, of a rank of at most their number, and may be stored and
    exchanged as such.

    Read for this: the abstract, and the authors' code (utils/module/s2.py), which puts
    units that train in several leaves in front by turns, and adds a change that starts at
    0, where this trains the rows themselves. The backward pass that computes only these
    slices is left to the compiler.

    Args:
      graph: of `trace`.
      params: the parameters.
      chosen: `{group: units}` that learn; the paper takes them at random, or by the size
        of weights or activations.
      train: glob patterns of leaves whose slices learn; by default those that only read
        the units of a group.

    Returns:
      The parameters permuted (see `permuted`), and the slices: `fixed, trained =
      slices.split(params)`, then `loss(slices.merge(fixed, trained))`.

    Raises:
      ValueError: if a group is not known, units are out of range or given twice, no leaf
        is left to train, the slices of a leaf do not stand side by side, or two groups
        want different slices of one leaf.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}
      >>> graph = jp.structured.trace(fn, params, jnp.ones((5, 2)))
      >>> params, slices = jp.structured.s2ft(graph, params, {"down:0": [5, 2]})
      >>> fixed, trained = slices.split(params)
      >>> {path: x.shape for path, x in trained.items()}
      {'down': (2, 3)}

    References:
      Yang et al., S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by
      Structured Sparsity, arXiv 2412.06289.
    """
    orders: dict[str, list[int]] = {}
    lengths: dict[str, tuple[int, int]] = {}
    writers = {
        (m.path, m.axis)
        for g in graph.as_groups(readers=False).groups
        for m in g.members
    }
    patterns = [train] if isinstance(train, str) else train
    for name, units in chosen.items():
        group = _group(graph, name)
        units = [int(u) for u in units]
        if len(set(units)) < len(units) or not set(units) <= set(range(group.size)):
            raise ValueError(
                f"chosen: got {units} for {group.name}; expected different numbers from 0 "
                f"to {group.size - 1}."
            )
        rest = [u for u in range(group.size) if u not in units]
        orders[group.name] = [*units, *rest]
        for m in group.members:
            reads = (m.path, m.axis) not in writers
            wanted = (
                reads
                if patterns is None
                else any(fnmatch.fnmatchcase(m.path, p) for p in patterns)
            )
            if not wanted or m.path.startswith(INPUT):
                continue
            hit = np.flatnonzero((m.units >= 0) & (m.units < len(units)))
            if len(hit) and hit[-1] >= len(hit):
                raise ValueError(
                    f"chosen: the first units of {group.name} do not stand side by side in "
                    f"{m.path}, whose axis {m.axis} is {m.expression}. Leave the leaf out "
                    "with train=, or choose units of another group."
                )
            found = m.axis, len(hit)
            if lengths.setdefault(m.path, found) != found:
                raise ValueError(
                    f"chosen: {m.path} has the slice {lengths[m.path]} of one group and "
                    f"{found} of {group.name}. Say with train= which leaf belongs to which."
                )
    if not lengths:
        members = {m.path for name in chosen for m in _group(graph, name).members}
        raise ValueError(
            f"train: got {train!r}, which leaves no slice to train. The members are: "
            f"{_tree.listing(sorted(members))}."
        )
    return permuted(graph, params, orders), Slices(lengths)


def _group(graph: Graph, name: str):
    try:
        group = graph[name]
    except KeyError as error:
        raise ValueError(f"orders: {error.args[0]}") from None
    if group.kind in ("layer", "row"):
        raise ValueError(
            f"orders: {group.name} is of the kind {group.kind!r}, whose units have an order "
            "that matters. Choose channels, neurons, heads or ranks."
        )
    return group


def _places(units: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Which place along an axis comes to each place."""
    taken = np.arange(len(units))
    for i, u in enumerate(order):
        taken[units == i] = np.flatnonzero(units == u)
    return taken
