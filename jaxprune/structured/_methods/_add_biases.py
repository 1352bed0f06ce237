"""Biases for products that have none."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree, Where
from jaxprune.structured._methods._views import with_views
from jaxprune.tracing import Site


class Biased(NamedTuple):
    """Parameters, and biases that the function has not.

    Attributes:
      params: as they were.
      biases: by path of the kernel, zeros: its shape without the axes that are contracted.
    """

    params: PyTree
    biases: dict[str, Array]


def add_biases(
    fn: Callable[..., Any], params: PyTree, *args: Any, where: Where
) -> tuple[Callable[..., Any], Biased]:
    """The function with a bias behind some of its products, 0 as yet.

    The bias is added where the kernel is multiplied, so that the function can be read,
    shrunk, differentiated and trained as any other. `compensate` needs one where units
    that a layer without bias reads are removed. For another function of the same
    parameters, such as the loss, call this again.

    Args:
      fn: `fn(params, *args)`, pure, of arrays. It may be called with arguments of other
        shapes; those of these biases hold.
      params: its parameters, or shapes of them.
      *args: an example: arrays or shapes of them.
      where: kernels that get a bias, as in `jaxprune.prune`. Each must be used in one
        product, with all of its axes, without batch axes, possibly inside scans over its
        first axes.

    Returns:
      `(fn, params)`: a function of `Biased` parameters, and these.

    Raises:
      ValueError: if a kernel is used otherwise.

    Example:
      >>> def fn(params, x):
      ...     return x @ params["w"]
      >>> new_fn, new = jp.structured.add_biases(
      ...     fn, {"w": jnp.ones((2, 3))}, jnp.ones((4, 2)), where="w"
      ... )
      >>> new.biases["w"].shape, bool((new_fn(new, jnp.ones((5, 2))) == 2).all())
      ((3,), True)
    """
    chosen = _tree.selection(params, where)
    paths, leaves, _ = _tree.flatten(params)
    found = tracing.sites(fn, params, *args, where=where)
    biases, stacked = {}, {}
    for path, leaf, yes in zip(paths, leaves, chosen, strict=True):
        if yes and not _tree.is_hole(leaf):
            site = _only_site(path, found)
            stack, _, k, _ = site.axes or ((), (), (), ())
            shape = [n for i, n in enumerate(leaf.shape) if i not in k]
            biases[path] = jnp.zeros(shape, leaf.dtype)
            stacked[path] = len(stack)
    new_fn = with_views(fn, stacked, contract=_product, dense=_refuse)
    return new_fn, Biased(params, biases)


def _only_site(path: str, trace: tracing.Trace) -> Site:
    sites = [s for s in trace.sites if s.path == path]
    others = trace.untraced.get(path, ())
    if len(sites) != 1 or others:
        uses = [s.primitive for s in sites]
        raise ValueError(
            f"where: {path} is used by {_tree.listing([*uses, *others])}; a bias can be "
            "added to a leaf with one product only. Leave it out."
        )
    (site,) = sites
    axes = site.axes
    if (
        axes is None
        or axes[1]
        or axes[0] != tuple(range(len(axes[0])))
        or site.primitive != "dot_general"
        or site.wraps
    ):
        raise ValueError(
            f"where: {path} is used in a {site.primitive} as matrices {site.matrix} with "
            f"the axes {axes}; a bias can be added where all of a leaf is a matrix, or a "
            "stack of them that a scan runs over. Leave it out."
        )
    return site


def _product(
    x: Array,
    view: tracing.View,
    x_axes: tuple[int, ...],
    view_axes: tuple[int, ...],
    *,
    times: int,
    **options: Any,
) -> Array:
    kernel, bias = view.value
    w = view.cast(kernel).transpose(view.axes)
    y = lax.dot_general(x, w, ((x_axes, view_axes), ((), ())), **options)
    free = [a for i, a in enumerate(view.axes) if i not in view_axes]
    ranks = sorted(free)  # the axes of the bias are those of the leaf, in its order
    b = view.cast(bias).transpose([ranks.index(a) for a in free])
    return y + b.astype(y.dtype)


def _refuse(view: tracing.View, primitive: str) -> Array:
    raise ValueError(
        f"where: {view.path} reaches {primitive} before it is multiplied, so that no bias "
        "can be added to the product. Leave it out."
    )
