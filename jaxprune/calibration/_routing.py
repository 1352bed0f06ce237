"""Which experts a router chooses."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Float

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree, Where
from jaxprune.tracing import Site, Tap
from jaxprune.tracing._walk import CALLS, jaxpr_of


class Routing(NamedTuple):
    """What a router chose, float32; a scan over layers puts an axis in front.

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


class _Choice(NamedTuple):
    place: tuple[int, ...]
    loops: tuple[tuple[int, ...], ...]
    axis: int
    experts: int


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

    The choice of a router is the `top_k` or `argmax` over its experts that comes next
    after its product; a softmax, a bias or noise may stand between them.

    Args:
      fn: `fn(params, *args)`, pure, of arrays.
      params: its parameters.
      batches: tuples of arguments `args`; anything else is one argument.
      where: the leaves that routers are, such as `"*/router/kernel"`; see
        `jaxprune.prune`.
      token_weights: `token_weights(*args)` gives a weight for each token, 0 for padding,
        whose scores may be anything, NaN too.
      initial: what to go on from.

    Returns:
      What each router chose, by the path of its leaf.

    Raises:
      ValueError: if there is no batch, if a leaf is not followed by a choice among as many
        experts as it has outputs, or if token weights do not fit the tokens.

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
      Retrieval, arXiv 2505.17639.
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
        found: dict[str, Routing] = {}
        for i, (site, _) in enumerate(pairs):
            before = found.get(site.path)
            now = states[i]
            found[site.path] = now if before is None else _add(before, now)
        return found

    return step


def _pairs(
    closed: ClosedJaxpr, params: PyTree, where: Where
) -> list[tuple[Site, _Choice]]:
    """Each use of a router, and the choice that follows it."""
    sites = tracing.of_jaxpr(closed, params).sites
    paths, picked, _ = _tree.flatten(_tree.select(params, where))
    chosen = {p for p, x in zip(paths, picked, strict=True) if not _tree.is_hole(x)}
    owners: dict[Site, _Choice] = {}
    for choice in _choices(closed.jaxpr, (), ()):
        before = [
            s
            for s in sites
            if s.place < choice.place
            and s.matrix.N == choice.experts
            and tuple(x.place for x in s.loops) == choice.loops
        ]
        if before:
            owners.setdefault(max(before, key=lambda s: s.place), choice)
    if missing := sorted(chosen - {s.path for s in owners}):
        raise ValueError(
            f"where: no top_k or argmax follows {_tree.listing(missing)}, over an axis of "
            "as many entries as it has outputs, before the next product of that size. "
            "Choose the leaves of routers only; choices by sorting are not seen."
        )
    return [(s, c) for s, c in owners.items() if s.path in chosen]


def _choices(jaxpr: Jaxpr, place, loops) -> Iterable[_Choice]:
    for i, eqn in enumerate(jaxpr.eqns):
        here, name = (*place, i), eqn.primitive.name
        if name in ("top_k", "argmax"):
            shape = eqn.invars[0].aval.shape
            (axis,) = eqn.params.get("axes", (eqn.params.get("axis", -1),))
            yield _Choice(here, loops, axis % len(shape), shape[axis])
        elif name in CALLS:
            yield from _choices(jaxpr_of(eqn.params)[0], here, loops)
        elif name == "scan":
            yield from _choices(eqn.params["jaxpr"].jaxpr, here, (*loops, here))
        elif name == "cond":
            for j, branch in enumerate(eqn.params["branches"]):
                yield from _choices(branch.jaxpr, (*here, j), loops)
        elif name == "while":
            body = eqn.params["body_jaxpr"].jaxpr
            yield from _choices(body, (*here, 1), (*loops, here))


def _tap(site: Site, choice: _Choice, weights: Array | None) -> Tap:
    vector = jax.ShapeDtypeStruct((choice.experts,), jnp.float32)
    zero = Routing(jax.ShapeDtypeStruct((), jnp.float32), vector, vector)

    def read(eqn, operands, indices):
        del indices
        scores = jnp.moveaxis(operands[0], choice.axis, -1).astype(jnp.float32)
        tokens = scores.shape[:-1]
        scores = scores.reshape(-1, choice.experts)
        _, index = lax.top_k(scores, eqn.params.get("k", 1))
        taken = jnp.sum(jax.nn.one_hot(index, choice.experts), axis=1)
        w = jnp.ones(len(scores)) if weights is None else _flat(weights, tokens, site)
        taken = taken * w[:, None]
        score = jnp.where(taken != 0, scores, 0) * taken
        return Routing(jnp.sum(w), jnp.sum(taken, axis=0), jnp.sum(score, axis=0))

    return Tap(choice.place, read, _add, zero, site.loops)


def _flat(weights: Array, tokens: tuple[int, ...], site: Site) -> Array:
    if weights.size != math.prod(tokens):
        raise ValueError(
            f"token_weights: got the shape {weights.shape}, and {site.path} chooses for "
            f"tokens {tokens}; expected a weight for each of them."
        )
    return weights.reshape(-1).astype(jnp.float32)


def _add(a: Routing, b: Routing) -> Routing:
    return jax.tree.map(jnp.add, a, b)
