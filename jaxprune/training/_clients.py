"""Pruning over clients that keep their data: what they send, and how it is merged."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxprune import _select, _tree, _wide, masks
from jaxprune._tree import PyTree


class TopGradients(NamedTuple):
    """The largest gradients of the pruned weights of a leaf, as a client sends them.

    Attributes:
      values: float.
      places: flat indices; the size of the leaf where there were not enough.
    """

    values: Float[Array, "k"]
    places: Int[Array, "k"]


class Moments(NamedTuple):
    """Mean and variance over examples, as batch normalisation keeps them."""

    examples: Float[Array, ""]
    mean: Float[Array, "..."]
    var: Float[Array, "..."]


def top_gradients(grads: PyTree, found: PyTree, k: int) -> PyTree:
    """The `k` gradients of largest magnitude among the pruned weights of each leaf.

    Args:
      grads: of one client.
      found: masks; leaves without one are left out.
      k: how many of each leaf; a leaf below 2**31 weights.

    Returns:
      `TopGradients` for each masked leaf, `None` for the others.

    Example:
      >>> grads = {"kernel": jnp.array([[5.0, -3.0], [1.0, 2.0]])}
      >>> mask = {"kernel": jnp.array([[True, False], [False, False]])}
      >>> sent = jp.training.top_gradients(grads, mask, 2)["kernel"]
      >>> sent.values.tolist(), sent.places.tolist()
      ([-3.0, 2.0], [1, 3])

    References:
      Huang et al., Distributed Pruning Towards Tiny Neural Networks in Federated
      Learning, arXiv 2212.01977, section on progressive pruning.
    """
    if not isinstance(k, numbers.Integral) or k < 1:
        raise ValueError(f"k: got {k!r}; expected a whole number of at least 1.")

    def choose(g: Array, mask: Any) -> TopGradients | None:
        if _tree.is_hole(mask):
            return None
        scores = jnp.where(masks.as_bool(mask), -1, jnp.abs(g))
        (cut,) = _select.cuts(
            [_select.stored(scores)], [_wide.from_int(min(k, g.size))], [0]
        )
        best = _select.keep(scores, cut) & (scores >= 0)
        places = jnp.flatnonzero(best, size=k, fill_value=g.size)
        return TopGradients(g.ravel().at[places].get(mode="fill", fill_value=0), places)

    return _tree.map_leaves(choose, grads, masks.check(grads, found))


def merge_gradients(
    sent: Sequence[PyTree], params: PyTree, *, weights: Sequence[float] | None = None
) -> PyTree:
    """The average of what clients sent; gradients that a client did not send are 0.

    Sums are in at least float32.

    Give it to the `update` of a method that grows, on the server, in place of gradients:
    with all gradients sent it is the centralised method.

    Args:
      sent: from each client, what `top_gradients` gave.
      params: for shapes.
      weights: of the clients, such as their shares of the examples; equal by default.

    Returns:
      A dense array for each leaf that any client sent, `None` for the others.

    Raises:
      ValueError: if there are no clients or as many weights as them.

    Example:
      >>> params = {"kernel": jnp.zeros((2, 2))}
      >>> one = jp.training.TopGradients(jnp.array([4.0]), jnp.array([1]))
      >>> two = jp.training.TopGradients(jnp.array([2.0]), jnp.array([2]))
      >>> jp.training.merge_gradients([{"kernel": one}, {"kernel": two}], params)
      {'kernel': Array([[0., 2.],
             [1., 0.]], dtype=float32)}
    """
    shares = _shares(sent, weights)

    def merge(x: Array, *parts: TopGradients | None) -> Array | None:
        there = [(s, p) for s, p in zip(shares, parts, strict=True) if p is not None]
        if not there:
            return None
        dtype = there[0][1].values.dtype
        out = jnp.zeros(math.prod(x.shape), jnp.promote_types(dtype, jnp.float32))
        for share, part in there:
            values = share * part.values.astype(out.dtype)
            out = out.at[part.places].add(values, mode="drop")
        return out.reshape(x.shape).astype(dtype)

    return _tree.map_leaves(merge, params, *sent)


def merge_moments(clients: Sequence[Moments]) -> Moments:
    """Mean and variance of all clients' examples together.

    Example:
      >>> one = jp.training.Moments(jnp.float32(1), jnp.float32(0), jnp.float32(0))
      >>> two = jp.training.Moments(jnp.float32(3), jnp.float32(4), jnp.float32(0))
      >>> tuple(map(float, jp.training.merge_moments([one, two])))
      (4.0, 3.0, 3.0)

    References:
      Chan, Golub & LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    _shares(clients, None)
    total, mean, var = clients[0]
    for count, other, spread in clients[1:]:
        both = total + count
        share = jnp.where(both > 0, count / jnp.where(both > 0, both, 1), 0)
        apart = other - mean
        var = var + share * (spread - var) + share * (1 - share) * apart**2
        total, mean = total + count, mean + share * apart
    return Moments(total, mean, var)


def _shares(clients: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    if not clients:
        raise ValueError("sent: got nothing; expected what one client or more sent.")
    weights = [1.0] * len(clients) if weights is None else list(weights)
    if len(weights) != len(clients) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(
            f"weights: got {weights}; expected one for each of {len(clients)} clients, "
            "none below 0, with a sum above 0."
        )
    return [w / sum(weights) for w in weights]
