"""Scores that need no data: magnitude, chance, and first-order saliency."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import core
from jaxtyping import Array, Float, Key

from jaxprune import _tree
from jaxprune._tree import PyTree


def magnitude(params: PyTree) -> PyTree:
    """`|w|`.

    Args:
      params: an array or a tree of them; what is no array of floats stays as it is.

    Returns:
      Scores of the same shapes and dtypes.

    Example:
      >>> jp.scores.magnitude(jnp.array([-2.0, 1.0])).tolist()
      [2.0, 1.0]

    References:
      Han et al., Learning both Weights and Connections, arXiv 1506.02626.
    """
    return _map_floats(jnp.abs, params)


def random(params: PyTree, *, key: Key[Array, ""]) -> PyTree:
    """Uniform scores in [0, 1), float32, independent of the weights.

    Args:
      params: an array or a tree of them, of which only shapes matter; what is no array
        of floats stays as it is.
      key: made by `jax.random.key`; the scores of a leaf depend on it and on the place
        of the leaf in the tree.

    Example:
      >>> jp.scores.random(jnp.ones((2, 3)), key=jax.random.key(0)).shape
      (2, 3)
    """
    _, leaves, treedef = _tree.flatten(params)
    draws = [
        _draw(jax.random.fold_in(key, i), x) if _tree.is_float(x) else x
        for i, x in enumerate(leaves)
    ]
    return treedef.unflatten(draws)


def saliency(params: PyTree, grads: PyTree) -> PyTree:
    """`|w g|`, what removing the weight changes in the loss to first order.

    Args:
      params: an array or a tree of them; what is no array of floats stays as it is.
      grads: gradients of the loss, of the same structure.

    Returns:
      Scores of the same shapes, in at least float32.

    Example:
      >>> jp.scores.saliency(jnp.array([2.0, -1.0]), jnp.array([-0.5, 3.0])).tolist()
      [1.0, 3.0]

    References:
      Mozer & Smolensky, Skeletonization, NeurIPS 1988; Molchanov et al., Pruning
      Convolutional Neural Networks for Resource Efficient Inference,
      arXiv 1611.06440, Eq. (7), there for activations.
    """
    return _map_floats(_saliency, params, grads)


def _map_floats(f: Callable[..., Array], params: PyTree, *rest: PyTree) -> PyTree:
    return _tree.map_leaves(
        lambda x, *xs: f(x, *xs) if _tree.is_float(x) else x, params, *rest
    )


def _saliency(w: Float[Array, "..."], g: Float[Array, "..."]) -> Float[Array, "..."]:
    dtype = jnp.promote_types(jnp.promote_types(w.dtype, g.dtype), jnp.float32)
    return jnp.abs(w.astype(dtype) * g.astype(dtype))


def _draw(key: Key[Array, ""], x: Array) -> Float[Array, "..."]:
    """Draws that lie on the devices as `x` does."""
    if not isinstance(x, core.Tracer) and getattr(x, "committed", False):
        # On an auto mesh only the array itself knows where it lies.
        draw = jax.jit(jax.random.uniform, static_argnums=1, out_shardings=x.sharding)
        return draw(key, x.shape)
    sharding = jax.typeof(x).sharding
    explicit = any(s is not None for s in getattr(sharding, "spec", ()))
    options = {"out_sharding": sharding} if explicit else {}
    return jax.random.uniform(key, x.shape, jnp.float32, **options)
