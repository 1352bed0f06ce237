"""Sums over tokens of anything that can be said of a product with a leaf."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree
from jaxprune.calibration._read import weights_of_rows

Measure = Callable[[Array, Array, Array], Array]
"""`measure(x [batch, K, rows], w [batch, K, N], weights [rows])`, float32, gives sums over
rows, each times its weight, `[units]`. Rows of weight 0 are 0."""

TokenWeights = Callable[..., Array] | None


class Use(NamedTuple):
    """A product to be measured.

    Attributes:
      group: what it is measured for.
      site: the product.
      reading: of its activation.
      size: how many numbers the measure gives.
      measure: what to compute.
    """

    group: str
    site: tracing.Site
    reading: tracing.Reading
    size: int
    measure: Measure


class Sums(NamedTuple):
    """Sums over tokens, and how many tokens; stacked where the products are."""

    sums: Float[Array, "*stack units"]
    tokens: Float[Array, "*stack"]


def means(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    uses_of: Callable[[tracing.Trace], list[Use]],
    token_weights: TokenWeights = None,
) -> dict[str, np.ndarray]:
    """Means over tokens, summed over stacks and over the products of a group.

    Args:
      fn: `fn(params, *args)`.
      params: its parameters.
      batches: tuples of arguments `args`; anything else is one argument.
      uses_of: what to measure.
      token_weights: as in `jaxprune.calibrate`.

    Raises:
      ValueError: if there is no batch, or a product is none that is followed here.
    """
    total: dict[Any, Sums] = {}
    steps: dict[Any, Any] = {}
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        key = tuple(map(jax.typeof, jax.tree.leaves(args))), jax.tree.structure(args)
        if key not in steps:
            steps[key] = _step(fn, params, args, uses_of, token_weights)
        uses, step = steps[key]
        for use, new in zip(uses, step(params, args), strict=True):
            place = use.group, use.site.place
            total[place] = _add(total[place], new) if place in total else new
    if not steps:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for fn."
        )
    found: dict[str, np.ndarray] = {}
    for (group, _), x in total.items():
        mean = np.asarray(x.sums, np.float64) / np.asarray(x.tokens)[..., None]
        found[group] = found.get(group, 0) + mean.reshape(-1, mean.shape[-1]).sum(0)
    return found


def _step(
    fn, params: PyTree, args, uses_of, token_weights
) -> tuple[list[Use], Callable]:
    """What is read in a batch of these shapes, and a compiled function that reads it."""
    closed = jax.make_jaxpr(fn)(params, *args)
    uses = uses_of(tracing.of_jaxpr(closed, params))
    for use in uses:
        _check(use)

    @jax.jit
    def step(params: PyTree, args: tuple[Any, ...]) -> list[Sums]:
        weights = token_weights(*args) if token_weights else None
        taps = {i: _tap(use, weights) for i, use in enumerate(uses)}
        leaves = [x for x in _tree.flatten(params)[1] if not _tree.is_hole(x)]
        _, found = tracing.tap(closed, [*leaves, *jax.tree.leaves(args)], taps)
        return [found[i] for i in range(len(uses))]

    return uses, step


def _check(use: Use) -> None:
    why = ""
    if use.site.primitive != "dot_general":
        why = f"is used in a {use.site.primitive}"
    elif use.reading.indices or use.reading.moved:
        why = "is indexed with a computed number, or has batch axes of your own"
    elif any(w is not None for w in use.reading.windows):
        why = "meets a part of an activation"
    if why:
        raise ValueError(
            f"kinds: {use.site.path} {why}, which is not followed here. Leave its group out "
            "with kinds=, or score it otherwise."
        )


def _tap(use: Use, weights: Array | None) -> tracing.Tap:
    reading = use.reading

    def read(eqn: Any, operands: Sequence[Any], indices: Any) -> Sums:
        here = _activation(eqn, operands, use)
        x, w = operands[here], operands[1 - here]
        own, other = _axes(eqn, here)
        pairs = dict(zip(own, other, strict=True))
        first = (*reading.batch_axes, *reading.k_axes)
        batch, k = reading.shape
        free = tuple(n for a, n in enumerate(x.shape) if a not in first)
        x = jnp.moveaxis(x, first, range(len(first)))
        w = jnp.moveaxis(w, [pairs[a] for a in first], range(len(first)))
        x, w = (a.astype(jnp.float32).reshape(batch, k, -1) for a in (x, w))
        each = jnp.ones(x.shape[2])
        if weights is not None:
            each = weights_of_rows(weights, free, use.site.path)[0].astype(jnp.float32)
            x = jnp.where(each != 0, x, 0)  # what does not count may be anything
        return Sums(use.measure(x, w, each), jnp.sum(each))

    zero = jax.eval_shape(lambda: Sums(jnp.zeros(use.size), jnp.zeros(())))
    return tracing.Tap(
        place=use.site.place, read=read, merge=_add, zero=zero, loops=use.site.loops
    )


def _activation(eqn: Any, operands: Sequence[Any], use: Use) -> int:
    """Which operand is what the leaf is multiplied with."""
    batch, k = use.reading.shape
    sizes = use.site.rows * batch * k, batch * k * use.site.matrix.N
    wanted = {*use.reading.batch_axes, *use.reading.k_axes}
    found = [
        i for i in (0, 1)
        if (operands[i].size, operands[1 - i].size) == sizes
        and set(_axes(eqn, i)[0]) == wanted
    ]  # fmt: skip
    if use.reading.place == use.site.place:
        return use.reading.operand
    if len(found) != 1:
        raise ValueError(
            f"batches: where {use.site.path} is multiplied, it cannot be told from its "
            "activation, which has the same shape. Pass another number of tokens."
        )
    return found[0]


def _axes(eqn: Any, operand: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of an operand that meet axes of the other: contracted, and batch axes."""
    contracted, batch = eqn.params["dimension_numbers"]
    own, other = ((*contracted[i], *batch[i]) for i in (operand, 1 - operand))
    return own, other


def _add(a: Sums, b: Sums) -> Sums:
    return Sums(a.sums + b.sums, a.tokens + b.tokens)
