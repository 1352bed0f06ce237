"""Means of gradients and of their squares: the diagonal of the Fisher information."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxprune import _tree
from jaxprune._tree import PyTree


class Gradients(NamedTuple):
    """Moments of gradients, float32, in the tree of the parameters.

    Attributes:
      samples: gradients seen: batches, or examples.
      mean: mean gradient; `None` for leaves that are no floating-point arrays.
      square: mean of squared gradients.
    """

    samples: Float[Array, ""]
    mean: PyTree
    square: PyTree


def gradients(
    loss: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    per_example: bool = False,
    initial: Gradients | None = None,
) -> Gradients:
    """Mean gradient of a loss, and mean of its square, over batches or examples.

    With `per_example`, `square` is the diagonal of the empirical Fisher information. By
    batch it is not: the square of a mean is less than the mean of squares, by about the
    number of examples in a batch.

    Args:
      loss: `loss(params, *args)` gives a number, the mean over the examples of `args`.
      params: its parameters.
      batches: tuples of arguments `args`; anything else is one argument.
      per_example: differentiate one example after the other, which is slower. The first
        axis of each array in a batch then is that of the examples; the loss sees each
        of them as a batch of one.
      initial: moments to go on from.

    Raises:
      ValueError: if there is no batch, if arrays of a batch have no common first axis,
        or if a gradient is not finite; the message has the path of the leaf.

    Example:
      >>> from jaxprune import calibration
      >>> def loss(params, x):
      ...     return jnp.mean(x @ params["w"])
      >>> x = jnp.array([[1.0, 0.0], [3.0, 2.0]])
      >>> found = calibration.gradients(loss, {"w": jnp.ones(2)}, [x], per_example=True)
      >>> found.mean["w"].tolist(), found.square["w"].tolist()
      ([2.0, 1.0], [5.0, 2.0])

    References:
      Kunstner et al., Limitations of the Empirical Fisher Approximation, arXiv
      1905.12558, Eq. (3).
    """
    step = jax.jit(functools.partial(_step, loss, per_example), donate_argnums=0)
    found = None if initial is None else jax.tree.map(jnp.copy, initial)
    pending, count = None, 0
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        if per_example:
            _check_examples(args)
        if found is None:
            zeros = _tree.map_leaves(_zeros, params)
            found = Gradients(jnp.zeros(()), zeros, jax.tree.map(jnp.copy, zeros))
        found, finite = step(found, params, args)
        _check_finite(pending, params, count)
        pending, count = finite, count + 1
    if count == 0 or found is None:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for loss."
        )
    _check_finite(pending, params, count)
    return found


def merge_gradients(a: Gradients, b: Gradients) -> Gradients:
    """The moments of the gradients of both, in any order; of none changes nothing."""
    samples = a.samples + b.samples
    share = jnp.where(samples > 0, b.samples / jnp.where(samples > 0, samples, 1), 0)

    def mean(x, y):
        return x + (y - x) * share

    return Gradients(
        samples,
        jax.tree.map(mean, a.mean, b.mean),
        jax.tree.map(mean, a.square, b.square),
    )


def _zeros(x: Any) -> Array | None:
    return jnp.zeros_like(x, jnp.float32) if _tree.is_float(x) else None


def _step(loss, per_example, found, params, args):
    _, leaves, treedef = _tree.flatten(params)
    floats = [x if _tree.is_float(x) else None for x in leaves]

    def of_floats(floats, *args):
        both = zip(floats, leaves, strict=True)
        return loss(treedef.unflatten([x if f is None else f for f, x in both]), *args)

    def one(args):
        grads = jax.grad(of_floats)(floats, *args)
        wide = [None if g is None else g.astype(jnp.float32) for g in grads]
        tree = treedef.unflatten(wide)
        return Gradients(jnp.ones(()), tree, jax.tree.map(jnp.square, tree))

    def add(found, example):
        alone = jax.tree.map(lambda x: x[None], example)
        return merge_gradients(found, one(alone)), None

    if per_example:
        new = jax.tree.map(jnp.zeros_like, found)
        new, _ = lax.scan(add, new, args)
    else:
        new = one(args)
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), new.square)
    return merge_gradients(found, new), finite


def _check_finite(finite: PyTree, params: PyTree, batch: int) -> None:
    if finite is None:
        return
    paths, ok, _ = _tree.flatten(finite)
    bad = [p for p, x in zip(paths, ok, strict=True) if x is not None and not x]
    if bad:
        raise ValueError(
            f"batches: in batch {batch}, the gradient of {_tree.listing(bad)} is not finite "
            "(NaN, infinite, or too large to be squared in float32). Look at the loss of "
            "this batch, or scale it down."
        )


def _check_examples(args: tuple[Any, ...]) -> None:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(args)]
    if not shapes or not all(shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"per_example: the arrays of a batch have the shapes {shapes}; expected the "
            "same first axis in all of them, one entry for each example."
        )
