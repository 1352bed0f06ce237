"""Where the leaves of a function are contracted, and the same function on packed ones."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.acceleration import _packing, _products
from jaxprune.formats import BitmapArray, BlockSparseArray, NMArray, _shards, unpack
from jaxprune.tracing import View, replay


class Site(NamedTuple):
    """A product that a leaf ends in.

    Attributes:
      rows: of x.
      axes: of the leaf that are contracted and produced, rising, counted from the end.
      times: how often it is done in one call of the function.
      dtype: that it is done in.
      precision: see `jax.lax.dot_general`.
    """

    rows: int
    axes: _packing.Axes
    times: int
    dtype: Any
    precision: Any


def is_packed(x: Any) -> bool:
    """Whether it is a leaf of one of the formats."""
    return isinstance(x, BlockSparseArray | NMArray | BitmapArray)


def uses(
    fn: Callable[..., Any],
    params: PyTree,
    args: Sequence[Any],
    wanted: set[str],
) -> tuple[dict[str, list[Site]], dict[str, list[str]]]:
    """The products of each leaf, and the primitives that use it in another way.

    Args:
      fn: `fn(params, *args)`.
      params: its parameters, none of them packed.
      args: its other arguments, or shapes of them.
      wanted: paths of the leaves to follow.
    """
    sites: dict[str, collections.Counter[Site]] = {}
    others: dict[str, list[str]] = {}
    paths, leaves, treedef = _tree.flatten(params)

    def contract(x, view, x_axes, view_axes, *, times, **options):
        free = [a for a in range(x.ndim) if a not in x_axes]
        over, left = _axes(view, view_axes)
        rows = math.prod(x.shape[a] for a in free)
        dtype = _product_dtype(x, view, options)
        if dtype is None:
            others.setdefault(view.path, []).append(f"a product of {x.dtype}")
        axes = tuple(sorted(over)), tuple(sorted(left))
        site = Site(rows, axes, 1, dtype, options["precision"])
        sites.setdefault(view.path, collections.Counter())[site] += times
        leaf = view.cast(view.value.transpose(view.axes))
        return lax.dot_general(x, leaf, ((x_axes, view_axes), ((), ())), **options)

    def dense(view, primitive):
        name = "a batched product" if primitive == "dot_general" else primitive
        others.setdefault(view.path, []).append(name)
        return view.cast(view.value.transpose(view.axes))

    def run(leaves, args):
        params = treedef.unflatten(leaves)
        closed = jax.make_jaxpr(fn)(params, *args)
        operands = [
            View(x, path, tuple(range(jnp.ndim(x))), jnp.ndim(x))
            if path in wanted
            else x
            for path, x in zip(paths, leaves, strict=True)
            if not _tree.is_hole(x)
        ]
        operands += jax.tree.leaves(args)
        return replay(closed, operands, contract=contract, dense=dense)

    jax.eval_shape(run, leaves, args)
    found = {
        path: [site._replace(times=times) for site, times in counts.items() if times]
        for path, counts in sites.items()
    }
    return found, others


def call(
    fn: Callable[..., Any],
    shapes: Mapping[str, tuple[int, ...]],
    params: PyTree,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`fn` on parameters of which some leaves are packed.

    Args:
      fn: the function of dense parameters.
      shapes: dense ones of the leaves that were packed for it.
      params: packed or not.
      *args: of `fn`.
      **kwargs: of `fn`.
    """
    paths, leaves, treedef = _tree.flatten(params, is_leaf=is_packed)
    for path, leaf in zip(paths, leaves, strict=True):
        if path in shapes and jnp.shape(leaf) != shapes[path]:
            raise ValueError(
                f"params: {path} has shape {jnp.shape(leaf)}; expected it packed, as "
                f"accelerate gave it, or dense with shape {shapes[path]}. Put values back "
                "with jaxprune.formats.with_values(packed, values)."
            )
    plain = treedef.unflatten(
        [_shards.leaf_struct(x) if is_packed(x) else x for x in leaves]
    )
    closed, out = jax.make_jaxpr(fn, return_shape=True)(plain, *args, **kwargs)
    operands = [
        View(x, path, tuple(range(len(x.shape))), len(x.shape) - len(x.layout.shape))
        if is_packed(x)
        else x
        for path, x in zip(paths, leaves, strict=True)
        if not _tree.is_hole(x)
    ]
    operands += jax.tree.leaves((args, kwargs))
    y = replay(closed, operands, contract=_contract, dense=_dense)
    return jax.tree.unflatten(jax.tree.structure(out), y)


def _contract(x, view, x_axes, view_axes, *, times, **options) -> Array | None:
    """With a view whose value is packed, over K or over N."""
    del times
    packed, layout = view.value, view.value.layout
    over, left = _axes(view, view_axes)
    dtype = _product_dtype(x, view, options)
    if dtype is None or view.stacked:
        return None
    both = sorted(over), sorted(left)
    contracted, produced = layout.axes, layout.out_axes
    multiply = _products.product
    if both == (sorted(produced), sorted(contracted)):
        contracted, produced = produced, contracted
        multiply = _products.product_transposed
    elif both != (sorted(contracted), sorted(produced)):
        return None
    x_order = [x_axes[over.index(a)] for a in contracted]
    free = [a for a in range(x.ndim) if a not in x_axes]
    rows = x.transpose([*free, *x_order]).astype(dtype)
    size = math.prod(layout.shape[a] for a in contracted)
    rows = rows.reshape(*rows.shape[: len(free)], size)
    packed = jax.tree.map(jnp.asarray, packed)
    values = view.cast(packed.values).astype(dtype)
    packed = dataclasses.replace(packed, values=values)
    y = multiply(rows, packed, precision=options["precision"])
    y = y.reshape(*y.shape[:-1], *(layout.shape[a] for a in produced))
    order = [len(free) + produced.index(a) for a in left]
    return y.transpose([*range(len(free)), *order])


def _axes(view: View, view_axes: Sequence[int]) -> _packing.Axes:
    """Axes of the leaf that are contracted and that are left, counted from the end."""
    ndim = len(view.axes)
    over = tuple(view.axes[a] - ndim for a in view_axes)
    left = tuple(a - ndim for i, a in enumerate(view.axes) if i not in view_axes)
    return over, left


def _product_dtype(x: Array, view: View, options: dict[str, Any]) -> Any:
    """The type of a product that the kernels take, or `None`."""
    cast = view.casts[-1] if view.casts else view.value.dtype
    found = options["preferred_element_type"] or jnp.result_type(x.dtype, cast)
    types = [jnp.dtype(t) for t in (x.dtype, cast, found)]
    if all(jnp.issubdtype(t, jnp.floating) and t.itemsize in (2, 4) for t in types):
        return found
    return None


def _dense(view: View, primitive: str) -> Array:
    """The array of a packed view, where `fn` is called in another way than in the example."""
    del primitive
    return view.cast(unpack(view.value).transpose(view.axes))
