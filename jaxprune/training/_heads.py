"""Redundant attention heads: which to drop, and how to fold them into the others.

From Dhurandhar et al., NeuroPrune, arXiv 2404.01306, algorithms 2 and 3. All functions
are pure array code for one layer; `jax.vmap` them over a stack of layers.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune._groups import replicated


def head_distance(
    parts: Sequence[Float[Array, "heads ..."]],
) -> Float[Array, "heads heads"]:
    """Largest absolute difference between the weights of each two heads.

    Heads count as similar where this is at most theta. Theta is in the unit of the
    weights: the paper's 0.15 to 0.25 suits weights like BERT's, and two heads close to
    zero are similar under any theta.

    Args:
      parts: arrays whose first axis is the head, such as the query, key and value
        kernels as `[heads, d, head_dim]`. Flax's `[d, heads, head_dim]` needs
        `jnp.moveaxis(kernel, 1, 0)`. Their other axes may differ.

    Returns:
      A symmetric matrix, at least float32, with zeros on the diagonal; NaN in the rows
      and columns of heads that contain NaN, which are thus similar to none. One row is
      computed at a time, so no temporary is larger than the parts.

    Raises:
      TypeError: if `parts` is a bare array, or a part is not floating point.
      ValueError: if there is no part, or parts do not have the same number of heads.

    Example:
      >>> head_distance([jnp.array([[0.0, 1.0], [0.5, 1.0], [0.0, 3.0]])])
      Array([[0. , 0.5, 2. ],
             [0.5, 0. , 2. ],
             [2. , 2. , 0. ]], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, algorithm 2, step 1.
    """
    _check_parts(parts)
    wide = jnp.result_type(jnp.float32, *parts)

    def row(i):
        rows = []
        for part in parts:
            gap = jnp.abs(part.astype(wide) - _one(part, i).astype(wide))
            rows.append(jnp.max(gap, axis=range(1, part.ndim), initial=0))
        return functools.reduce(jnp.maximum, rows)  # [heads]

    return replicated(lax.map(row, jnp.arange(parts[0].shape[0])))


def find_dominating(similar: Bool[Array, "heads heads"]) -> Bool[Array, "heads heads"]:
    """Finds for each head the head that can stand in for it.

    Head `best` is left for head `j`, as `j` runs upwards, if everything similar to
    `best` is similar to `j` too and either `j` has more that is similar to it, or the
    two have the same and `j` is the later one. Nothing is removed that is not similar
    to its stand-in, and stand-ins are kept, so folding at once is safe. The kept heads
    form a dominating set, not the smallest one.

    Args:
      similar: symmetric, True where two heads are similar. The diagonal counts as True.

    Returns:
      `D` with `D[i, i]` True, and `D[i, j]` True for at most one other `j`, the
      stand-in of `i`. Heads with no True but their own are kept.

    Raises:
      TypeError: if `similar` is not boolean.
      ValueError: if `similar` is not a square matrix.

    Example:
      >>> similar = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
      >>> find_dominating(similar)
      Array([[ True,  True, False],
             [False,  True, False],
             [False, False,  True]], dtype=bool)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, algorithm 3.
    """
    _check_relation("similar", similar, "head_distance(parts) <= theta")
    heads = similar.shape[0]
    own = jnp.eye(heads, dtype=bool)
    near = (similar | own).astype(jnp.int32)
    # At [a, b]: how many heads are similar to a but not to b.
    missed = near @ (1 - near).T
    nested = missed == 0
    index = jnp.arange(heads)
    later = index[:, None] < index[None, :]
    better = nested & (~nested.T | later)  # at [best, j]: leave best for j

    def step(j, best):
        return jnp.where(better[best, j], j, best)

    best = lax.fori_loop(0, heads, step, index)  # [heads]
    return own | (best[:, None] == index[None, :])


def kept_heads(dominating: Bool[Array, "heads heads"]) -> Bool[Array, "heads"]:
    """Mask of the heads that stay: those with no stand-in but themselves.

    Args:
      dominating: from `find_dominating`.

    Returns:
      True = keep.

    Raises:
      TypeError: if `dominating` is not boolean.
      ValueError: if `dominating` is not a square matrix.

    Example:
      >>> kept_heads(jnp.array([[True, True], [False, True]]))
      Array([False,  True], dtype=bool)
    """
    return ~jnp.any(_others(dominating), axis=1)


def fold_heads(
    out: Float[Array, "heads head_dim d"], dominating: Bool[Array, "heads heads"]
) -> Float[Array, "heads head_dim d"]:
    """Adds the output projection of each removed head to that of its stand-in.

    Equal heads give equal outputs, which the output projection then adds up; so for
    equal heads, the layer's function is kept exactly (up to rounding), and for similar
    ones nearly. The paper's algorithm 2 folds columns of the expanding MLP matrix
    instead, which does not keep it: see `fold_into_mlp`. This fold is our default.

    Args:
      out: kernel of the output projection, as Flax's `MultiHeadAttention` has it.
      dominating: from `find_dominating`.

    Returns:
      An array of the shape and dtype of `out`, summed in at least float32, with zeros
      for removed heads. NaN stays in the heads that it is folded into.

    Raises:
      TypeError: if `out` is not floating point or `dominating` not boolean.
      ValueError: if `out` does not have three axes, or another number of heads.

    Example:
      >>> out = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
      >>> fold_heads(out, jnp.array([[True, True], [False, True]]))
      Array([[[0., 0.]],
             [[4., 6.]]], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, algorithm 2, step 4; changed.
    """
    merges = _merges(dominating)
    _check_float("out", out)
    if out.ndim != 3 or out.shape[0] != merges.shape[0]:
        raise ValueError(
            f"out has shape {out.shape} beside dominating of shape {merges.shape}; "
            f"wanted ({merges.shape[0]}, head_dim, d). Reshape a kernel of shape "
            f"[heads * head_dim, d] with out.reshape(heads, -1, d)."
        )
    wide = jnp.promote_types(out.dtype, jnp.float32)

    # Not a product of matrices: there a NaN in one head would reach all of them through
    # 0 * NaN, and matrix units may round float32 inputs.
    def add(i, folded):
        into = jnp.expand_dims(merges[:, i], (1, 2))  # [heads, 1, 1]
        return folded + jnp.where(into, _one(out, i).astype(wide), 0)

    folded = jnp.zeros_like(out, wide)
    return lax.fori_loop(0, out.shape[0], add, folded).astype(out.dtype)


def fold_into_mlp(
    l_in: Float[Array, "d ff"], dominating: Bool[Array, "heads heads"]
) -> Float[Array, "d ff"]:
    """The paper's own fold, into the expanding matrix of the MLP.

    Algorithm 2 adds the columns of L_in with the index range of a removed head to those
    of its stand-in and prunes them. L_in is `[ff, d]` in the paper and its transpose in
    Flax, so here they are rows: with `n = d / heads`, rows `i * n` to `(i + 1) * n - 1`
    belong to head `i`.

    It is here to replicate the paper. Between the heads and L_in stand the output
    projection, the residual connection and a normalisation, so the rows do not read
    that head's output, and the layer's function changes even where heads are equal.
    `fold_heads` keeps it.

    Args:
      l_in: kernel of the first dense layer of the MLP. The head dimension is taken to
        be `d / heads`.
      dominating: from `find_dominating`.

    Returns:
      An array of the shape and dtype of `l_in`, with zero rows for removed heads.

    Raises:
      TypeError: if `l_in` is not floating point or `dominating` not boolean.
      ValueError: if `l_in` does not have two axes, or `d` is no multiple of the number
        of heads.

    Example:
      >>> fold_into_mlp(
      ...     jnp.array([[1.0], [2.0]]), jnp.array([[True, True], [False, True]])
      ... )
      Array([[0.],
             [3.]], dtype=float32)

    References:
      Dhurandhar et al., NeuroPrune, arXiv 2404.01306, algorithm 2, step 4.
    """
    _check_relation("dominating", dominating, "find_dominating(similar)")
    heads = dominating.shape[0]
    if l_in.ndim != 2 or l_in.shape[0] % heads:
        raise ValueError(
            f"l_in has shape {l_in.shape} beside {heads} heads; wanted [d, ff] with d "
            f"a multiple of the number of heads. Where heads have another size than "
            f"d / heads, use fold_heads on the output projection."
        )
    _check_float("l_in", l_in)
    rows = l_in.reshape(heads, -1, l_in.shape[1])  # [heads, d / heads, ff]
    return fold_heads(rows, dominating).reshape(l_in.shape)


def _one(x: Array, i: Array) -> Array:
    """Head `i` of `x` with its axis kept; a masked sum, since heads may be sharded."""
    chosen = (
        lax.broadcasted_iota(jnp.int32, (x.shape[0],) + (1,) * (x.ndim - 1), 0) == i
    )
    return jnp.sum(jnp.where(chosen, x, 0), axis=0, keepdims=True, dtype=x.dtype)


def _others(dominating: Array) -> Bool[Array, "heads heads"]:
    """`dominating` without its diagonal."""
    _check_relation("dominating", dominating, "find_dominating(similar)")
    return dominating & ~jnp.eye(dominating.shape[0], dtype=bool)


def _merges(dominating: Array) -> Bool[Array, "heads heads"]:
    """At [j, i]: head i goes into head j."""
    others = _others(dominating)
    kept = ~jnp.any(others, axis=1)
    return others.T | (jnp.eye(others.shape[0], dtype=bool) & kept)


def _check_parts(parts: Sequence[Array]) -> None:
    if isinstance(parts, jax.Array | np.ndarray):
        raise TypeError(
            f"parts is one array of shape {parts.shape}; wanted a sequence of arrays. "
            f"Write [kernel] for a single one."
        )
    if not parts:
        raise ValueError(
            "parts is empty; wanted at least one array, such as [query, key, value]."
        )
    for i, part in enumerate(parts):
        _check_float(f"parts[{i}]", part)
        if part.ndim < 1 or part.shape[0] != parts[0].shape[0]:
            raise ValueError(
                f"parts[{i}] has shape {part.shape} beside parts[0] of shape "
                f"{parts[0].shape}; wanted the same number of heads first. For Flax's "
                f"[d, heads, head_dim] take jnp.moveaxis(kernel, 1, 0); grouped heads "
                f"that share keys and values are not covered."
            )


def _check_float(name: str, x: Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} has dtype {x.dtype}; wanted floating-point weights. Cast it first."
        )


def _check_relation(name: str, relation: Array, source: str) -> None:
    if relation.dtype != jnp.bool_:
        raise TypeError(
            f"{name} has dtype {relation.dtype}; wanted bool. Take {source}."
        )
    if relation.ndim != 2 or relation.shape[0] != relation.shape[1]:
        raise ValueError(
            f"{name} has shape {relation.shape}; wanted (heads, heads). For a stack of "
            f"layers use jax.vmap."
        )
