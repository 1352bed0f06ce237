"""Which experts of a mixture a task needs: PreMoe by routers, REAP by what experts give."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree
from jaxprune.structured._methods import _consumers, _taps
from jaxprune.structured._methods._biases import biases, replaced
from jaxprune.structured._methods._taps import TokenWeights, Use
from jaxprune.structured._reading._graph import Graph
from jaxprune.structured._reading._kinds import Kind


def premoe(
    graph: Graph,
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    k: int | None = None,
    confidence: float | None = None,
    kinds: Sequence[Kind] = ("expert",),
    token_weights: TokenWeights = None,
) -> dict[str, np.ndarray]:
    """Scores of experts: their mean logit over tokens, 0 where they are not chosen.

    With `l` the logits of a router, `E_t[l_e 1(e among the k largest)]`; with `confidence`
    r, only where the softmax over these k logits is r or more. An expert that the task of
    the batches never asks for scores 0.

    Args:
      graph: of `trace`.
      fn: the function that was traced: `fn(params, *args)`.
      params: the parameters that it was traced with.
      batches: of the task: tuples of arguments `args`; anything else is one argument.
      k: experts of a token; by default the number that the function chooses, by `top_k`.
      confidence: the least share, in (0, 1]; `None` counts all k.
      kinds: of groups to score.
      token_weights: `token_weights(*args)` gives a weight for each token, 0 for padding,
        as in `jaxprune.calibrate`.

    Returns:
      Scores [experts] by name of the group, summed over the layers of a scan:
      `plan(graph, scores, ratio=..., kinds=("expert",))`. `rewrite(fn, removed="absent")`
      then chooses among the experts that are kept.

    Raises:
      ValueError: if a number is out of range, there is no batch, or no router is found:
        a product with one matrix that gives a number for each expert, without a bias.

    References:
      Pei et al., "PreMoe: Lightening MoEs on Constrained Memory by Expert Pruning and
      Retrieval", arXiv 2505.17639 (TCESS), and their code; a later version of the paper has
      another score, which was not read.
    """
    if confidence is not None and not 0 < confidence <= 1:
        raise ValueError(
            f"confidence: got {confidence!r}; expected a share in (0, 1], or None."
        )
    added = biases(graph)

    def uses_of(trace: tracing.Trace) -> list[Use]:
        found = []
        for group in _consumers.groups_of(graph, kinds):
            most = group.minimum if k is None else k
            if not 1 <= most <= group.size:
                raise ValueError(
                    f"k: got {k!r}; expected a number from 1 to {group.size}, the experts."
                )
            measure = functools.partial(_chosen_logits, k=most, confidence=confidence)
            for m in group.members:
                for site in (s for s in trace.sites if s.path == m.path):
                    if _is_router(site, m.axis, group.size) and m.path not in added:
                        reading = trace.readings[site.activation]
                        found.append(
                            Use(group.name, site, reading, group.size, measure)
                        )
        if not found:
            groups = [f"{g.name} ({g.kind})" for g in graph.groups]
            raise ValueError(
                f"kinds: no product without a bias gives a number for each unit of a group of "
                f"the kinds {tuple(kinds)}. The groups are: {_tree.listing(groups)}."
            )
        return found

    return _taps.means(fn, params, batches, uses_of, token_weights)


def _is_router(site: tracing.Site, axis: int, size: int) -> bool:
    axes = site.axes
    return axes is not None and axes[3] == (axis,) and site.matrix.N == size


def _chosen_logits(
    x: Float[Array, "batch K rows"],
    w: Float[Array, "batch K experts"],
    weights: Float[Array, " rows"],
    *,
    k: int,
    confidence: float | None,
) -> Float[Array, " experts"]:
    logits = jnp.einsum("bkt,bke->te", x, w, precision=lax.Precision.HIGHEST)
    values, chosen = lax.top_k(logits, k)
    if confidence is not None:
        values = jnp.where(jax.nn.softmax(values, -1) >= confidence, values, 0)
    values = values * weights[:, None]
    return jnp.zeros(w.shape[-1]).at[chosen.ravel()].add(values.ravel())


def reap(
    layer: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    experts: Mapping[str, int],
) -> np.ndarray:
    """Scores of the experts of a layer: the mean size of what one gives to its tokens.

    `mean_t g_e(t) ‖f_e(t)‖₂` over the tokens that an expert e is sent, with g its gate and
    f its output. What an expert gives is found as the derivative of the layer by a factor
    on the expert's last matrix, in which it is linear: so it does not matter how tokens get
    to experts, and the norm is that of the gated output.

    Args:
      layer: `layer(params, *args)` gives the output of the mixture alone,
        `[..., features]`, one row a token, without the residual stream.
      params: of the layer.
      batches: tuples of arguments `args`; anything else is one argument.
      experts: `{path: axis}` of the leaves that an expert's output is linear in: its last
        matrix, and the bias behind it if there is one.

    Returns:
      Scores [experts]; an expert that gets no token scores 0. Tokens for which an expert
      gives exactly 0 count as not sent.

    Raises:
      ValueError: if a leaf or axis is not there, sizes differ, or there is no batch.

    Example:
      >>> def layer(params, x):
      ...     gates = jax.nn.softmax(x @ params["router"])
      ...     return jnp.einsum("te,td,edf->tf", gates, x, params["out"])
      >>> out = jnp.stack([jnp.eye(2), jnp.zeros((2, 2))])
      >>> params = {"router": jnp.zeros((2, 2)), "out": out}
      >>> x = jnp.array([[3.0, 4.0]])
      >>> jp.structured.reap(layer, params, [x], experts={"out": 0}).tolist()
      [2.5, 0.0]

    References:
      Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
      arXiv 2510.13999, and their code.
    """
    paths, leaves, _ = _tree.flatten(params)
    known = dict(zip(paths, leaves, strict=True))
    sizes = {}
    for path, axis in experts.items():
        if path not in known or not -known[path].ndim <= axis < known[path].ndim:
            raise ValueError(
                f"experts: got the axis {axis} of {path!r}, which is none of the leaves "
                f"{_tree.listing(paths)}, or has no such axis."
            )
        sizes[path] = known[path].shape[axis]
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"experts: the axes have the sizes {sizes}; expected one number."
        )
    (size,) = set(sizes.values())

    def scaled(factors: Array, params: PyTree, args: tuple[Any, ...]) -> Array:
        paths, leaves, _ = _tree.flatten(params)
        new = {}
        for path, x in zip(paths, leaves, strict=True):
            if path in experts:
                shape = [1] * x.ndim
                shape[experts[path]] = size
                new[path] = x * factors.astype(x.dtype).reshape(shape)
        return layer(replaced(params, new), *args)

    @jax.jit
    def step(params: PyTree, args: tuple[Any, ...]) -> tuple[Array, Array]:
        def one(direction: Array) -> tuple[Array, Array]:
            ones = jnp.ones(size)
            run = functools.partial(scaled, params=params, args=args)
            _, given = jax.jvp(run, (ones,), (direction,))
            norms = jnp.linalg.norm(given.astype(jnp.float32), axis=-1)
            return jnp.sum(norms), jnp.sum(norms > 0)

        return lax.map(one, jnp.eye(size))

    sums, tokens, count = np.zeros(size), np.zeros(size), 0
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        norms, sent = step(params, args)
        sums, tokens = sums + np.asarray(norms), tokens + np.asarray(sent)
        count += 1
    if not count:
        raise ValueError("batches: there is none; expected at least one.")
    return sums / np.maximum(tokens, 1)


def nearest_task(
    profiles: Mapping[str, Mapping[str, np.ndarray]], scores: Mapping[str, np.ndarray]
) -> str:
    """The task whose stored scores are nearest to those of a query, in the 2-norm.

    Args:
      profiles: scores of each task, as `premoe` gives them.
      scores: of the query, of the same groups.

    Raises:
      ValueError: if there is no profile, or one has other groups.

    Example:
      >>> code, prose = np.eye(2)
      >>> tasks = {"code": {"moe": code}, "prose": {"moe": prose}}
      >>> jp.structured.nearest_task(tasks, {"moe": np.array([0.9, 0.2])})
      'code'

    References:
      Pei et al., arXiv 2505.17639 (task-adaptive expert retrieval); their code compares the
      scores of the first layer with experts, this those of all that are given.
    """
    if not profiles or any(p.keys() != scores.keys() for p in profiles.values()):
        raise ValueError(
            f"profiles: got {[sorted(p) for p in profiles.values()]}; expected at least one, "
            f"each with scores of {sorted(scores)}."
        )
    distances = {
        task: sum(float(np.sum((p[n] - scores[n]) ** 2)) for n in scores)
        for task, p in profiles.items()
    }
    return min(distances, key=lambda task: distances[task])
