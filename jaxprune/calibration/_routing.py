"""Which experts a router chooses."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Float

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree, Where
from jaxprune.calibration._choices import Choice, choices
from jaxprune.calibration._read import at_index
from jaxprune.tracing import Loop, Reading, Site, Tap


class Routing(NamedTuple):
    """What a router chose, float32.

    A scan over layers puts an axis in front, and so does a loop that takes layers out of a
    leaf by an index, or several static slices of one leaf, in the order they have in it.

    Sums over tokens, so that those of two sets of batches are added:
    `jax.tree.map(jnp.add, a, b)`.

    Attributes:
      tokens: seen; with weights, the sum of these.
      chosen: tokens that each expert was chosen for.
      score: sum of the scores that each expert was chosen by: of logits, or of
        probabilities, whichever the function chooses among.
    """

    tokens: Float[Array, "*stack"]
    chosen: Float[Array, "*stack experts"]
    score: Float[Array, "*stack experts"]


def routing(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    where: Where,
    token_weights: Callable[..., Array] | None = None,
    initial: Mapping[str, Routing] | None = None,
) -> dict[str, Routing]:
    """How often each expert of a mixture is chosen, and by what scores.

    The choice of a router is the first `top_k` or `argmax` over the outputs of its
    product, which are followed through elementwise operations (a softmax, a bias, noise
    that is learned or not), transpositions, reshapes, and calls, loops and branches.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters.
      batches: tuples of arguments `args`; anything else is one argument.
      where: the leaves that routers are, such as `"*/router/kernel"`; see
        `jaxprune.prune`.
      token_weights: `token_weights(*args)` gives a weight for each token, 0 for padding,
        whose scores may be anything, NaN too. Of the shape of the tokens where the
        choice is made, or flat and in the same order.
      initial: what to go on from.

    Returns:
      What each router chose, by the path of its leaf.

    Raises:
      ValueError: if there is no batch, if a leaf is not followed by a choice among its
        outputs or is used as routers of several forms, or if token weights or `initial`
        do not fit.

    Example:
      >>> def fn(params, x):
      ...     weights, experts = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 1)
      ...     return jnp.sum(weights * params["up"][experts[:, 0]], axis=-1)
      >>> params = {"router": jnp.eye(3), "up": jnp.ones((3, 1))}
      >>> x = jnp.eye(3)[jnp.array([0, 2, 2])]
      >>> found = jp.calibration.routing(fn, params, [x], where="router")
      >>> found["router"].chosen.tolist()
      [1.0, 0.0, 2.0]

    References:
      `score` over logits, divided by `tokens`, is the task-conditioned expected selection
      score of PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and
      Retrieval, arXiv 2505.17639, without its least confidence.
    """
    steps: dict[Any, Callable] = {}
    total = None if initial is None else dict(initial)
    empty = True
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        leaves, treedef = jax.tree.flatten((params, args))
        key = treedef, tuple(jax.typeof(x) for x in leaves)
        if key not in steps:
            steps[key] = _compiled(fn, params, args, where, token_weights)
        found = steps[key](params, args)
        if empty and total is not None:
            _check_initial(total, found)
        empty = False
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if empty or total is None:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for fn. A generator that was used up gives nothing a second time."
        )
    return total


def _compiled(fn, params, args, where, token_weights) -> Callable:
    closed = jax.make_jaxpr(fn)(params, *args)
    pairs = _pairs(closed, params, where)

    @jax.jit
    def step(params, args):
        weights = None if token_weights is None else token_weights(*args)
        taps = {i: _tap(*pair, weights) for i, pair in enumerate(pairs)}
        _, leaves, _ = _tree.flatten(params)
        operands = [x for x in leaves if not _tree.is_hole(x)] + jax.tree.leaves(args)
        _, states = tracing.tap(closed, operands, taps)
        parts: dict[str, dict[int, Routing]] = {}
        for i, (site, *_) in enumerate(pairs):
            own = parts.setdefault(site.path, {})
            before = own.get(site.offset)
            own[site.offset] = states[i] if before is None else _add(before, states[i])
        return {path: _stacked(own) for path, own in parts.items()}

    return step


def _stacked(parts: dict[int, Routing]) -> Routing:
    """Parts of a leaf, in the order in which they lie in it, behind the loops."""
    found = [parts[offset] for offset in sorted(parts)]
    if len(found) == 1:
        return found[0]
    axis = found[0].tokens.ndim
    return jax.tree.map(lambda *x: jnp.stack(x, axis), *found)


def _pairs(
    closed: ClosedJaxpr, params: PyTree, where: Where
) -> list[tuple[Site, Reading, Choice]]:
    """Each use of a router, and the choice that follows it."""
    trace = tracing.of_jaxpr(closed, params, where=where)
    found = choices(closed.jaxpr, trace.sites, trace.readings)
    pairs = [
        (site, trace.readings[site.activation], found[i])
        for i, site in enumerate(trace.sites)
        if i in found
    ]
    paths, picked, _ = _tree.flatten(_tree.select(params, where))
    chosen = {p for p, x in zip(paths, picked, strict=True) if not _tree.is_hole(x)}
    if missing := sorted(chosen - {s.path for s, *_ in pairs}):
        raise ValueError(
            f"where: no top_k or argmax follows {_tree.listing(missing)}, over all the "
            "outputs of one router, which only elementwise operations, reductions and "
            "reshapes may change before. Choose the leaves of routers only; choices by "
            "sorting, those of tokens by experts, and those of several routers side by "
            "side are not counted."
        )
    for path in chosen:
        sizes = {(s.stack, s.matrix.N) for s, *_ in pairs if s.path == path}
        if len(sizes) > 1:
            raise ValueError(
                f"where: {path} is used as routers of several forms, with "
                f"{sorted(n for _, n in sizes)} experts; expected one number of experts "
                "and of layers. Leave it out."
            )
    return pairs


def _tap(site: Site, reading: Reading, choice: Choice, weights: Array | None) -> Tap:
    experts = site.matrix.N
    lengths = [length for _, _, length in reading.indices]

    def empty():
        vector = jnp.zeros((*lengths, experts), jnp.float32)
        return Routing(jnp.zeros(tuple(lengths), jnp.float32), vector, vector)

    def read(eqn, operands, indices):
        scores = jnp.moveaxis(operands[0], choice.axis, -1)
        tokens = scores.shape[:-1]
        scores = scores.reshape(-1, experts)
        _, index = lax.top_k(scores, eqn.params.get("k", 1))
        taken = jnp.sum(jax.nn.one_hot(index, experts, dtype=jnp.float32), axis=1)
        w = (
            jnp.ones(len(scores), jnp.float32)
            if weights is None
            else _flat(weights, tokens, site)
        )
        taken = taken * w[:, None]
        score = jnp.where(taken != 0, scores.astype(jnp.float32), 0) * taken
        found = Routing(jnp.sum(w), jnp.sum(taken, axis=0), jnp.sum(score, axis=0))
        for i, length in reversed(list(zip(indices, lengths, strict=True))):
            found = at_index(found, i, length)
        return found

    own = {x.place: x for x in site.loops}
    return Tap(
        choice.place,
        read,
        _add,
        jax.eval_shape(empty),
        tuple(own.get(p, Loop(p, None, False)) for p in choice.loops),
        tuple((place, operand) for place, operand, _ in reading.indices),
    )


def _flat(weights: Array, tokens: tuple[int, ...], site: Site) -> Array:
    """Weights in the order of the tokens, one of the two flat or both alike."""
    given, wanted = (tuple(n for n in x if n != 1) for x in (weights.shape, tokens))
    alike = given == wanted or min(len(given), len(wanted)) < 2
    if weights.size != math.prod(tokens) or not alike:
        raise ValueError(
            f"token_weights: got the shape {weights.shape}, and {site.path} chooses for "
            f"tokens {tokens}; expected a weight for each of them, of that shape, or flat "
            "and in that order."
        )
    return weights.reshape(-1).astype(jnp.float32)


def _check_initial(initial: Mapping[str, Routing], found: dict[str, Routing]) -> None:
    shapes = (
        {path: tuple(map(jnp.shape, x)) for path, x in each.items()}
        for each in (initial, found)
    )
    before, now = shapes
    if before != now:
        raise ValueError(
            f"initial: got shapes {before}; expected {now}, as routing gives them for the "
            "same params and where."
        )


def _add(a: Routing, b: Routing) -> Routing:
    return jax.tree.map(jnp.add, a, b)
