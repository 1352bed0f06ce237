"""How much each block of layers changes what goes through it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree

Select = Callable[[Sequence[Any]], Array]


class Similarity(NamedTuple):
    """Likeness of what goes into blocks and what comes out.

    Attributes:
      names: of the blocks, in order.
      cosine: mean over tokens of the cosine between input and output. Block influence, by
        which ShortGPT removes layers, is one minus this.
      tokens: seen.
    """

    names: tuple[str, ...]
    cosine: Float[Array, " blocks"]
    tokens: Float[Array, ""]


def similarity(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    block_of: tracing.BlockOf = tracing.numbered,
    select: Select | None = None,
    token_weights: Callable[..., Array] | None = None,
) -> Similarity:
    """Mean cosine between the input and the output of each block.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters.
      batches: tuples of arguments `args`; anything else is one argument.
      block_of: see `jaxprune.tracing.blocks`.
      select: `select(arrays)` gives the activation `[..., features]` among the arrays that
        a block reads, and among those that it writes. By default the only floating-point
        array with two axes or more.
      token_weights: `token_weights(*args)` gives a weight for each token, 0 for padding, in
        the shape of the activation without its features.

    Raises:
      ValueError: if there is no batch or no block, if it is not clear which array is the
        activation, or if the weights do not fit it.

    Example:
      >>> from jaxprune import calibration
      >>> def fn(params, x):
      ...     return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]
      >>> turn = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
      >>> params = {"w": jnp.stack([jnp.eye(2), turn])}
      >>> found = calibration.similarity(fn, params, [jnp.ones((3, 2))])
      >>> dict(zip(found.names, found.cosine.tolist()))
      {'w/0': 1.0..., 'w/1': 0.0}

    References:
      Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You
      Expect, arXiv 2403.03853, Sec. 3.2.
    """
    select = select or _only
    weights = dict(zip(*_tree.flatten(params)[:2], strict=True))
    cuts: dict[Any, tracing.Blocks] = {}
    steps: dict[Any, Any] = {}
    total, tokens, count, names = None, jnp.zeros(()), 0, ()
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        leaves, treedef = jax.tree.flatten(args)
        shapes = treedef, tuple(jax.typeof(x) for x in leaves)
        if shapes not in cuts:
            cuts[shapes] = tracing.blocks(fn, params, *args, block_of=block_of)
        cut, sums = cuts[shapes], []
        weighed = None if token_weights is None else token_weights(*args)
        values = dict(zip(cut.inputs, leaves, strict=True))
        for block in cut.blocks:
            key = block.fn, bool(block.name)
            if key not in steps:
                run = _measured(block.fn, select) if block.name else block.fn
                steps[key] = jax.jit(run)
            own = tracing.take(block, weights)
            reads = tracing.reads(block, values)
            if not block.name:
                found = steps[key](own, *reads)
            else:
                found, cosine, count = steps[key](weighed, own, *reads)
                sums.append(cosine)
            values |= zip(block.writes, found, strict=True)
        names = tuple(b.name for b in cut.blocks if b.name)
        if not names:
            raise ValueError(
                "fn: it has no blocks; expected a scan over stacked layers, or leaves "
                "whose paths have a number, such as layers/0/kernel. Pass block_of=, which "
                "gives the name of its block for the path of a leaf."
            )
        tokens = tokens + count
        total = jnp.stack(sums) + (0 if total is None else total)
    if total is None:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for fn."
        )
    return Similarity(names, total / tokens, tokens)


def _measured(fn: Callable[..., tuple[Array, ...]], select: Select):
    def step(weights, leaves, *reads):
        new = fn(leaves, *reads)
        a, b = (select(xs).astype(jnp.float32) for xs in (reads, new))
        if a.shape != b.shape:
            raise ValueError(
                f"select: it gives shapes {a.shape} and {b.shape} before and after a block; "
                "expected the same activation in both."
            )
        if weights is None:
            weights = jnp.ones(a.shape[:-1])
        if weights.shape != a.shape[:-1]:
            raise ValueError(
                f"token_weights: got the shape {weights.shape}; expected {a.shape[:-1]}, "
                f"one for each token of an activation of {a.shape}."
            )
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        # A token of zeros counts as 0.
        cosine = jnp.sum(a * b, -1) / jnp.where(norms > 0, norms, 1)
        return new, jnp.sum(cosine * weights), jnp.sum(weights, dtype=jnp.float32)

    return step


def _only(arrays: Sequence[Any]) -> Array:
    found = [x for x in arrays if _tree.is_float(x) and x.ndim > 1]
    if len(found) != 1:
        shapes = [x.shape for x in found]
        raise ValueError(
            f"select: between two blocks there are arrays of the shapes {shapes}, and it is "
            "not clear which is the activation. Pass select=, a function from them to one "
            "of them."
        )
    return found[0]
