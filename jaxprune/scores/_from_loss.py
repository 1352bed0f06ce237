"""Scores of untrained networks: SNIP, GraSP and SynFlow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.scores._data_free import saliency

Loss = Callable[..., Float[Array, ""]]


def snip(loss: Loss, params: PyTree, *batches: Any) -> PyTree:
    """Connection sensitivity `|w dL/dw|`, the gradients summed over batches.

    Args:
      loss: `loss(params, batch)` gives a number.
      params: a tree of arrays.
      *batches: one or several, each handed to the loss as one argument: `(x, y)` is one
        batch, `x, y` are two. `loss(params)` is called where there is none.

    Returns:
      Scores of the same structure, in at least float32. Higher is kept.

    Example:
      >>> def loss(params):
      ...     return jnp.sum(params["kernel"] ** 2)
      >>> params = {"kernel": jnp.array([[1.0, -2.0]])}
      >>> jp.scores.snip(loss, params)["kernel"].tolist()
      [[2.0, 8.0]]

    References:
      Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity,
      arXiv 1810.02340, Eq. (5).
    """
    floats, join = _split(params)
    grads = _sum(jax.grad(lambda p, *batch: loss(join(p), *batch)), floats, batches)
    return join(saliency(floats, grads))


def grasp(loss: Loss, params: PyTree, *batches: Any) -> PyTree:
    """Gradient signal preservation: `w (H g)`, signed, of which the largest are kept.

    `g` is the gradient summed over batches and `H` the sum of their Hessians. The paper
    writes `-w (H g)` and removes the largest, which is the same.

    Args:
      loss: `loss(params, batch)` gives a number. The authors divide the logits by a
        temperature of 200 in it.
      params: a tree of arrays.
      *batches: one or several, each handed to the loss as one argument: `(x, y)` is one
        batch, `x, y` are two. `loss(params)` is called where there is none.

    Returns:
      Scores of the same structure, in at least float32. Higher is kept.

    Example:
      >>> def loss(params):
      ...     return jnp.sum(params["kernel"] ** 2)
      >>> params = {"kernel": jnp.array([[1.0, -2.0]])}
      >>> jp.scores.grasp(loss, params)["kernel"].tolist()
      [[4.0, 16.0]]

    References:
      Wang et al., Picking Winning Tickets Before Training by Preserving Gradient Flow,
      arXiv 2002.07376, Eq. (8) and Algorithm 1.
    """
    floats, join = _split(params)

    def on_floats(floats, *batch):
        return loss(join(floats), *batch)

    grads = _sum(jax.grad(on_floats), floats, batches)

    def turn(floats, *batch):
        gradient = jax.grad(lambda p: on_floats(p, *batch))
        along = [g.astype(x.dtype) for g, x in zip(grads, floats, strict=True)]
        return jax.jvp(gradient, (floats,), (along,))[1]

    curved = _sum(turn, floats, batches)
    products = jax.tree.map(lambda w, h: _wide(w) * _wide(h), floats, curved)
    return join(products)


def synflow(fn: Callable[..., Any], params: PyTree, *args: Any) -> PyTree:
    """Synaptic flow `|w dR/dw|` of the network of absolute weights; needs no data.

    `R` is the sum of all that `fn(|params|, *args)` puts out. Prune with it in a hundred
    rounds, which keeps every layer alive; see `jaxprune.prune_in_rounds`. Deep networks
    need float64, or layers scaled to keep `R` in range.

    Args:
      fn: the network, without a loss.
      params: a tree of arrays; all of its floats are made positive, biases and scales
        too, as the authors do.
      *args: further arguments of `fn`; the input is all ones in the paper.

    Returns:
      Scores of the same structure, in at least float32. Higher is kept.

    Example:
      >>> params = {"kernel": jnp.array([[1.0, -2.0]])}
      >>> jp.scores.synflow(lambda p, x: x @ p["kernel"], params, jnp.ones(1))
      {'kernel': Array([[1., 2.]], dtype=float32)}

    References:
      Tanaka et al., Pruning Neural Networks without any Data by Iteratively Conserving
      Synaptic Flow, arXiv 2006.05467, Eq. (2) and Algorithm 1.
    """
    floats, join = _split(params)

    def flow(floats):
        out = fn(join(floats), *args)
        return sum(jnp.sum(x) for x in jax.tree.leaves(out))

    positive = jax.tree.map(jnp.abs, floats)
    grads = jax.grad(flow)(positive)
    return join(jax.tree.map(saliency, positive, grads))


def _sum(f: Callable[..., PyTree], params: PyTree, batches: tuple) -> PyTree:
    if not batches:
        return f(params)
    total = jax.tree.map(_wide, f(params, batches[0]))
    for batch in batches[1:]:
        total = jax.tree.map(lambda a, b: a + _wide(b), total, f(params, batch))
    return total


def _split(params: PyTree) -> tuple[list[Array], Callable]:
    """The floating-point arrays, and what puts them back among the other leaves."""
    _, leaves, treedef = _tree.flatten(params)
    is_float = [_tree.is_float(x) for x in leaves]
    floats = [x for x, yes in zip(leaves, is_float, strict=True) if yes]

    def put_back(found: list[Array]) -> PyTree:
        new = iter(found)
        return treedef.unflatten(
            [next(new) if yes else x for x, yes in zip(leaves, is_float, strict=True)]
        )

    return floats, put_back


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
