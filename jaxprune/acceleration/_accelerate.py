"""Puts packed weights behind a function, leaf by leaf, where that pays."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from jaxprune import _tree
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.acceleration import _choose, _cost, _packing, _sites, _timing
from jaxprune.acceleration._report import Choice, Report
from jaxprune.formats import _shards


def accelerate(
    fn: Callable[..., Any],
    params: PyTree,
    masks: PyTree,
    *args: Any,
    measure: bool = False,
    prefer: _choose.Prefer = "speed",
    slowdown: float | None = None,
    device: str | None = None,
) -> tuple[Callable[..., Any], PyTree, Report]:
    """The same function on packed weights, packed where that is faster.

    Reads from the jaxpr of `fn` where each masked leaf is contracted, and which formats its
    mask allows: blocks of 256, 128, 64 or 32 that it leaves empty, N:M along the axis that
    is contracted, and a bitmap, which takes any pattern. The leaf is packed in the fastest
    of them, if its products are at least 1.1 times as fast as dense. A leaf for which none
    is, or that is used in another way than in a product, stays dense (and masked), with
    the reason in the report. A leaf that is contracted over either of its axes, as in
    `x @ w @ w.T`, is packed once.

    Whole blocks are packed. A pruned weight in a block that is kept is a 0 there, which
    training would move: `jaxprune.formats.value_masks` says which they are. Forward-mode
    derivatives (`jax.jvp`) do not go through a packed product. On a mesh, rows of x may be
    sharded, and a leaf that is sharded is packed in parts, a shard each
    (`jaxprune.formats.pack`).

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters. Leaves that are packed already stay as they are. Shapes of
        parameters give a plan: the report, and shapes of the packed ones.
      masks: in the tree of `params`, `None` where nothing is pruned; packed or not.
      *args: an example: arrays or shapes of them. How many rows of x a product has decides
        what pays. The function that comes back takes other shapes too.
      measure: time the products here instead of predicting them; takes seconds a leaf.
      prefer: `"memory"` packs each leaf in its smallest format, if its products take no
        more than `slowdown` times as long as dense.
      slowdown: for `prefer="memory"`; by default 1.1.
      device: to predict for, a name of `predict`; by default that of JAX.

    Returns:
      The function of packed parameters, to be put under `jax.jit`, `jax.grad` or a scan
      like `fn`, which takes any leaf that `jaxprune.formats.pack` made; the packed
      parameters, in the tree of `params`; the report.

    Raises:
      ValueError: if masks and parameters do not match, a mask is not known or is one of a
        leaf that is packed already, or there is no model of the device.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (1024, 1024))
      >>> params, masks = jp.prune({"w": w}, 0.95, structure=jp.Block(128, 128))
      >>> x = jnp.ones((256, 1024))
      >>> fast, packed, report = jp.accelerate(lambda p, x: x @ p["w"], params, masks, x)
      >>> packed["w"].block
      (128, 128)
      >>> bool(jnp.allclose(fast(packed, x), x @ params["w"], atol=1e-4))
      True
    """
    if measure and device is not None:
        raise ValueError(
            f"device: got {device!r} with measure=True, which times the products on the "
            "device at hand; expected None. Leave either of them out."
        )
    kind = "" if measure else _cost.kind_of(device)
    aim = _choose.aim(prefer, slowdown, kind, measure)
    paths, leaves, treedef = _tree.flatten(params, is_leaf=_sites.is_packed)
    plain = treedef.unflatten(
        [_shards.leaf_struct(x) if _sites.is_packed(x) else x for x in leaves]
    )
    wanted = _masks(plain, masks)
    held = {p: x for p, x in zip(paths, leaves, strict=True) if _sites.is_packed(x)}
    _check_held(held, wanted)
    sites, others = _sites.uses(fn, plain, args, {*wanted, *held})
    choices, new = [], []
    for path, leaf in zip(paths, leaves, strict=True):
        found = sites.get(path, []), others.get(path, [])
        if path in held:
            choices.append(_packed_already(path, leaf, *found))
        elif path in wanted:
            choice, leaf = _packed(path, leaf, wanted[path], *found, aim)
            choices.append(choice)
        new.append(leaf)
    shapes = {p: tuple(x.shape) for p, x in zip(paths, new, strict=True)
              if _sites.is_packed(x)}  # fmt: skip
    fast = functools.partial(_sites.call, fn, shapes)
    return fast, treedef.unflatten(new), Report(tuple(choices))


def _masks(params: PyTree, masks: PyTree) -> dict[str, np.ndarray]:
    """By the paths of the leaves that have one."""

    def is_mask(x):
        return isinstance(x, mask_trees.PackedMask)

    paths, found, _ = _tree.flatten(mask_trees.check(params, masks), is_leaf=is_mask)
    known = {}
    for path, mask in zip(paths, found, strict=True):
        if _tree.is_hole(mask):
            continue
        for x in jax.tree.leaves(mask):
            if isinstance(x, core.Tracer | jax.ShapeDtypeStruct):
                raise ValueError(
                    f"masks: what {path} keeps is not known, only its shape ({x}); "
                    "expected an array, since it decides what is packed. Call accelerate "
                    "outside of jax.jit, and jit the function that it gives."
                )
        known[path] = np.asarray(mask_trees.as_bool(mask))
    return known


def _check_held(held: dict[str, Any], wanted: dict[str, np.ndarray]) -> None:
    for path in held:
        if path in wanted:
            raise ValueError(
                f"masks: {path} has one, but params holds it packed as "
                f"{type(held[path]).__name__}; expected None there. Leave the mask out, "
                "or unpack the leaf with jaxprune.formats.unpack."
            )


def _packed_already(path: str, leaf: Any, sites, others) -> Choice:
    size = math.prod(leaf.shape)
    own = {tuple(sorted(leaf.layout.axes)), tuple(sorted(leaf.layout.out_axes))}
    reason = _choose.why_dense(leaf.shape, sites, others)
    if not reason and set(sites[0].axes) != own:
        reason = "contracted over other axes than those that it was packed for"
    return Choice(
        path=path,
        shape=tuple(leaf.shape),
        rows=sum(s.rows * s.times for s in sites),
        sparsity=max(0.0, 1 - leaf.values.size / size),
        format=_packing.name_of(leaf),
        speedup=0.0,
        basis="",
        nbytes=leaf.nbytes,
        dense_nbytes=size * leaf.dtype.itemsize,
        reason=f"packed already{f', but written out: {reason}' if reason else ''}",
    )


def _packed(path, leaf, mask: np.ndarray, sites, others, aim: _choose.Aim):
    """The choice for a leaf, and the leaf or what it is packed to."""
    known = not isinstance(leaf, jax.ShapeDtypeStruct)
    sparsity = 1 - float(np.mean(mask))
    packing = None
    reason = _choose.why_dense(leaf.shape, sites, others)
    if reason:
        nbytes = leaf.size * leaf.dtype.itemsize
        rows = sum(s.rows * s.times for s in sites)
        choice = Choice(
            path, tuple(leaf.shape), rows, sparsity, "dense", 0.0, "", nbytes, nbytes,
            reason,
        )  # fmt: skip
    else:
        orders = list(dict.fromkeys(s.axes for s in sites))
        packings = _packing.allowed(mask, orders)
        if aim.basis == "measured":
            seconds = functools.partial(_timing.measured, leaf, mask, packings)
        else:
            seconds = functools.partial(_cost.predicted, leaf, packings, aim.kind)
        choice, packing = _choose.choose(
            path, leaf, sparsity, packings, sites, aim, seconds
        )
    if packing is None:
        return choice, jnp.where(mask, leaf, jnp.zeros_like(leaf)) if known else leaf
    return choice, packing(leaf, mask) if known else packing.shapes(leaf)
