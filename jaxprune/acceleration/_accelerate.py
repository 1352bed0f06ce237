"""Puts packed weights behind a function, leaf by leaf, where that makes it faster."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxprune import _tree
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.acceleration import _cost
from jaxprune.acceleration._report import Choice, Report
from jaxprune.formats import BlockSparseArray, pack, unpack
from jaxprune.kernels import block_sparse_matmul
from jaxprune.structures import Block
from jaxprune.tracing import View, replay

_ROUNDS = 7


class _Site(NamedTuple):
    """A product that a leaf ends in; axes are the leaf's, without those scanned over."""

    rows: int
    k_axes: tuple[int, ...]
    n_axes: tuple[int, ...]
    times: int
    precision: Any


def accelerate(
    fn: Callable[..., Any],
    params: PyTree,
    masks: PyTree,
    *args: Any,
    measure: bool = False,
    device: str | None = None,
) -> tuple[Callable[..., Any], PyTree, Report]:
    """The same function on packed weights, packed where that is faster.

    Reads from the jaxpr of `fn` where each masked leaf is contracted, looks for the blocks
    that its mask leaves empty, and packs it if the product with what is left is at least
    1.1 times as fast. A leaf whose mask has no such blocks, or that is used in another
    way than in a product, stays dense (and masked), with the reason in the report.

    Whole blocks are packed. A pruned weight in a block that is kept is a 0 there, which
    training would move: prune in blocks where you train on. Forward-mode derivatives
    (`jax.jvp`) do not go through a packed product, nor do explicit meshes.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters.
      masks: in the tree of `params`, `None` where nothing is pruned; packed or not.
      *args: an example: arrays or shapes of them. How many rows of x a product has decides
        what pays. The function that comes back takes other shapes too.
      measure: time the products here instead of predicting them; takes seconds a leaf.
      device: to predict for, a name of `predict`; by default that of JAX.

    Returns:
      The function of packed parameters, to be put under `jax.jit`, `jax.grad` or a scan
      like `fn`; the packed parameters, in the tree of `params`; the report.

    Raises:
      ValueError: if masks and parameters do not match, or `device` is not known.

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
    kind = _cost.kind_of(device)
    again = [p for p, x in zip(*_tree.flatten(params, _is_packed)[:2], strict=True)
             if _is_packed(x)]  # fmt: skip
    if again:
        raise ValueError(
            f"params: {again[0]} is packed already; expected arrays. Unpack it with "
            "jaxprune.formats.unpack first."
        )
    paths, leaves, treedef = _tree.flatten(params)
    checked = _tree.flatten(mask_trees.check(params, masks), is_leaf=_is_mask)[1]
    wanted = {
        path: mask_trees.as_bool(mask)
        for path, mask in zip(paths, checked, strict=True)
        if not _tree.is_hole(mask)
    }
    sites, others = _uses(fn, params, args, set(wanted))
    choices, new = [], []
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in wanted:
            new.append(leaf)
            continue
        choice, value = _choose(
            path, leaf, wanted[path], sites.get(path, []), others.get(path, []),
            kind, measure,
        )  # fmt: skip
        choices.append(choice)
        new.append(value)
    packed = jax.tree.unflatten(treedef, new)
    return functools.partial(_call, fn), packed, Report(tuple(choices))


def _call(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> Any:
    paths, leaves, treedef = _tree.flatten(params, is_leaf=_is_packed)
    plain = treedef.unflatten(
        [jax.ShapeDtypeStruct(x.shape, x.dtype) if _is_packed(x) else x for x in leaves]
    )
    closed, out = jax.make_jaxpr(fn, return_shape=True)(plain, *args, **kwargs)
    operands = [
        View(x, path, tuple(range(len(x.shape))), x.values.ndim - 3)
        if _is_packed(x)
        else x
        for path, x in zip(paths, leaves, strict=True)
        if not _tree.is_hole(x)
    ]
    operands += jax.tree.leaves((args, kwargs))
    y = replay(closed, operands, contract=_contract, dense=_dense)
    return jax.tree.unflatten(jax.tree.structure(out), y)


def _contract(x, view, x_axes, view_axes, *, times, **options) -> Array | None:
    """With a view whose value is packed, over the axes that it was packed for."""
    del times
    packed, ndim = view.value, len(view.axes)
    over = [view.axes[a] - ndim for a in view_axes]
    produced = packed.layout.out_axes
    left = [a - ndim for i, a in enumerate(view.axes) if i not in view_axes]
    dtype = _product_dtype(x, view, options)
    if (
        dtype is None
        or view.stacked
        or sorted(over) != sorted(packed.layout.axes)
        or sorted(left) != sorted(produced)
    ):
        return None
    x_order = [x_axes[over.index(a)] for a in packed.layout.axes]
    free = [a for a in range(x.ndim) if a not in x_axes]
    rows = x.transpose([*free, *x_order])
    rows = rows.reshape(*rows.shape[: len(free)], packed.layout.matrix[0])
    values = view.cast(packed.values).astype(dtype)
    packed = dataclasses.replace(packed, values=values)
    y = block_sparse_matmul(rows.astype(dtype), packed, precision=options["precision"])
    y = y.reshape(*y.shape[:-1], *(packed.layout.shape[a] for a in produced))
    order = [len(free) + produced.index(a) for a in left]
    return y.transpose([*range(len(free)), *order])


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
    leaf = unpack(view.value)
    return view.cast(leaf.transpose(view.axes))


def _uses(fn, params, args, wanted):
    """Products of each leaf, and the primitives that use it in another way."""
    sites: dict[str, list[_Site]] = {}
    others: dict[str, list[str]] = {}
    paths, leaves, treedef = _tree.flatten(params)

    def contract(x, view, x_axes, view_axes, *, times, **options):
        free = [a for a in range(x.ndim) if a not in x_axes]
        ndim = len(view.axes)
        over = tuple(view.axes[a] - ndim for a in view_axes)
        left = tuple(a - ndim for a in view.axes if a - ndim not in over)
        rows = math.prod(x.shape[a] for a in free)
        if _product_dtype(x, view, options) is None:
            others.setdefault(view.path, []).append(f"a product of {x.dtype}")
        found = _Site(rows, over, left, times, options["precision"])
        sites.setdefault(view.path, []).append(found)
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
    return sites, others


def _choose(path, leaf, mask, sites, others, kind, measure):
    """What becomes of a leaf: the choice, and the leaf or what it is packed to."""
    sparsity = 1 - float(np.mean(np.asarray(mask)))
    nbytes = leaf.size * leaf.dtype.itemsize
    rows = sum(s.rows * s.times for s in sites)

    def left(reason, speedup=0.0):
        value = jnp.where(mask, leaf, jnp.zeros_like(leaf))
        return Choice(
            path, leaf.shape, rows, sparsity, "dense", speedup, measure and speedup > 0,
            nbytes, nbytes, reason,
        ), value  # fmt: skip

    if others:
        return left(f"used by {', '.join(dict.fromkeys(others))}: not followed further")
    if not sites:
        return left("not used in a product")
    if len({(s.k_axes, s.n_axes) for s in sites}) > 1:
        return left("contracted over different axes in different places")
    site = sites[0]
    if not site.k_axes or not site.n_axes:
        return left("not used as a matrix")
    batch = leaf.ndim - len(site.k_axes) - len(site.n_axes)
    if min(*site.k_axes, *site.n_axes) + leaf.ndim < batch:
        return left("its stacked axes are not in front")
    best: tuple[float, Block] | None = None
    for size in _cost.BLOCKS:
        block = Block(size, size, axis=site.k_axes, out_axis=site.n_axes)
        density = _density(leaf.shape, np.asarray(mask), block)
        if density is None:
            continue
        k, n = (math.prod(leaf.shape[a] for a in x) for x in (site.k_axes, site.n_axes))
        found = []
        for site in sites:
            if measure:
                ratio = _timed(leaf, mask, block, site) if density < 0.9 else 0.0
            else:
                ratio = _cost.speedup(site.rows, k, n, size, density, leaf.dtype, kind)
            # A product takes about as long as it has rows, and a while for none.
            found.append(((site.rows + 8) * site.times, ratio))
        dense = sum(weight for weight, _ in found)
        fast = sum(weight / ratio if ratio else math.inf for weight, ratio in found)
        speedup = dense / fast
        if best is None or speedup > best[0]:
            best = speedup, block
    if best is None or best[0] == 0:
        return left("the mask leaves hardly any block empty")
    speedup, block = best
    if speedup < _cost.WORTH:
        return left(
            f"{block.rows} x {block.cols} blocks would not be {_cost.WORTH} times as fast",
            speedup,
        )
    packed = pack(leaf, mask, block)
    name = f"Block({block.rows}, {block.cols})"
    return Choice(
        path,
        leaf.shape,
        rows,
        sparsity,
        name,
        speedup,
        measure,
        packed.nbytes,
        nbytes,
        "",
    ), packed


def _density(shape, mask: np.ndarray, block: Block) -> float | None:
    """Share of blocks with a weight in them; `None` where a block is larger than a leaf."""
    k_axes, n_axes = block.matrix_axes("leaf", shape)
    batch = [a for a in range(mask.ndim) if a not in (*k_axes, *n_axes)]
    k, n = (math.prod(shape[a] for a in x) for x in (k_axes, n_axes))
    if block.rows > k or block.cols > n:
        return None
    matrix = mask.transpose([*batch, *k_axes, *n_axes]).reshape(-1, k, n)
    matrix = np.pad(matrix, ((0, 0), (0, -k % block.rows), (0, -n % block.cols)))
    split = matrix.reshape(
        len(matrix), -1, block.rows, matrix.shape[2] // block.cols, block.cols
    )
    # Stacked matrices are as long as the fullest of them.
    return float(split.any((2, 4)).mean((1, 2)).max())


def _timed(leaf, mask, block: Block, site: _Site) -> float:
    """Time of the dense product over that of the packed one, here."""
    batch = leaf.ndim - len(site.k_axes) - len(site.n_axes)
    for _ in range(batch):
        counts = np.asarray(mask).reshape(len(mask), -1).sum(1)
        fullest = int(counts.argmax())
        leaf, mask = leaf[fullest], mask[fullest]
    packed = pack(leaf, mask, block)
    matrix = packed.layout.to_matrix(leaf)
    x = jax.random.normal(jax.random.key(0), (site.rows, matrix.shape[0]), leaf.dtype)
    dense = jax.jit(lambda x, w: jnp.dot(x, w, precision=site.precision))
    fast = jax.jit(lambda x, w: block_sparse_matmul(x, w, precision=site.precision))
    calls = (lambda: dense(x, matrix), lambda: fast(x, packed))
    jax.block_until_ready([call() for call in calls])  # compiles
    seconds = [_seconds(call, 1) for call in calls]
    repeats = max(1, round(2e-3 / min(seconds)))
    turns = [[_seconds(call, repeats) for call in calls] for _ in range(_ROUNDS)]
    return statistics.median(a / b for a, b in turns)


def _seconds(call: Callable[[], Array], repeats: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready([call() for _ in range(repeats)])
    return time.perf_counter() - start


def _is_mask(x: Any) -> bool:
    return isinstance(x, mask_trees.PackedMask)


def _is_packed(x: Any) -> bool:
    return isinstance(x, BlockSparseArray)
