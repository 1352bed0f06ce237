"""BESA: sparsities of the matrices of a block, learned on the error of its output."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.allocation._allocate import exact

# The share that no matrix loses or keeps less of, so that none is emptied.
_MARGIN = Fraction(1, 100)


def by_block_error(
    fn: Callable[..., PyTree],
    params: PyTree,
    scores: PyTree,
    *args: Any,
    sparsity: float | Fraction,
    steps: int = 100,
    candidates: int = 100,
    penalty: float = 1.0,
    optimizer: optax.GradientTransformation | None = None,
) -> dict[str, Fraction]:
    """Learns how sparse each matrix of a block is, from the error of the block's output.

    Each matrix mixes `candidates` sparsities with a softmax of learned coefficients. Its
    mask prunes that share of each column, the least scores first; the gradient goes
    straight through it to the probability that a weight of this rank is pruned, which is
    the weight of the candidates above its rank. The loss is the squared error of the
    output against the dense one, relative to its size, plus
    `penalty * (found / sparsity - 1)²`. At the end, the learned sparsities are moved by
    one constant, within [0, 0.99], so that their mean over the weights is exactly the
    wanted one, as fractions.

    This is BESA with a sparsity for each matrix. It differs: the authors learn one epoch
    on 128 sequences and take the sparsities as they come, near the target; their loss
    sums over the batch in another scale; they also learn a sparsity for each row, and
    quantisation along with it, which we do not.

    Args:
      fn: the block, `fn(params, *args)`: a tree of floating-point outputs.
      params: its parameters, dense.
      scores: a tree like `params`, with the scores of the matrices to prune, as
        `jaxprune.scores.wanda` gives them, and `None` elsewhere. Matrices are
        `[..., K, N]`; what is compared are the scores of a column.
      *args: its inputs, such as hidden states of a few sequences.
      sparsity: of all the scored matrices together, above 0.
      steps: of the optimizer.
      candidates: how many sparsities are mixed, evenly spaced in (0, 1]; 100 as the
        authors.
      penalty: of missing the sparsity; 1 as the authors' code.
      optimizer: by default `optax.adam(0.05)`.

    Returns:
      Sparsities by path, for `jaxprune.prune(allocation=...)`; of several blocks, the
      union.

    Raises:
      ValueError: if nothing is scored, scores do not fit, the dense output is all 0 or
        not finite, or a number is out of range.

    Example:
      >>> params = {"small": 0.01 * jnp.eye(8), "large": jnp.eye(8) + 0.5}
      >>> def fn(params, x):
      ...     return x @ params["small"] + x @ params["large"]
      >>> scores = jax.tree.map(jnp.abs, params)
      >>> found = jp.allocation.by_block_error(
      ...     fn, params, scores, jnp.eye(8), sparsity=0.5, steps=20
      ... )
      >>> bool(found["small"] > found["large"]), found["small"] + found["large"]
      (True, Fraction(1, 1))

    References:
      Xu et al., BESA: Pruning Large Language Models with Blockwise Parameter-Efficient
      Sparsity Allocation, arXiv 2402.16880, and the authors' code.
    """
    wanted = exact(sparsity)
    if not wanted:
        raise ValueError(
            "sparsity: got 0; expected a number above 0, since there is nothing to divide."
        )
    for name, value in (("steps", steps), ("candidates", candidates)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; expected at least 1.")
    table = _scored(params, scores)
    sizes = {p: math.prod(s.shape) for p, s in table.items()}
    ranks = {p: _ranks(jnp.asarray(s)) for p, s in table.items()}
    grid = jnp.arange(1, candidates + 1, dtype=jnp.float32) / candidates
    tx = optax.adam(0.05) if optimizer is None else optimizer
    paths, leaves, treedef = _tree.flatten(params)
    share = {p: n / sum(sizes.values()) for p, n in sizes.items()}

    def pruned(logits, leaves):
        new = [
            _masked(x, ranks[p], logits[p], grid) if p in ranks else x
            for p, x in zip(paths, leaves, strict=True)
        ]
        return treedef.unflatten(new)

    def mixed(logits: Any) -> dict[str, Array]:
        return {p: jax.nn.softmax(b) @ grid for p, b in logits.items()}

    def loss(logits, leaves, target, scale, *args):
        out = fn(pruned(logits, leaves), *args)
        error = _square(jax.tree.map(_difference, out, target)) / scale
        found = sum(share[p] * s for p, s in mixed(logits).items())
        return error + penalty * (found / float(wanted) - 1) ** 2

    @jax.jit
    def learn(logits, leaves, *args):
        target = fn(params_of(leaves), *args)
        scale = _square(target)

        def step(state, _):
            logits, opt_state = state
            grads = jax.grad(loss)(logits, leaves, target, scale, *args)
            updates, opt_state = tx.update(grads, opt_state, logits)
            return (optax.apply_updates(logits, updates), opt_state), None

        (logits, _), _ = lax.scan(step, (logits, tx.init(logits)), length=steps)
        return mixed(logits), scale

    def params_of(leaves):
        return treedef.unflatten(leaves)

    start = {p: _start(grid, float(wanted)) for p in table}
    found, scale = learn(start, leaves, *args)
    if not (math.isfinite(float(scale)) and float(scale) > 0):
        raise ValueError(
            f"fn: the squares of its dense output sum to {float(scale)}; expected a finite "
            "number above 0. Check the inputs in args."
        )
    return _onto_budget({p: float(x) for p, x in found.items()}, sizes, wanted)


def _scored(params: PyTree, scores: PyTree) -> dict[str, Array]:
    """The scores by path, with matrices of `params` behind them."""
    paths, leaves, treedef = _tree.flatten(params)
    try:
        found = treedef.flatten_up_to(_tree.align(scores, params, _tree.is_hole))
    except ValueError as e:
        raise ValueError(
            "scores: the structure is not that of params, which has the leaves "
            f"{_tree.listing(paths)}. Give scores for some, and None for the others."
        ) from e
    table = {}
    for path, x, s in zip(paths, leaves, found, strict=True):
        if _tree.is_hole(s):
            continue
        if jnp.shape(s) != jnp.shape(x) or jnp.ndim(s) < 2:
            raise ValueError(
                f"scores: got the shape {jnp.shape(s)} for {path} of {jnp.shape(x)}; "
                "expected a score for each weight of a matrix, or None."
            )
        table[path] = s
    if not table:
        raise ValueError(
            "scores: all are None; expected scores of one matrix at least."
        )
    return table


def _ranks(scores: Array) -> Array:
    """The place of each score in its column, the least first; ties go to the lower."""
    order = jnp.argsort(scores, axis=-2, stable=True)
    return jnp.argsort(order, axis=-2, stable=True)


def _masked(w: Array, ranks: Array, logits: Array, grid: Array) -> Array:
    """`w` times a mask that is exact forward and the probabilities' backward."""
    k = ranks.shape[-2]
    weights = jax.nn.softmax(logits)
    # A candidate p prunes the ranks below p K. [K, candidates]
    prunes = jnp.arange(k)[:, None] < jnp.floor(grid * k + 1e-4)
    kept = 1 - prunes.astype(jnp.float32) @ weights  # [K], by rank
    hard = (jnp.arange(k) >= jnp.floor(weights @ grid * k)).astype(jnp.float32)
    mask = kept + lax.stop_gradient(hard - kept)
    return (w * mask[ranks]).astype(w.dtype)


def _start(grid: Array, sparsity: float) -> Float[Array, "candidates"]:
    """Coefficients that mix to `sparsity`, as evenly as that allows.

    The authors start from equal ones, at a sparsity of one half.
    """
    low, high = -1e4, 1e4
    points = np.asarray(grid, np.float64)
    for _ in range(100):
        tilt = (low + high) / 2
        weights = np.exp(tilt * points - np.max(tilt * points))
        low, high = (
            (tilt, high) if weights @ points / weights.sum() < sparsity else (low, tilt)
        )
    return jnp.asarray(low * (points - points.mean()), jnp.float32)


def _onto_budget(found, sizes, sparsity: Fraction) -> dict[str, Fraction]:
    """Moves all by one constant, between 0 and nearly 1, to an exact mean."""
    most = max(1 - _MARGIN, sparsity)
    raw = {p: min(max(Fraction(x), Fraction(0)), most) for p, x in found.items()}
    fixed: dict[str, Fraction] = {}
    while True:
        free = [p for p in raw if p not in fixed]
        if not free:  # all lie at an end that rounding could not leave
            return dict.fromkeys(raw, sparsity)
        left = sparsity * sum(sizes.values()) - sum(fixed[p] * sizes[p] for p in fixed)
        weight = sum(sizes[p] for p in free)
        shift = (left - sum(raw[p] * sizes[p] for p in free)) / Fraction(weight)
        out = {p: raw[p] + shift for p in free}
        over = {p: x - most for p, x in out.items() if x > most}
        under = {p: -x for p, x in out.items() if x < 0}
        if not over and not under:
            return {p: fixed.get(p, out.get(p, sparsity)) for p in raw}
        # The side that is missed by more weights first, as for a water level.
        by_over, by_under = (
            sum(d * sizes[p] for p, d in side.items()) for side in (over, under)
        )
        if by_over >= by_under:
            fixed |= dict.fromkeys(over, most)
        else:
            fixed |= dict.fromkeys(under, Fraction(0))


def _difference(a: Array, b: Array) -> Array:
    return a.astype(jnp.float32) - b.astype(jnp.float32)


def _square(tree: PyTree) -> Float[Array, ""]:
    return sum(
        (jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(tree)),
        jnp.float32(0),
    )
