"""ShortGPT: whole blocks go, those that change least what goes through them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree
from jaxprune.calibration import Similarity
from jaxprune.tracing import Block, Blocks
from jaxprune.tracing._replay import bind

_PRODUCTS = frozenset("mul dot_general conv_general_dilated ragged_dot_general".split())
_SUMS = frozenset("add add_any sub".split())
_LINEAR = _SUMS | frozenset(
    "neg convert_element_type reshape squeeze expand_dims broadcast_in_dim "
    "transpose copy copy_p concatenate slice reduce_sum sharding_constraint".split()
)


def redundant_blocks(similarity: Similarity, count: int) -> tuple[str, ...]:
    """The blocks of least influence, `1 - cos`, the least first; of equal ones the later.

    Args:
      similarity: of `jaxprune.calibration.similarity`.
      count: how many.

    Raises:
      ValueError: if there are not as many.

    Example:
      >>> found = jp.calibration.Similarity(("0", "1", "2"), jnp.array([0.2, 0.9, 0.5]), 1.0)
      >>> jp.structured.redundant_blocks(found, 2)
      ('1', '2')

    References:
      Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You
      Expect", arXiv 2403.03853, section 3.2.
    """
    names = similarity.names
    if not 0 <= count <= len(names):
        raise ValueError(
            f"count: got {count!r}; expected a number from 0 to {len(names)}, the blocks."
        )
    order = np.lexsort((-np.arange(len(names)), -np.asarray(similarity.cosine)))
    return tuple(names[i] for i in order[:count])


def remove_blocks(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    blocks: Sequence[str],
    block_of: tracing.BlockOf = tracing.block_of,
) -> tuple[Callable[..., Any], PyTree]:
    """The function without some blocks, whose leaves count as 0.

    What remains of a residual block then is the stream that goes through it, and nothing
    of it is computed. Where nothing would remain, as of a block with a norm behind the sum,
    what it reads goes through instead. A block is what is done from the first use of one
    of its leaves to that of the next block, as in `jaxprune.tracing.blocks`. For layers of a
    scan, prune the group of the kind `"layer"` instead.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters, or shapes of them.
      *args: an example; the new function may be called with others.
      blocks: names, such as `redundant_blocks` gives: `"layers/3"`.
      block_of: see `jaxprune.tracing.blocks`.

    Returns:
      `(fn, params)`: a function, and parameters with `None` in place of the leaves that
      only these blocks had. Functions with derivatives of their own are differentiated as
      what they compute.

    Raises:
      ValueError: if a name is none of a block, a block is the layer of a scan, or nothing
        passes it when its leaves are 0 and it does not read one array like the one that it
        writes.

    Example:
      >>> def fn(params, x):
      ...     for layer in params["layers"]:
      ...         x = x + jnp.tanh(x @ layer["w"])
      ...     return x
      >>> params = {"layers": [{"w": jnp.eye(2)}, {"w": 2 * jnp.eye(2)}]}
      >>> x = jnp.ones((3, 2))
      >>> small_fn, small = jp.structured.remove_blocks(fn, params, x, blocks=["layers/0"])
      >>> small["layers"][0]["w"] is None
      True
      >>> bool((small_fn(small, x) == fn({"layers": params["layers"][1:]}, x)).all())
      True

    References:
      Men et al., arXiv 2403.03853.
    """
    gone = tuple(blocks)
    cut = tracing.blocks(fn, params, *args, block_of=block_of)
    _check(cut, gone)
    needed = {x.path for b in cut.blocks if b.name not in gone for x in b.leaves}
    own = {x.path for b in cut.blocks if b.name in gone for x in b.leaves} - needed
    paths, leaves, treedef = _tree.flatten(params)
    full = dict(zip(paths, leaves, strict=True))
    shapes = {p: _shape(full[p]) for p in own}
    small = treedef.unflatten(
        [None if p in own else x for p, x in zip(paths, leaves, strict=True)]
    )
    new_fn = _without(fn, treedef, gone, shapes, block_of)
    jax.eval_shape(new_fn, jax.tree.map(_shape, small), *jax.tree.map(_shape, args))
    return new_fn, small


def _check(cut: Blocks, gone: Sequence[str]) -> None:
    names = [b.name for b in cut.blocks]
    for name in gone:
        if not name or name not in names:
            raise ValueError(
                f"blocks: there is none called {name!r}; expected some of "
                f"{_tree.listing([n for n in names if n])}."
            )
    for block in cut.blocks:
        if block.name in gone and any(x.layer is not None for x in block.leaves):
            raise ValueError(
                f"blocks: {block.name} is a layer of a scan. Keep some layers of the scan "
                "instead: structured.planned(graph, {group: layers that stay}), with the "
                "group of the kind 'layer'."
            )


def _without(fn, treedef, gone, shapes, block_of) -> Callable[..., Any]:
    def new_fn(params: PyTree, *args: Any) -> Any:
        paths, leaves, _ = _tree.flatten(params)
        weights = {
            p: shapes.get(p, x) if _tree.is_hole(x) else x
            for p, x in zip(paths, leaves, strict=True)
        }
        full = treedef.unflatten([weights[p] for p in paths])
        abstract = jax.tree.map(_shape, (full, args))
        cut = tracing.blocks(fn, abstract[0], *abstract[1], block_of=block_of)
        values: dict[Any, Any] = dict(
            zip(cut.inputs, jax.tree.leaves(args), strict=True)
        )
        for block in cut.blocks:
            reads = tracing.reads(block, values)
            leaves = tracing.take(block, weights)
            run = _passing if block.name in gone else _run
            values |= zip(block.writes, run(block, leaves, reads), strict=True)
        outs = [tracing.value_of(slot, values) for slot in cut.outputs]
        shape = jax.eval_shape(fn, abstract[0], *abstract[1])
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return new_fn


def _run(block: Block, leaves: Sequence[Any], reads: Sequence[Any]) -> Sequence[Any]:
    return block.fn(tuple(leaves), *reads)


def _passing(block: Block, leaves: Sequence[Any], reads: Sequence[Any]) -> list[Any]:
    """What a block gives when its leaves are 0, without what does not matter for it."""
    shapes = jax.tree.map(_shape, (tuple(leaves), tuple(reads)))
    closed = jax.make_jaxpr(block.fn)(shapes[0], *shapes[1])
    jaxpr, n = closed.jaxpr, len(leaves)
    zeros, same = _zeros(jaxpr, n)
    inputs = dict(zip(jaxpr.invars[n:], reads, strict=True))

    def origin(x: Any) -> Any:
        while not isinstance(x, Literal) and x in same:
            x = same[x]
        return x

    outs: list[Any] = []
    for v, wanted in zip(jaxpr.outvars, closed.out_avals, strict=True):
        streams = _streams(inputs, wanted)
        before = streams & _needed(jaxpr, [v], lambda x: x, set())
        after = streams & _needed(jaxpr, [v], origin, zeros)
        outs.append(_through(block, reads, wanted) if before and not after else None)
    left = [v for v, x in zip(jaxpr.outvars, outs, strict=True) if x is None]
    needed = _needed(jaxpr, left, origin, zeros)
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= inputs

    def read(x: Any) -> Any:
        x = origin(x)
        if isinstance(x, Literal):
            return x.val
        return jnp.zeros(x.aval.shape, x.aval.dtype) if x in zeros else known[x]

    for eqn in jaxpr.eqns:
        if needed.intersection(eqn.outvars):
            found = bind(eqn, [read(x) for x in eqn.invars])
            known |= zip(eqn.outvars, found, strict=True)
    return [
        read(v) if x is None else x for v, x in zip(jaxpr.outvars, outs, strict=True)
    ]


def _streams(inputs: dict[Any, Any], wanted: Any) -> set[Any]:
    """Inputs that may be what an output was before: those that look like it, or any."""
    floats = {v: x for v, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    return {v for v, x in floats.items() if _kind(x) == _kind(wanted)} or set(floats)


def _needed(
    jaxpr: Jaxpr, outs: Sequence[Any], origin: Callable[[Any], Any], zeros: set[Any]
) -> set[Any]:
    """Values that some outputs are made from."""

    def values(xs: Sequence[Any]) -> set[Any]:
        found = (x for x in map(origin, xs) if not isinstance(x, Literal))
        return {x for x in found if x not in zeros}

    needed = values(outs)
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed |= values(eqn.invars)
    return needed


def _through(block: Block, reads: Sequence[Any], wanted: Any) -> Any:
    """The one array that is read and looks like one that is written."""
    same = [x for x in reads if _kind(x) == _kind(wanted)]
    if len(same) != 1:
        raise ValueError(
            f"blocks: nothing passes {block.name} when its leaves are 0; it reads "
            f"{[_kind(x) for x in reads]} and writes {_kind(wanted)}, where one array of that "
            "shape and type was expected among those that it reads. Leave it."
        )
    return same[0]


def _kind(x: Any) -> tuple[tuple[int, ...], str]:
    return tuple(x.shape), str(x.dtype)


def _zeros(jaxpr: Jaxpr, n: int) -> tuple[set[Any], dict[Any, Any]]:
    """Values that are 0 when the first `n` inputs are, and those that equal another."""
    zeros: set[Any] = set(jaxpr.invars[:n])
    same: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        are = [not isinstance(x, Literal) and x in zeros for x in eqn.invars]
        if (any(are) and name in _PRODUCTS) or (all(are) and are and name in _LINEAR):
            zeros |= set(eqn.outvars)
        elif name in _SUMS and any(are) and not (name == "sub" and are[0]):
            other: Any = eqn.invars[are.index(False)]
            out: Any = eqn.outvars[0]
            if other.aval.shape == out.aval.shape:
                same[out] = other
    return zeros, same


def _shape(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.result_type(x))
