"""Binary quadratic programs: which weights of a block to prune, given how many."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from jaxprune.posttrain._given import dot


class Program(NamedTuple):
    """`linear · x + xᵀ quadratic x + constant` of x in {0, 1}ⁿ, where 1 prunes a weight.

    Attributes:
      linear: `[n]`.
      quadratic: symmetric `[n, n]`.
      constant: a number.
    """

    linear: Float[Array, "n"]
    quadratic: Float[Array, "n n"]
    constant: Float[Array, ""]

    def value(self, pruned: Bool[Array, "n"]) -> Float[Array, ""]:
        """What pruning these weights gives."""
        x = pruned.astype(self.linear.dtype)
        return self.linear @ x + x @ dot(self.quadratic, x) + self.constant


def icbs_program(
    w: Float[Array, "n"],
    pruned: Bool[Array, "n"],
    gradient: Float[Array, "n"],
    hessian: Float[Array, "n n"],
    *,
    ridge: float = 0.0,
) -> Program:
    """The change of the loss when other weights of a block are pruned than now.

    To second order around the weights as they are pruned now. `value` of what is pruned
    now is 0.

    Args:
      w: dense weights of the block.
      pruned: what is pruned now.
      gradient: of the loss by the block, at the weights as pruned now.
      hessian: the same, or the mean of `g gᵀ` over samples for it (empirical Fisher).
      ridge: times the squared change of the weights is added.

    Example:
      >>> w, pruned = jnp.array([1.0, 2.0]), jnp.array([True, False])
      >>> hessian = jnp.array([[2.0, 1.0], [1.0, 4.0]])
      >>> gradient = hessian @ jnp.array([-1.0, 0.0])  # of (v - w) H (v - w) / 2
      >>> program = jp.posttrain.icbs_program(w, pruned, gradient, hessian)
      >>> program.value(pruned).item(), program.value(~pruned).item()
      (0.0, 7.0)

    References:
      Rosenberg et al., Scalable Iterative Pruning of Large Language and Vision Models
      using Block Coordinate Descent, arXiv 2411.17796, and the authors' code.
    """
    moved = jnp.where(pruned, -w, 0)  # from dense to now
    linear = w * (dot(hessian, moved) - gradient) + ridge * w * (2 * moved + w)
    constant = moved @ (dot(hessian, moved) / 2 - gradient) + ridge * moved @ moved
    return Program(linear, w[:, None] * hessian * w / 2, constant)


def anneal(
    program: Program,
    pruned: Bool[Array, "n"],
    *,
    key: Key[Array, ""],
    free: Bool[Array, "n"] | None = None,
    temperatures: int = 60,
    hottest: float = 3.0,
    coldest: float = 0.03,
) -> Bool[Array, "n"]:
    """Minimises a program over sets of one size: simulated annealing, then descent.

    At each temperature every weight in turn is offered a swap with a random one of the
    other kind. The best set that was met is then improved by its best swap until none
    helps. The result is never worse than the start. The authors' annealer does the same
    from several starts, over a wider range of temperatures, and without the descent.

    Args:
      program: to minimise.
      pruned: where to start; the number of True stays.
      key: for the swaps.
      free: which weights may be swapped; all by default.
      temperatures: how many, geometrically spaced.
      hottest: the first, in units of the mean size of the change of a swap.
      coldest: the last.

    Example:
      >>> program = jp.posttrain.Program(
      ...     jnp.array([3.0, 1.0, 2.0]), jnp.zeros((3, 3)), jnp.float32(0)
      ... )
      >>> start = jnp.array([True, False, False])
      >>> jp.posttrain.anneal(program, start, key=jax.random.key(0)).tolist()
      [False, True, False]

    References:
      Rosenberg et al., arXiv 2411.17796 (the constrained annealer of the code).
    """
    count = program.linear.shape[0]
    free = jnp.ones(count, bool) if free is None else free
    everything = _swaps(program, pruned, free)
    allowed = jnp.isfinite(everything)
    sizes = jnp.where(allowed, jnp.abs(everything), 0)
    unit = jnp.sum(sizes) / jnp.maximum(jnp.sum(allowed), 1)
    ratio = (coldest / hottest) ** (1 / max(temperatures - 1, 1))

    draws = jax.random.uniform(key, (temperatures * count, 2))

    def offer(t, state):
        x, field, value, best, least = state
        i = t % count
        temperature = unit * hottest * ratio ** (t // count)
        others = free & (x != x[i])
        chosen = jnp.floor(draws[t, 0] * jnp.sum(others)) + 1
        j = jnp.argmax(others & (jnp.cumsum(others) == chosen))
        # `out` comes back into the model, `into` is pruned in its place.
        out, into = jnp.where(x[i], i, j), jnp.where(x[i], j, i)
        change = _swap_change(program, field, out, into)
        luck = jnp.exp(-change / jnp.where(temperature > 0, temperature, 1))
        do = free[i] & jnp.any(others)
        do &= (change <= 0) | (draws[t, 1] < luck)
        x = x.at[out].set(x[out] & ~do).at[into].set(x[into] | do)
        turned = program.quadratic[into] - program.quadratic[out]
        field = field + jnp.where(do, turned, 0)
        value = value + jnp.where(do, change, 0)
        better = value < least
        return x, field, value, jnp.where(better, x, best), jnp.minimum(value, least)

    field = dot(program.quadratic, pruned.astype(program.linear.dtype))
    nothing = jnp.zeros_like(unit)
    state = pruned, field, nothing, pruned, nothing
    found = lax.fori_loop(0, temperatures * count, offer, state)[3]

    def improves(state):
        i, _, done = state
        return (i < count * count) & ~done

    def descend(state):
        i, x, _ = state
        changes = _swaps(program, x, free)
        out, into = jnp.unravel_index(jnp.argmin(changes), changes.shape)
        helps = changes[out, into] < -1e-6 * unit
        x = x.at[out].set(x[out] & ~helps).at[into].set(x[into] | helps)
        return i + 1, x, ~helps

    found = lax.while_loop(improves, descend, (0, found, False))[1]
    better = program.value(found) < program.value(pruned)
    return jnp.where(better, found, pruned)


def _swap_change(program: Program, field: Array, out: Array, into: Array) -> Array:
    q = program.quadratic
    change = program.linear[into] - program.linear[out] + 2 * (field[into] - field[out])
    return change + q[into, into] + q[out, out] - 2 * q[into, out]


def _swaps(program: Program, pruned: Array, free: Array) -> Float[Array, "n n"]:
    """The change by each swap, `[out, into]`; infinite where there is none."""
    q, x = program.quadratic, pruned.astype(program.linear.dtype)
    gain = program.linear + 2 * dot(q, x)
    diagonal = jnp.diagonal(q)
    change = (gain + diagonal) - (gain - diagonal)[:, None] - 2 * q
    return jnp.where((pruned & free)[:, None] & (~pruned & free), change, jnp.inf)
