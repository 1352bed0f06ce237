"""Factors of low rank beside frozen weights: to recover a pruned model, or to prune by."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxprune import _tree, tracing
from jaxprune._lora import Axes, LoRA
from jaxprune._tree import PyTree, Where


def lora_init(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    key: Key[Array, ""],
    rank: int | Mapping[str, int] = 8,
    alpha: float = 16.0,
    where: Where = None,
) -> dict[str, LoRA]:
    """Factors of the weights of `fn(params, *args)`, with which it is what it was.

    Weights are `w + alpha / rank * (a b)`. Which axes of a leaf are inputs and which
    outputs is read off the function, so that kernels of attention, `[out, in]` weights,
    convolutions, and stacks of a scan or of experts have the factors of their matrices.

    Args:
      fn: `fn(params, *args)`, pure, such as `plan.rewrite(fn)`.
      params: its parameters, or shapes of them.
      *args: an example: arrays or shapes of them.
      key: for `a`, uniform within `±1 / √K`; `b` is 0.
      rank: of the factors; or `{pattern: rank}` on paths, where the last match counts and
        what has none gets no factors, such as `block_ranks` gives.
      alpha: of the scale, `alpha / rank`. 8 and 16 are LoRAPrune's.
      where: leaves that get factors, as in `jaxprune.prune`; by default the weights,
        without tables of embeddings.

    Returns:
      Factors by path, for `lora_merge`: a tree to take gradients by, and to give to an
      optimizer.

    Raises:
      ValueError: if a leaf is no matrix anywhere as a whole, nothing is selected, or a rank
        is below 1.

    Example:
      >>> def fn(params, x):
      ...     return jnp.einsum("td,hdk->thk", x, params["heads"])
      >>> params, x = {"heads": jnp.ones((2, 4, 3))}, jnp.ones((5, 4))
      >>> factors = jp.structured.lora_init(fn, params, x, rank=1, key=jax.random.key(0))
      >>> factors["heads"].a.shape, factors["heads"].b.shape
      ((4, 1), (1, 6))
      >>> bool((jp.structured.lora_merge(params, factors)["heads"] == 1).all())
      True

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685. There
      is no dropout in front of the factors, of which LoRAPrune's authors take 0.05.
    """
    paths, leaves, _ = _tree.flatten(params)
    ranks = dict(rank) if isinstance(rank, Mapping) else {"*": rank}
    _check_ranks(ranks)
    _tree.check_patterns(paths, ranks, name="rank")
    selected = _tree.selection(params, where)
    traced = tracing.sites(fn, params, *args)
    found = {}
    for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        size = _tree.lookup(path, ranks)
        if selected[i] and size is not None:
            axes = _axes(path, leaf, traced)
            found[path] = _drawn(
                leaf.shape, axes, size, alpha, jax.random.fold_in(key, i)
            )
    if not found:
        chosen = [p for p, s in zip(paths, selected, strict=True) if s]
        raise ValueError(
            f"rank: the patterns {list(ranks)} match none of the leaves that where= "
            f"selects, which are: {_tree.listing(chosen)}. Give one of them a rank."
        )
    return found


def lora_merge(params: PyTree, factors: Mapping[str, LoRA]) -> PyTree:
    """The parameters with the factors in them: for the loss, and in the end.

    The weights are formed anew at each call, and so is, for a moment, the gradient of each
    of them on the way back: what is saved by the factors are moments of the optimizer and
    gradients that are held, not operations.

    Args:
      params: as given to `lora_init`.
      factors: from it, trained or not.

    Returns:
      Parameters of the same dtypes.

    Raises:
      ValueError: if `params` has no leaf of that path, or one of another shape.

    Example:
      >>> params = {"w": jnp.zeros((2, 2))}
      >>> x = jnp.ones((1, 2))
      >>> factors = jp.structured.lora_init(
      ...     lambda p, x: x @ p["w"], params, x, rank=1, key=jax.random.key(0)
      ... )
      >>> factors = jax.tree.map(jnp.ones_like, factors)
      >>> jp.structured.lora_merge(params, factors)["w"].tolist()
      [[16.0, 16.0], [16.0, 16.0]]
    """
    paths = _tree.paths(params)
    if unknown := sorted(set(factors) - set(paths)):
        raise ValueError(
            f"params: there is no leaf {_tree.listing(unknown)}, which has factors. It has: "
            f"{_tree.listing(paths)}. Give the parameters that lora_init was given."
        )

    def merged(path: str, w: Array) -> Array:
        part = factors.get(path)
        if part is None:
            return w
        check_shape(path, part, w)
        return part.merge(w)

    return _tree.map_with_path(merged, params)


def check_shape(path: str, part: LoRA, w: Array) -> None:
    """Raises `ValueError` unless the factors are those of these weights."""
    stack, k, n = part.axes or _plain(w.ndim)
    sizes = [tuple(w.shape[i] for i in axes if i < w.ndim) for axes in (stack, k, n)]
    wanted = (*sizes[0], math.prod(sizes[1]), math.prod(sizes[2]))
    known = sum(map(len, (stack, k, n))) == w.ndim
    if not known or (*part.a.shape[:-1], part.b.shape[-1]) != wanted:
        raise ValueError(
            f"params: {path} has the shape {tuple(w.shape)}, and its factors have "
            f"{part.a.shape} and {part.b.shape}. Give the parameters that lora_init was "
            "given; after plan.shrink, draw new factors from plan.rewrite(fn)."
        )


def _axes(path: str, leaf: Any, traced: tracing.Trace) -> Axes:
    """Axes of the leaf that are stack, K and N where it is first used as a whole."""
    for site in traced.sites:
        axes = site.axes if site.path == path else None
        if axes is not None:
            stack, batch, k, n = axes
            ones = tuple(set(range(leaf.ndim)) - set(stack + batch + k + n))
            return stack + batch, k, n + ones
    why = "; ".join(traced.untraced.get(path, ())) or "only parts of it are multiplied"
    raise ValueError(
        f"where: {path}, of the shape {tuple(leaf.shape)}, is no matrix of inputs and "
        f"outputs anywhere ({why}). Leave it out, as with where='!{path}'."
    )


def _drawn(
    shape: tuple[int, ...], axes: Axes, rank: int, alpha: float, key: Key[Array, ""]
) -> LoRA:
    stack, k, n = (tuple(shape[i] for i in part) for part in axes)
    inputs = math.prod(k)
    a = jax.random.uniform(
        key,
        (*stack, inputs, rank),
        jnp.float32,
        -1 / math.sqrt(inputs),
        1 / math.sqrt(inputs),
    )
    b = jnp.zeros((*stack, rank, math.prod(n)), jnp.float32)
    return LoRA(a, b, alpha / rank, axes)


def _plain(ndim: int) -> Axes:
    return tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,)


def _check_ranks(ranks: Mapping[str, int]) -> None:
    for pattern, size in ranks.items():
        if not hasattr(size, "__index__") or size < 1:
            raise ValueError(
                f"rank: got {size!r} for {pattern!r}; expected a whole number of 1 or more. "
                "Leave out what should have no factors."
            )
