"""Leaves that are looked up and multiplied, such as tied embeddings, made two."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree, Where
from jaxprune.structured._methods._views import with_views


class Untied(NamedTuple):
    """Parameters, and leaves that products read in place of theirs.

    Attributes:
      params: as they were, for all other uses.
      copies: by path of the leaf that was tied: as it was.
    """

    params: PyTree
    copies: dict[str, Array]


def untie(
    fn: Callable[..., Any], params: PyTree, *args: Any, where: Where
) -> tuple[Callable[..., Any], Untied]:
    """The function with a leaf of its own for products with tied leaves.

    A tied embedding is looked up and, transposed, multiplied with activations. After this
    the products read a copy, so that either can change without the other: a scale in front
    of the product can be folded into it (`fold_scales`, `slicegpt`), and training, pruning
    and shrinking treat both as they treat any leaf. For another function of the same
    parameters, such as the loss, call this again.

    Args:
      fn: `fn(params, *args)`, pure, of arrays. It may be called with arguments of other
        shapes.
      params: its parameters, or shapes of them.
      *args: an example: arrays or shapes of them.
      where: leaves to untie, as in `jaxprune.prune`; transposed and cast before the
        product, but nothing else.

    Returns:
      `(fn, params)`: a function of `Untied` parameters, and these.

    Raises:
      ValueError: if a leaf is not tied, so that it has no products or no other use; or if
        one of its products is not followed.

    Example:
      >>> def fn(params, ids):
      ...     return jnp.tanh(params["embed"][ids]) @ params["embed"].T
      >>> params, ids = {"embed": jnp.ones((5, 3))}, jnp.array([0, 2])
      >>> new_fn, new = jp.structured.untie(fn, params, ids, where="embed")
      >>> new.copies["embed"].shape
      (5, 3)
      >>> bool((new_fn(new, ids) == fn(params, ids)).all())
      True
      >>> zero = new._replace(copies={"embed": jnp.zeros((5, 3))})
      >>> float(jnp.abs(new_fn(zero, ids)).max())
      0.0

    References:
      The authors of SliceGPT (arXiv 2401.15024) do so with tied embeddings.
    """
    chosen = _tree.selection(params, where)
    paths, leaves, _ = _tree.flatten(params)
    found = tracing.sites(fn, params, *args, where=where)
    copies = {}
    for path, leaf, yes in zip(paths, leaves, chosen, strict=True):
        if yes and not _tree.is_hole(leaf):
            _check_tied(path, found)
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            copies[path] = leaf if is_shape else jnp.copy(leaf)
    whole = dict.fromkeys(copies, 0)
    new_fn = with_views(
        fn, whole, contract=_product, dense=lambda view, _: _seen(view, 0)
    )
    new = Untied(params, copies)
    _check_untied(new_fn, new, args)
    return new_fn, new


def _seen(view: tracing.View, which: int) -> Array:
    """The leaf, or its copy, moved and cast as the view is."""
    return view.cast(view.value[which]).transpose(view.axes)


def _product(
    x: Array,
    view: tracing.View,
    x_axes: tuple[int, ...],
    view_axes: tuple[int, ...],
    *,
    times: int,
    **options: Any,
) -> Array:
    contracted = (x_axes, view_axes), ((), ())
    return lax.dot_general(x, _seen(view, 1), contracted, **options)


def _check_tied(path: str, found: tracing.Trace) -> None:
    products = [s.primitive for s in found.sites if s.path == path]
    others = found.untraced.get(path, ())
    if not products or not others:
        raise ValueError(
            f"where: {path} is used by {_tree.listing([*products, *others])}; expected "
            "products with activations, and another use, such as a lookup, that is to keep "
            "the leaf. Leave it out."
        )


def _check_untied(fn: Callable[..., Any], new: Untied, args: tuple[Any, ...]) -> None:
    """Refuses leaves that are still multiplied."""
    multiplied = {s.path for s in tracing.sites(fn, new, *args).sites}
    paths = _tree.paths(new.params), _tree.paths(Untied(new.params, {}))
    names = (p for p, now in zip(*paths, strict=True) if now in multiplied)
    left = [p for p in names if p in new.copies]
    if left:
        raise ValueError(
            f"where: {_tree.listing(left)}: some products with it are not followed, "
            "as it is reshaped, cut, or batched in front of them. Expected no more than "
            "transposes and casts. Multiply with all of the leaf, or leave it out."
        )
