"""iCBS: which weights of a block to prune, as binary quadratic programs solved in turn."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from jaxprune.calibration import Inputs
from jaxprune.posttrain import _given, _solver
from jaxprune.posttrain._given import Refined, column_errors, dot
from jaxprune.posttrain._programs import anneal, icbs_program


class Step(NamedTuple):
    """A new mask, and what is expected of it.

    Attributes:
      mask: True = keep, as many as before.
      change: of the loss, to second order; the ridge is not in it.
      block: the weights that the step chose among, for a tabu list.
    """

    mask: Bool[Array, "..."]
    change: Float[Array, ""]
    block: Bool[Array, "..."]


def icbs(
    w: Float[Array, "*stack K N"],
    mask: Bool[Array, "*stack K N"],
    inputs: Inputs,
    *,
    key: Key[Array, ""],
    rounds: int = 20,
    block: int = 32,
    tabu: float = 0.25,
    temperatures: int = 30,
) -> Refined:
    """ICBS on the error of one layer: better masks of the same counts, weights as they are.

    Each column is a problem of its own, whose Hessian is twice the Gram; there the second
    order is exact. In each round a block of each column takes part: half of it the pruned
    weights that would lower the error most by coming back, half the kept ones that would
    raise it least by going. `anneal` chooses anew which of them are pruned.

    The paper minimises the loss of the whole model, in a block of a whole leaf, with
    gradients and the empirical Fisher matrix; that is `icbs_step`. It chooses blocks by
    `|w g|`; knowing the change of each weight exactly, we choose by that.

    Args:
      w: dense weights.
      mask: True = keep, from any method.
      inputs: `gram`.
      key: for the annealing.
      rounds: blocks a column.
      block: weights in a block; with K or more, all take part.
      tabu: share of a column, in whole blocks, that stays out for a while after it was in
        one; 0 lets the same block come again.
      temperatures: of each annealing.

    Returns:
      The mask, with the number kept in each column as before, and `E[(x w - x (mask w))²]`
      of each output, which never rises.

    Raises:
      ValueError: if shapes do not fit, `inputs.gram` is missing, or a number is out of
        range.

    Example:
      >>> w = jnp.array([[1.0], [1.5], [-1.25]])
      >>> gram = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
      >>> mask = jnp.array([[False], [True], [False]])
      >>> inputs = jp.calibration.Inputs(1.0, gram=gram)
      >>> found = jp.posttrain.icbs(w, mask, inputs, key=jax.random.key(0))
      >>> found.mask.ravel().tolist(), found.initial_error.item(), found.error.item()
      ([True, False, False], 2.5625, 0.0625)

    References:
      Rosenberg et al., arXiv 2411.17796.
    """
    _given.check("icbs", mask, w=w)
    gram = _given.statistic("icbs", inputs, "gram", w)
    for name, value, least in (("rounds", rounds, 1), ("block", block, 2)):
        if value < least:
            raise ValueError(f"icbs: got {name}={value}; expected at least {least}.")
    if not 0 <= tabu < 1:
        raise ValueError(f"icbs: got tabu={tabu}; expected a share in [0, 1).")
    k = w.shape[-2]
    size = min(block, k)
    one = functools.partial(
        _columns, rounds=rounds, size=size, rest=math.ceil(tabu * k / size),
        temperatures=temperatures,
    )  # fmt: skip
    stack = w.shape[:-2]
    keys = jax.random.split(key, stack)
    return _solver.over_stack(one, w.ndim - 2)(w, mask, gram, keys)


def icbs_step(
    w: Float[Array, "..."],
    mask: Bool[Array, "..."],
    gradients: Float[Array, "samples ..."],
    *,
    key: Key[Array, ""],
    block: int = 256,
    pruned: int | None = None,
    ridge: float = 0.0,
    tabu: Bool[Array, "..."] | None = None,
    temperatures: int = 60,
) -> Step:
    """One step of iCBS on one leaf, with gradients of the model's loss.

    The block is the pruned weights with the largest `|w g|` and the kept ones with the
    least; the Hessian is the mean of `g gᵀ` over samples, of the block alone. Repeat with
    fresh gradients at the new mask, for one leaf after another, and undo a step that
    raised the loss if you like; the authors keep it.

    Args:
      w: dense weights of the leaf, in any shape.
      mask: True = keep.
      gradients: of the loss of each sample by this leaf, at `where(mask, w, 0)`.
      key: for the annealing.
      block: how many weights take part.
      pruned: how many of them are pruned ones; half by default.
      ridge: times the squared change of the weights is added, against moving far.
      tabu: weights that stay out of the block, such as those of the last steps; not where
        the block is the whole leaf.
      temperatures: of the annealing.

    Raises:
      ValueError: if shapes do not fit or a number is out of range.

    Example:
      >>> w, mask = jnp.array([1.0, 1.0]), jnp.array([True, False])
      >>> def loss(v, x):
      ...     return (x * (v[1] - 0.75)) ** 2 / 2
      >>> x = jnp.array([1.0, -1.0])
      >>> gradients = jax.vmap(jax.grad(loss), (None, 0))(jnp.where(mask, w, 0), x)
      >>> found = jp.posttrain.icbs_step(w, mask, gradients, key=jax.random.key(0), block=2)
      >>> found.mask.tolist()
      [False, True]

    References:
      Rosenberg et al., arXiv 2411.17796, and the authors' code (`gradient_per_sample`).
    """
    if gradients.shape[1:] != w.shape or mask.shape != w.shape:
        raise ValueError(
            f"icbs_step: got w of {w.shape}, mask of {mask.shape} and gradients of "
            f"{gradients.shape}; expected one shape, and samples in front of it for "
            "gradients, as jax.vmap(jax.grad(loss), (None, 0)) gives them."
        )
    first = block // 2 if pruned is None else pruned
    if not 0 < first < block <= w.size:
        raise ValueError(
            f"icbs_step: got block={block} with {first} pruned weights, for a leaf of "
            f"{w.size}; expected 0 < pruned < block <= {w.size}."
        )
    flat = _given.wide(w).ravel()
    kept = mask.ravel()
    samples = _given.wide(gradients).reshape(gradients.shape[0], -1)
    mean = jnp.mean(samples, axis=0)
    score = jnp.abs(flat * mean)
    out = jnp.zeros(flat.shape, bool) if tabu is None else tabu.ravel()
    order = jnp.where(kept, -score, score)
    places, free = _block(order, kept, out, first, block)
    part = samples[:, places]
    fisher = dot(part.T, part) / len(samples)
    now = ~kept[places] & free
    program = icbs_program(flat[places], now, mean[places], fisher, ridge=ridge)
    new = anneal(program, now, key=key, free=free, temperatures=temperatures)
    plain = icbs_program(flat[places], now, mean[places], fisher)
    kept = kept.at[places].set(jnp.where(free, ~new, kept[places]))
    chosen = jnp.zeros(flat.shape, bool).at[places].max(free)
    change = plain.value(new) - plain.value(now)
    return Step(kept.reshape(w.shape), change, chosen.reshape(w.shape))


def _columns(w, mask, gram, key, *, rounds, size, rest, temperatures) -> Refined:
    wide = _given.wide(w)
    before = column_errors(gram, jnp.where(mask, 0, wide))
    solve = jax.vmap(
        functools.partial(_round, gram=gram, size=size, temperatures=temperatures),
        in_axes=(1, 1, 1, 1, 0),
        out_axes=1,
    )

    def step(state, i):
        kept, last = state
        gradient = -2 * dot(gram, jnp.where(kept, 0, wide))
        tabu = last > i - 1 - rest
        keys = jax.random.split(jax.random.fold_in(key, i), w.shape[1])
        kept, chosen = solve(wide, kept, gradient, tabu, keys)
        return (kept, jnp.where(chosen, i, last)), None

    last = jnp.full(w.shape, -rounds - rest - 2)
    (kept, _), _ = lax.scan(step, (mask, last), jnp.arange(rounds))
    after = column_errors(gram, jnp.where(kept, 0, wide))
    better = after < before
    return Refined(
        jnp.where(better, kept, mask), jnp.where(better, after, before), before
    )


def _round(w, kept, gradient, tabu, key, *, gram, size, temperatures):
    """One block of one column: what is kept now, and which weights took part."""
    curved = jnp.diagonal(gram) * w**2
    # By how much the loss falls when a weight alone changes its state.
    falls = jnp.where(kept, w * gradient - curved, -w * gradient - curved)
    places, free = _block(falls, kept, tabu, size // 2, size)
    hessian = 2 * gram[places[:, None], places]
    now = ~kept[places] & free
    program = icbs_program(w[places], now, gradient[places], hessian)
    new = anneal(program, now, key=key, free=free, temperatures=temperatures)
    chosen = jnp.zeros(kept.shape, bool).at[places].set(free)
    return kept.at[places].set(jnp.where(free, ~new, kept[places])), chosen


def _block(order, kept, tabu, first: int, size: int) -> tuple[Array, Array]:
    """Places of `first` pruned weights and the rest kept ones, highest order first.

    Where there are fewer, places follow that are not free, all of them distinct. A block
    as large as all takes everything.
    """
    if size == len(kept):
        return jnp.arange(size), jnp.ones(size, bool)
    lowest = jnp.where(tabu, -jnp.inf, order)
    _, back = lax.top_k(jnp.where(kept, -jnp.inf, lowest), first)
    taken = jnp.zeros(kept.shape, bool).at[back].set(True)
    # What is taken already comes after all others, -inf too.
    rank = jnp.where(kept & ~tabu, lowest, -jnp.inf)
    rank = jnp.maximum(rank, jnp.finfo(rank.dtype).min)
    _, goes = lax.top_k(jnp.where(taken, -jnp.inf, rank), size - first)
    places = jnp.concatenate([back, goes])
    is_first = jnp.arange(size) < first
    return places, ~tabu[places] & (kept[places] != is_first)
