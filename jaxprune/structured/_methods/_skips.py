"""Matrices on skip connections, with which the residual stream may turn at each block."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, Literal
from jaxtyping import Array, Float

from jaxprune._tree import PyTree
from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._graph import Graph, Traced
from jaxprune.structured._reading._propagate import Program, Record
from jaxprune.structured._reading._trace import read, trace
from jaxprune.structured._reading._zeros import CHECKPOINTS
from jaxprune.tracing._replay import bind
from jaxprune.tracing._walk import jaxpr_of

_MOVES = frozenset(
    "convert_element_type reshape copy copy_p sharding_constraint".split()
)
_CALLS = frozenset("jit pjit closed_call core_call".split()) | CHECKPOINTS
_SUMS = frozenset("add add_any".split())


class SkipMatrices(NamedTuple):
    """Parameters, and a matrix for each skip connection.

    Attributes:
      params: as they were.
      matrices: in the order in which they are run.
    """

    params: PyTree
    matrices: tuple[Float[Array, "before after"], ...]


class _Skip(NamedTuple):
    """A sum of a stream and what a block made of it.

    Attributes:
      place: of the equation, as in `jaxprune.tracing.Site`.
      operand: which one is the stream as it was.
      axis: of the features.
      dtype: of the stream there.
    """

    place: tuple[int, ...]
    operand: int
    axis: int
    dtype: Any


def add_skip_matrices(
    fn: Callable[..., Any], params: PyTree, *args: Any, group: str | None = None
) -> tuple[Callable[..., Any], SkipMatrices]:
    """The function with a matrix on each skip connection, the identity as yet.

    In a sum `x + f(x)` the stream x becomes `x M`. What reads it in front of the sum and
    what reads the sum are no longer tied to the same units, so that `trace` finds one
    group for each part of the stream, between two sums, and a plan may keep other units,
    and another number of them, in each. `slicegpt` turns each part by a matrix of its own,
    as its paper does.

    Each matrix has width² weights, and is multiplied with each token: two of them beside
    the 12 width² of a usual transformer block, so that little is saved before a good share
    of the width goes.

    A skip connection is a sum along the stream of two values of which one is made from the
    other. Without any, or in a scan, whose carry is one stream, there is nothing to do.

    Args:
      fn: `fn(params, *args)`, pure, of arrays. It may be called with arguments of other
        shapes.
      params: its parameters, or shapes of them.
      *args: an example: arrays or shapes of them.
      group: the residual stream, by the name of its group; by default the only group of
        the kind `"embedding"`.

    Returns:
      `(fn, params)`: a function of `SkipMatrices`, and these.

    Raises:
      ValueError: if there is no skip connection, or one stands in a scan, a branch, or a
        function with a derivative of its own.

    Example:
      >>> def fn(params, ids):
      ...     x = params["embed"][ids]
      ...     for layer in params["layers"]:
      ...         x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
      ...     return x @ params["head"]
      >>> layer = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 3))}
      >>> params = {
      ...     "embed": jnp.ones((5, 3)), "layers": [layer, layer], "head": jnp.ones((3, 2))
      ... }
      >>> ids = jnp.array([0, 1])
      >>> new_fn, new = jp.structured.add_skip_matrices(fn, params, ids)
      >>> new.matrices[1].shape, bool((new_fn(new, ids) == fn(params, ids)).all())
      ((3, 3), True)
      >>> graph = jp.structured.trace(new_fn, new, ids)
      >>> [g.name for g in graph.groups if g.size == 3]
      ['embed:1', 'head:0', 'layers/0/down:1']

    References:
      Ashkboos et al., arXiv 2401.15024, section 3.3 (a transformation per block).
    """
    graph = trace(fn, params, *args)
    found = graph[stream_of(graph) if group is None else group]
    whole = [m for m in found.members if m.expression == found.name]
    if not whole:
        raise ValueError(
            f"group: {found.name} is only a part of the axes of its leaves; expected the "
            "features of a residual stream, a whole axis of some leaf."
        )
    path, axis = whole[0].path, whole[0].axis
    skips = _skips(graph._traced, path, axis)
    if not skips:
        raise ValueError(
            f"fn: along {found.name} no value is added to what is made from it; expected a "
            "residual stream, x + f(x). Name its group with group=."
        )
    eyes = tuple(jnp.eye(found.size, dtype=s.dtype) for s in skips)
    return _with_matrices(fn, path, axis), SkipMatrices(params, eyes)


def stream_of(graph: Graph) -> str:
    """The name of the group that is the residual stream.

    Raises:
      ValueError: if there is none, or several may be.
    """
    names = [g.name for g in graph.groups if g.kind == "embedding"]
    if len(names) != 1:
        raise ValueError(
            f"group: the groups of the kind 'embedding' are {names}; expected one, the "
            "residual stream. Name it with group=."
        )
    return names[0]


def _with_matrices(fn: Callable[..., Any], path: str, axis: int) -> Callable[..., Any]:
    def new_fn(params: SkipMatrices, *args: Any) -> Any:
        traced = read(fn, params.params, args, None)
        skips = _skips(traced, path, axis)
        if len(skips) != len(params.matrices):
            raise ValueError(
                f"params: there are {len(params.matrices)} matrices, and the function has "
                f"{len(skips)} skip connections with these arguments. Call "
                "structured.add_skip_matrices with such arguments."
            )
        found = zip(skips, params.matrices, strict=True)
        by_place = {s.place: (s, m) for s, m in found}
        operands = jax.tree.leaves((params.params, args))
        program = traced.program
        outs = _run(program.jaxpr, program.consts, operands, by_place, ())
        return jax.tree.unflatten(traced.out_tree, outs)

    return new_fn


_Chain = Sequence[tuple[Program, Record | None]]
"""A program, in the programs that call it, the outermost first, and by which equations."""
_ByPlace = dict[tuple[int, ...], tuple[_Skip, Array]]


def _run(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    operands: Sequence[Any],
    skips: _ByPlace,
    place: tuple[int, ...],
) -> list[Any]:
    """Evaluates a jaxpr, with products in front of some sums."""
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, operands, strict=True))

    def value(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else known[x]

    for i, eqn in enumerate(jaxpr.eqns):
        here, values = (*place, i), [value(x) for x in eqn.invars]
        if here in skips:
            skip, matrix = skips[here]
            values[skip.operand] = _turned(values[skip.operand], matrix, skip.axis)
        inside = any(len(p) > len(here) and p[: len(here)] == here for p in skips)
        found = _call(eqn, values, skips, here) if inside else bind(eqn, values)
        known.update(zip(eqn.outvars, found, strict=True))
    return [value(x) for x in jaxpr.outvars]


def _call(
    eqn: Any, values: list[Any], skips: _ByPlace, place: tuple[int, ...]
) -> Sequence[Any]:
    """A function that is called, or run again for its derivative."""
    inner, consts = jaxpr_of(eqn.params)
    own = {p: x for p, x in skips.items() if p[: len(place)] == place}
    matrices = [m for _, m in own.values()]

    def run(values: list[Any], matrices: list[Array]) -> list[Any]:
        found = zip(own, matrices, strict=True)
        return _run(inner, consts, values, {p: (own[p][0], m) for p, m in found}, place)

    policy = {n: eqn.params[n] for n in ("policy", "prevent_cse") if n in eqn.params}
    again = eqn.primitive.name in CHECKPOINTS
    with eqn.ctx.manager:
        return (jax.checkpoint(run, **policy) if again else run)(values, matrices)


def _turned(x: Array, matrix: Array, axis: int) -> Array:
    matrix = matrix.astype(x.dtype)
    y = lax.dot_general(x, matrix, (((axis,), (0,)), ((), ())))
    return jnp.moveaxis(y, -1, axis)


def _skips(traced: Traced, path: str, axis: int) -> list[_Skip]:
    """Sums along the stream that is an axis of a leaf."""
    dims = dict(zip(traced.paths, traced.dims, strict=True))
    stream = _dims.find(dims[path][axis])
    return list(_in_program([(traced.program, None)], stream, ()))


def _in_program(chain: _Chain, stream: Dim, place: tuple[int, ...]) -> Iterator[_Skip]:
    program, _ = chain[-1]
    for i, record in enumerate(program.records):
        name, here = record.eqn.primitive.name, (*place, i)
        if name in _SUMS:
            axis, other = (_axis(x.dims, stream) for x in record.operands)
            along = axis is not None and axis == other
            operand = _older(chain, record) if along else None
            if axis is not None and operand is not None:
                dtype = record.eqn.invars[operand].aval.dtype
                yield _Skip(here, operand, axis, dtype)
        for inner in record.inner:
            found = list(_in_program([*chain, (inner, record)], stream, here))
            if found and name not in _CALLS:
                raise ValueError(
                    f"fn: a skip connection stands in a {name}. A scan carries one stream, "
                    "in one basis: write its layers one after the other, or slice it "
                    "without matrices of its own. Branches, loops and functions with "
                    "derivatives of their own are not entered either."
                )
            yield from found


def _axis(dims: Sequence[Dim], stream: Dim) -> int | None:
    """The axis that is the stream, if it is one."""
    found = [i for i, d in enumerate(dims) if _dims.find(d) is stream]
    return found[0] if len(found) == 1 else None


def _older(chain: _Chain, record: Record) -> int | None:
    """The operand of a sum that the other is made from."""
    program, _ = chain[-1]
    a, b = (_origin(program, x) for x in record.eqn.invars)
    if a is b or isinstance(a, Literal) or isinstance(b, Literal):
        return None
    if _made_from(chain, b, a):
        return 0
    return 1 if _made_from(chain, a, b) else None


def _origin(program: Program, x: Any) -> Any:
    """What a value was before it was cast, moved or multiplied by a number."""
    for record in reversed(program.records):
        eqn = record.eqn
        if x is not eqn.outvars[0]:
            continue
        values = [v for v in eqn.invars if v.aval.ndim]
        scaled = eqn.primitive.name == "mul" and len(values) == 1
        scaled |= eqn.primitive.name == "div" and values == eqn.invars[:1]
        if eqn.primitive.name in _MOVES or scaled:
            x = values[0]
    return x


def _made_from(chain: _Chain, x: Any, source: Any) -> bool:
    """Whether a value is made from another, both of the innermost program."""
    needed = {x}
    for k, (program, call) in reversed(list(enumerate(chain))):
        for record in reversed(program.records):
            if needed.intersection(record.eqn.outvars):
                needed |= {v for v in record.eqn.invars if not isinstance(v, Literal)}
        if source in needed:
            return True
        inside = program.jaxpr.invars
        if call is None or source not in inside:
            return False
        outside = dict(zip(inside, call.eqn.invars, strict=True))
        source = _origin(chain[k - 1][0], outside[source])
        given = (outside[v] for v in inside if v in needed)
        needed = {v for v in given if not isinstance(v, Literal)}
        if isinstance(source, Literal):
            return False
    return False
