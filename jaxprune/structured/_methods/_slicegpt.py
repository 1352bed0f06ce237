"""SliceGPT: the residual stream is turned to its principal axes, and the last ones go."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.calibration._calibrate import collect
from jaxprune.structured._methods import _consumers
from jaxprune.structured._methods._biases import replaced
from jaxprune.structured._methods._scores import by_path
from jaxprune.structured._methods._skips import SkipMatrices, stream_of
from jaxprune.structured._plans._plan import Plan
from jaxprune.structured._plans._planned import planned
from jaxprune.structured._reading._facts import PRODUCTS, Fact, Facts, follow
from jaxprune.structured._reading._graph import INPUT, Graph, Group
from jaxprune.structured._reading._propagate import Record
from jaxprune.structured._reading._trace import trace

_SCALED = "mul with an activation"


class Sliced(NamedTuple):
    """A model whose residual stream is turned.

    Attributes:
      params: of full size, scales folded and turned: the same function, to rounding.
      plan: what is kept of it: the first axes of the stream.
      values: mean squares of the stream along its axes, falling; a row for each part
        where there are several.
    """

    params: PyTree
    plan: Plan
    values: Float[Array, "*parts width"]


def slicegpt(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    ratio: float | Sequence[float],
    round_to: int = 1,
    group: str | None = None,
    tolerance: float = 1e-2,
) -> Sliced:
    """Turns the residual stream to its principal axes and plans to keep the first.

    Scales of norms are folded into the weights that read what they scale (`fold_scales`).
    With Q the eigenvectors of `Σ E[x xᵀ]`, over all products that read the stream, of what
    they read, every weight that writes the stream is multiplied with Q, every one that
    reads it with Qᵀ (`rotate`). A norm by the root mean square does not see that, so that the
    function stays the same; where it divides by a number of features, that number stays
    when axes go.

    With parameters of `add_skip_matrices` each part of the stream, between two of its sums,
    has a Q of its own, from E[x xᵀ] of what goes into the matrix on the skip connection, and
    so into the norm beside it; into the products behind the norm, for the last part. The
    matrices become Qᵀ Q' from part to part, cut to what these keep. The parts are turned in
    order, by what comes in when those before them are cut.

    Args:
      fn: `fn(params, *args)`, pure, of arrays, with norms by the root mean square. A layer
        norm subtracts means, which does not go with a rotation.
      params: its parameters. Embeddings that are tied behind a scale need `untie` first.
      batches: tuples of arguments `args`; anything else is one argument.
      ratio: share of the width of the stream to remove; or a list with one for each part,
        in order, such as a 0.0 at the end to leave the unembedding whole.
      round_to: the number kept is a multiple of this, or all.
      group: the residual stream, by the name of its group; by default all parts of it,
        if there are skip matrices, or else the only group of the kind `"embedding"`.
      tolerance: how far outputs of the turned model may be from those of the model, on the
        first batch, relative to the largest, beside 8 roundings of their dtype.

    Returns:
      Parameters and plan: `plan.shrink(params)`, `plan.rewrite(fn)`.

    Raises:
      ValueError: if the function does not stay the same, so that something other than such
        a norm is done with the stream; if scales cannot be folded; if a number is out of
        range; if there is no batch.

    Example:
      >>> def fn(params, ids):
      ...     x = params["embed"][ids]
      ...     return (x + jnp.tanh(x @ params["up"]) @ params["down"]) @ params["embed"].T
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> shapes = {"embed": (5, 4), "up": (4, 8), "down": (8, 4)}
      >>> params = {
      ...     n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())
      ... }
      >>> ids = jnp.array([[0, 1, 4]])
      >>> fn, params = jp.structured.untie(fn, params, ids, where="embed")
      >>> fn, params = jp.structured.add_skip_matrices(fn, params, ids)
      >>> sliced = jp.structured.slicegpt(fn, params, [ids], ratio=[0.5, 0.25])
      >>> small_fn, small = sliced.plan.rewrite(fn), sliced.plan.shrink(sliced.params)
      >>> small.matrices[0].shape, small_fn(small, ids).shape
      ((2, 3), (1, 3, 5))

    References:
      Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
      Columns", arXiv 2401.15024, sections 3.1 to 3.4, and their code. They always turn each
      block by a Q of its own: `add_skip_matrices` first. Without it one Q, from what comes
      out of the norms, serves the whole stream, and nothing is added to the model. They damp
      the moments by 0.01 of their mean, which changes no eigenvector, and by default leave
      the last part whole. Layer norms, which they turn into norms by the root mean square,
      are refused here.
    """
    listed = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not listed:
        raise ValueError("batches: there is none; expected at least one.")
    graph = trace(fn, params, *listed[0])
    names = _streams(graph, params, group)
    counts = _counts(graph, names, ratio, round_to)
    readers = {name: _readers(graph[name], _matrices(params)) for name in names}
    moments = _moments(fn, listed, readers)
    run = jax.jit(fn)
    wanted = run(params, *listed[0])
    for name in names:
        params = fold_scales(graph, params, name)
    turned, cut, kept, values = params, params, {}, []
    for name, count in zip(names, counts, strict=True):
        squares, vectors = np.linalg.eigh(moments(cut, graph[name]))
        q = jnp.asarray(vectors[:, ::-1], jnp.float32)
        turned = rotate(graph, turned, name, q)
        _check_same(wanted, run(turned, *listed[0]), name, tolerance)
        values.append(jnp.asarray(squares[::-1], jnp.float32))
        kept[name] = np.arange(count)
        cut = planned(graph, kept).mask(turned)
    rows = jnp.stack(values) if len(values) > 1 else values[0]
    return Sliced(turned, planned(graph, kept), rows)


def _matrices(params: PyTree) -> list[str]:
    """Paths of the skip matrices."""
    count = len(params.matrices) if isinstance(params, SkipMatrices) else 0
    return [f"matrices/{i}" for i in range(count)]


def _streams(graph: Graph, params: PyTree, group: str | None) -> list[str]:
    """The groups to turn, in the order in which the function goes through them."""
    if group is not None:
        return [graph[group].name]
    if not isinstance(params, SkipMatrices):
        if isinstance(getattr(params, "params", None), SkipMatrices):
            raise ValueError(
                f"params: got a {type(params).__name__} of SkipMatrices; expected it the "
                "other way round. Call add_skip_matrices last."
            )
        return [stream_of(graph)]
    names = {f"{m.path}:{m.axis}": g.name for g in graph.groups for m in g.members}
    ends = (f"{path}:{axis}" for path in _matrices(params) for axis in (0, 1))
    return list(dict.fromkeys(names[end] for end in ends if end in names))


def _readers(group: Group, matrices: Sequence[str]) -> frozenset[str]:
    """Leaves whose inputs tell the axes: skip matrices, or all where there are none."""
    skips = {m.path for m in group.members if m.path in matrices and m.axis == 0}
    return frozenset(skips or {m.path for m in group.members})


def _moments(
    fn: Callable[..., Any], batches: Sequence[Any], readers: dict[str, frozenset[str]]
) -> Callable[[PyTree, Group], np.ndarray]:
    """`(params, group) -> E[x xᵀ]` of what its readers read, summed over them."""
    union = frozenset().union(*readers.values())
    steps: dict[Any, Any] = {}  # what is compiled serves all groups

    def is_read(path: str, _: Any) -> bool:
        return path in union

    def moments(params: PyTree, group: Group) -> np.ndarray:
        stats = collect(fn, params, batches, steps, statistics=("gram",), where=is_read)
        found = [
            np.asarray(use.inputs.gram, np.float64).sum((0, 1))
            for use in _consumers.consumers(group, stats)
            if use.site.path in readers[group.name]
        ]
        if not found:
            raise ValueError(
                f"group: no product with a leaf reads {group.name}, so that nothing tells "
                "its principal axes. Name another with group=."
            )
        return np.sum(found, axis=0)

    return moments


def _counts(
    graph: Graph, names: Sequence[str], ratio: float | Sequence[float], round_to: int
) -> list[int]:
    """How many axes each part of the stream keeps."""
    given = np.atleast_1d(np.asarray(ratio, float)).tolist()
    ratios = given if np.ndim(ratio) else given * len(names)
    in_range = all(0 <= r < 1 for r in ratios) and round_to >= 1
    if not in_range or len(ratios) != len(names):
        raise ValueError(
            f"ratio, round_to: got {ratio!r} and {round_to!r}; expected a share in [0, 1), "
            f"or one for each of the {len(names)} parts {_tree.listing(list(names))}, and "
            "1 or more."
        )
    counts = []
    for name, r in zip(names, ratios, strict=True):
        size = graph[name].size
        n = max(round(size * (1 - r) / round_to), 1) * round_to if r else size
        counts.append(min(n, size))
    return counts


def rotate(
    graph: Graph,
    params: PyTree,
    group: str,
    q: Float[Array, "width width"],
) -> PyTree:
    """Weights for a stream that is multiplied with Q: each member axis by Q.

    A kernel that writes the stream becomes `W Q`, one that reads it `Qᵀ W`, tables and
    biases turn as what writes. Scales by 1, as `fold_scales` leaves them, stay.

    Args:
      graph: of `trace`.
      params: of full size.
      group: name of the stream's group.
      q: orthogonal, from old axes to new ones.

    Raises:
      ValueError: if Q does not fit, the stream is only a part of an axis, or a scale is
        not 1.
    """
    found = graph[group]
    if q.shape != (found.size, found.size):
        raise ValueError(
            f"q: got the shape {q.shape}; expected {(found.size, found.size)}, the units of "
            f"{found.name}."
        )
    leaves = by_path(graph, params, "params")
    scales = _scales(graph, params)
    new: dict[str, Array] = {}
    for m in found.members:
        if m.path.startswith(INPUT) or m.expression != found.name:
            raise ValueError(
                f"group: {found.name} is only a part of the axis {m.axis} of {m.path}, "
                f"{m.expression}, or of an input; expected whole axes of leaves."
            )
        x = new[m.path] if m.path in new else leaves[m.path]
        if m.path in scales:
            if not bool(jnp.all(x == 1)):
                raise ValueError(
                    f"params: {m.path} scales the stream, and is not 1, which does not go with "
                    "a rotation. Fold it first, with structured.fold_scales."
                )
            continue
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        y = jnp.tensordot(wide, q, ((m.axis,), (0,)), precision="highest")
        new[m.path] = jnp.moveaxis(y, -1, m.axis).astype(x.dtype)
    return replaced(params, new)


def fold_scales(graph: Graph, params: PyTree, group: str) -> PyTree:
    """Scales of norms become 1, and the weights that read what they scale take them over.

    Args:
      graph: of `trace`.
      params: of full size.
      group: name of the group of the stream.

    Raises:
      ValueError: if what is scaled is read by anything other than products with leaves, or
        by a leaf that has other uses, as a tied embedding has before `untie`.
    """
    leaves = by_path(graph, params, "params")
    walk = _Walk()
    traced = graph._traced
    facts = [*(Fact("leaf", p) for p in traced.paths), *(None for _ in traced.inputs)]
    walk.lost(follow(traced.program, facts, walk.step, walk.lost))
    members = {m.path for m in graph[group].members}
    sites = {s.path: s for s in _consumers.trace_of(graph, params).sites}
    new: dict[str, Array] = {}
    for scale in _scales(graph, params) & members:
        x = jnp.asarray(leaves[scale], jnp.float32)
        if bool(jnp.all(x == 1)):
            continue
        readers = walk.readers.get(scale, set())
        single = all(p is not None and walk.uses[p] == 1 for p in readers)
        if not readers or not single or walk.uses[scale] != 1:
            raise ValueError(
                f"params: the scale {scale} cannot be folded: what it scales is read by "
                f"{sorted(map(str, readers))}, where None is no product with a leaf, or by a "
                "leaf with other uses, such as a tied embedding. Give each a leaf of its own, "
                "that one with structured.untie."
            )
        for path in filter(None, readers):
            w = new[path] if path in new else leaves[path]
            stack, _, k, _ = sites[path].axes or ((), (), (), ())
            along = (*stack, *k)
            if tuple(w.shape[a] for a in along) != x.shape or list(along) != sorted(
                along
            ):
                raise ValueError(
                    f"params: {scale} has the shape {x.shape}, and {path} {w.shape} with the "
                    f"contracted axes {k}; expected the same axes in one order."
                )
            shape = [n if i in along else 1 for i, n in enumerate(w.shape)]
            new[path] = (w.astype(jnp.float32) * x.reshape(shape)).astype(w.dtype)
        new[scale] = jnp.ones_like(leaves[scale])
    return replaced(params, new)


class _Walk:
    """Looks for what reads an activation that a leaf scales.

    Attributes:
      readers: by scale, the leaves that are multiplied with what it scales; `None` for
        anything else.
      uses: of each leaf, how many, but for moves.
    """

    def __init__(self):
        self.readers: dict[str, set[str | None]] = {}
        self.uses: dict[str, int] = {}

    def step(self, record: Record, facts: list[Fact | None]) -> Facts:
        """One equation."""
        name, none = record.eqn.primitive.name, [None] * len(record.eqn.outvars)
        given = [f for f in facts if f is not None]
        leaves = [f for f in given if f.kind == "leaf"]
        scaled = [f for f in given if f.kind == "scaled"]
        if name in PRODUCTS and len(leaves) == len(scaled) == 1:
            self.lost(leaves)
            self.readers.setdefault(scaled[0].path, set()).add(leaves[0].path)
            return none
        self.lost(facts)
        if name == "mul" and len(leaves) == len(given) == 1:
            return [Fact("scaled", leaves[0].path)]
        return none

    def lost(self, facts: Facts) -> None:
        """Values that go where they are no longer followed."""
        for f in facts:
            if f is not None and f.kind == "scaled":
                self.readers.setdefault(f.path, set()).add(None)
            elif f is not None:
                self.uses[f.path] = self.uses.get(f.path, 0) + 1


def _scales(graph: Graph, params: PyTree) -> set[str]:
    """Leaves that are multiplied with an activation, element by element."""
    untraced = _consumers.trace_of(graph, params).untraced
    return {path for path, uses in untraced.items() if _SCALED in uses}


def _check_same(wanted: PyTree, found: PyTree, name: str, tolerance: float) -> None:
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        if not _tree.is_float(x):
            continue
        scale = float(jnp.max(jnp.abs(x))) or 1.0
        error = float(jnp.max(jnp.abs(x - y))) / scale
        if not error <= tolerance + 8 * float(jnp.finfo(x.dtype).eps):
            raise ValueError(
                f"fn: with {name} turned, outputs differ by {error:.1e} of the largest. "
                "Something is done with the stream that does not go with a rotation, such as "
                "a layer norm, which subtracts means, or a function of each of its features. "
                "Norms by the root mean square are fine. If this is rounding in a narrow "
                "dtype, give a larger tolerance=."
            )
