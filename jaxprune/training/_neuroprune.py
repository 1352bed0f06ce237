"""NeuroPrune: sparse training by network topology (Dhurandhar et al., arXiv 2404.01306)."""

from collections.abc import Callable
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import _select, _tree, _wide, masks, penalties, schedules
from jaxprune._tree import PyTree
from jaxprune.allocation import exact
from jaxprune.training import _heads, _roles
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    mask_gradients,
    masked_view,
    replace_masks,
    start,
)
from jaxprune.training._roles import Roles

DegreeWeights = Callable[
    [Float[Array, "*stack fan_in units"]], Float[Array, "*stack units"]
]


class NeuroPruneState(NamedTuple):
    """What the method keeps beside masks.

    Attributes:
      thresholds: soft threshold of each step, by leaf; one number a unit (a column of a
        matrix under Eq. 1) or a row (of Q, K and V under Eq. 2), broadcast to the leaf.
      alive: heads not yet removed, `[stack, heads]`, by layer.
      fold: at [i, j], whether head `j` stands in for head `i` at this step,
        `[stack, heads, heads]`, by layer.
      folding: whether this step folds.
    """

    thresholds: dict[str, Float[Array, "..."]]
    alive: dict[str, Bool[Array, "stack heads"]]
    fold: dict[str, Bool[Array, "stack heads heads"]]
    folding: Bool[Array, ""]


def neuroprune(
    sparsity: float | Fraction | None = None,
    *,
    roles: Roles,
    begin: int = 0,
    end: int,
    every: int = 10,
    reading: penalties.Reading | DegreeWeights = "missing",
    attention: Literal["sqrt_l1", "l1"] = "sqrt_l1",
    strengths: tuple[float, float] | None = None,
    eps: float = 1e-4,
    allocation: Literal["global", "uniform"] = "global",
    theta: float | None = 0.15,
    theta_rel: float | None = None,
    head_every: int | None = None,
    fold: Literal["out", "mlp"] = "out",
) -> Method:
    r"""Sparse training of transformers by the topology of their connections.

    Three parts, all in the training run itself:

    1. *Preferential attachment* in the MLP: an l1 penalty on each neuron's incoming
       links, weighted by the share of them that is missing already (Eq. 1), so that
       neurons poor in links become poorer and the rich stay rich.
    2. *Attention*: the square root of the l1 norm of each input row of [Q, K, V], across
       heads (Eq. 2).
    3. *Redundant heads*: every `head_every` steps, heads whose weights differ from
       another's by at most a threshold are folded into it and masked (Algorithms 2, 3).
       `jaxprune.neuroprune_fold` and `jaxprune.structured.without_zeros` remove them
       after training.

    The penalties act as proximal steps after the inner optimizer: a soft threshold
    `strength * c` with `c` the weight of Eq. (1), or for Eq. (2) the slope
    `1 / (2 sqrt(row l1))` of its tangent (the exact proximal operator is
    `jaxprune.penalties.prox_sqrt_l1`; at these small steps the two differ by the square
    of the strength). From `begin` to `end` weights may come back; at `end` the mask is
    drawn, and the remaining steps train the kept weights alone.

    **The controller is ours**; the paper sweeps its coefficients. Every `every` steps it
    takes the number of weights that should be zero `every` steps later, on a cubic
    schedule, selects exactly the threshold `tau` of `|w| / c` below which that many lie,
    and spreads it: each of the steps shrinks by `c * tau / every`. What gradients push
    back is met by the next selection; where as many are zero already, `tau` is 0, and
    they are free until then. At `end` the smallest remaining weights go, so that the
    count is exact, unless removed heads have gone beyond it. So that every count can be
    reached, a unit with all of its links weighs as if half a link were missing.

    Differences from the paper, beside the controller: proximal steps instead of a term in
    the loss; `c` is refreshed every `every` steps, not each step; heads are folded into
    W_O by default (exact for equal heads), and `fold="mlp"`, as Algorithm 2 is written,
    masks the heads but not the rows of L_in that it empties; with `roles.degree` other
    matrices can take part. The formulas of Eq. (1) and (2) are reconstructed from the
    paper's text.

    Args:
      sparsity: share of the penalised weights that is pruned at `end`, the same for the
        matrices under Eq. (1) and for Q, K, V; more of these if the heads removed make
        up more. `None` with `strengths`.
      roles: which leaf plays which part; other leaves are not masked.
      begin: first step of shrinking.
      end: step at which the mask is drawn.
      every: steps between refreshes of weights and strength.
      reading: how missing links weigh; see `jaxprune.penalties.degree_weights`. Or a
        function from a kernel to weights, for experiments.
      attention: the penalty on Q, K, V: Eq. (2), or plain l1 as a baseline.
      strengths: instead of a sparsity, fixed soft thresholds a step for Eq. (1) and
        Eq. (2), each the coefficient times the learning rate. At `end` weights below
        `eps` are pruned.
      eps: below this a link counts as missing; the paper's value.
      allocation: `"global"` compares `|w| / c` across all matrices of a part, as one
        coefficient does; `"uniform"` gives each matrix the same sparsity.
      theta: largest absolute difference of heads that count as redundant; the paper uses
        0.15 to 0.25 for BERT.
      theta_rel: the same relative to the largest weight of the layer's Q, K and V, for
        models of another scale; in place of `theta`.
      head_every: steps between head removals, in the paper one epoch; `None` removes
        none. Only up to `end`.
      fold: where the output of a removed head goes.

    Raises:
      ValueError: if roles match nothing or do not belong together, both or neither of
        `sparsity` and `strengths` are given, or a value is out of range.

    Example:
      >>> roles = jp.Roles(mlp_in="*/up/kernel", mlp_out="*/down/kernel")
      >>> tx = jp.masked(optax.adamw(1e-4), jp.neuroprune(0.7, roles=roles, end=300))

    References:
      Dhurandhar et al., NeuroPrune: A Neuro-inspired Topological Sparse Training
      Algorithm for Large Language Models, arXiv 2404.01306, Eq. (1), (2), Alg. 1-3.
    """
    _check_options(sparsity, strengths, reading, attention, eps, allocation, fold)
    _check_heads(theta, theta_rel, head_every)
    final = exact(0 if sparsity is None else sparsity)
    schedule = schedules.cubic(final, begin, end, every)
    weigh = reading if callable(reading) else _reading(reading, eps)

    def init(params: PyTree) -> MethodState:
        leaves = _roles.leaves_by_path(params)
        if head_every is not None:
            _check_layers(_roles.layers(roles, list(leaves)), fold)
        parts = _parts(roles, list(leaves))
        everything = [p for part in parts for p in part]
        factors = _factors(leaves, parts, roles, weigh, attention)
        alive, identity = {}, {}
        for layer in _layers_with_heads(roles, list(leaves)):
            q, *_ = _split(leaves, layer, roles)
            stack, heads = q.shape[0], q.shape[2]
            alive[layer.name] = jnp.ones((stack, heads), bool)
            identity[layer.name] = jnp.tile(jnp.eye(heads, dtype=bool), (stack, 1, 1))
            everything += [p for p in (*layer.qkv, layer.out) if p not in everything]
        own = NeuroPruneState(
            {p: jnp.zeros_like(c) for p, c in factors.items()},
            alive, identity, jnp.bool_(False),
        )  # fmt: skip
        found = _tree.map_with_path(
            lambda p, x: jnp.ones_like(x, bool) if p in everything else None, params
        )
        return start(
            found,
            _tree.map_with_path(lambda p, x: x if p in everything else None, params),
            own,
        )

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        state = advance(grads, state, params)
        state = state._replace(own=state.own._replace(folding=jnp.bool_(False)))
        shrinks = schedule.due(step) & (step < end)
        state = lax.cond(shrinks, lambda s: plan(s, step, params), lambda s: s, state)
        if head_every is not None and state.own.alive:
            due = ((step + 1) % head_every == 0) & (step <= end)
            state = lax.cond(due, lambda s: drop_heads(s, params), lambda s: s, state)
        return lax.cond(step == end, lambda s: draw(s, params), lambda s: s, state)

    def plan(state: MethodState, step: Array, params: PyTree) -> MethodState:
        """Sets the soft thresholds of the next `every` steps."""
        leaves = _roles.leaves_by_path(params)
        parts = _parts(roles, list(leaves))
        factors = _factors(leaves, parts, roles, weigh, attention)
        if strengths is not None:
            taus = {p: jnp.float32(s) for part, s in zip(parts, strengths, strict=True)
                    for p in part}  # fmt: skip
        else:
            ahead = schedule.fraction(jnp.minimum(step + every, end))
            scores = {p: jnp.abs(leaves[p]) / c for p, c in factors.items()}
            cuts = _cuts(scores, parts, ahead)
            taus = {p: _select.threshold_value(cut) / every for p, cut in cuts.items()}
        thresholds = {p: (taus[p] * c).astype(c.dtype) for p, c in factors.items()}
        return state._replace(own=state.own._replace(thresholds=thresholds))

    def drop_heads(state: MethodState, params: PyTree) -> MethodState:
        """Algorithm 2: finds redundant heads, masks them, and sets the folds."""
        leaves = _roles.leaves_by_path(params)
        alive, folds = {}, {}
        for layer in _layers_with_heads(roles, list(leaves)):
            qkv = _split(leaves, layer, roles)
            stays, folds[layer.name] = jax.vmap(_redundant, (0, 0, None, None))(
                _by_head(qkv, roles), state.own.alive[layer.name], theta, theta_rel
            )
            alive[layer.name] = stays
        own = state.own._replace(alive=alive, fold=folds, folding=jnp.bool_(True))
        masked = _head_masks(leaves, alive, roles)
        found = [
            masks.as_bool(m) & masked.get(p, True)
            for p, m in _roles.leaves_by_path(_bools(state.masks)).items()
        ]
        return replace_masks(state, found, params)._replace(own=own)

    def draw(state: MethodState, params: PyTree) -> MethodState:
        """The final mask: exact counts of the largest weights, or those above eps."""
        leaves = _roles.leaves_by_path(params)
        parts = _parts(roles, list(leaves))
        masked = _head_masks(leaves, state.own.alive, roles)
        scores = {p: jnp.abs(leaves[p]) for part in parts for p in part}
        scores = {p: jnp.where(masked.get(p, True), x, -1) for p, x in scores.items()}
        if strengths is not None:
            kept = {p: x >= eps for p, x in scores.items()}
        else:
            cuts = _cuts(scores, parts, jnp.float32(1))
            kept = {p: _select.keep(scores[p], cut) for p, cut in cuts.items()}
        found = [
            masks.as_bool(m) & masked.get(p, True) & kept.get(p, True)
            for p, m in _roles.leaves_by_path(_bools(state.masks)).items()
        ]
        zeros = {p: jnp.zeros_like(t) for p, t in state.own.thresholds.items()}
        return replace_masks(state, found, params)._replace(
            own=state.own._replace(thresholds=zeros)
        )

    def _cuts(scores, parts, fraction):
        if allocation == "uniform":
            parts = [[p] for part in parts for p in part]
        parts = [part for part in parts if part]
        order = [p for part in parts for p in part]
        sizes = [sum(scores[p].size for p in part) for part in parts]
        kept = [
            _wide.interpolate(n, n - round_half_up(final * n), fraction) for n in sizes
        ]
        groups = [i for i, part in enumerate(parts) for _ in part]
        cuts = _select.cuts(
            [_select.scored(_same, scores[p]) for p in order], kept, groups
        )
        return dict(zip(order, cuts, strict=True))

    def project(params: PyTree, state: MethodState, old: PyTree) -> PyTree:
        del old
        leaves = _roles.leaves_by_path(params)
        own: NeuroPruneState = state.own
        moved = {
            p: penalties.soft_threshold(leaves[p], t) for p, t in own.thresholds.items()
        }
        if head_every is not None and own.alive:
            found = _layers_with_heads(roles, list(leaves))
            current = leaves | moved
            targets = [str(x.out if fold == "out" else x.mlp_in[0]) for x in found]
            moved |= lax.cond(
                own.folding,
                lambda xs: {
                    p: _fold(xs[p], own.fold[x.name], x, leaves, roles, fold)
                    for p, x in zip(targets, found, strict=True)
                },
                lambda xs: xs,
                {p: current[p] for p in targets},
            )
        return _tree.map_with_path(lambda p, x: moved.get(p, x), params)

    return Method(init, update, mask_gradients, project, masked_view)


def round_half_up(x: Fraction) -> int:
    """The nearest integer, halves upwards."""
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)


def _same(x):
    return x


def _reading(reading: penalties.Reading, eps: float) -> DegreeWeights:
    return lambda kernel: penalties.degree_weights(kernel, eps=eps, reading=reading)


def _parts(roles: Roles, paths: list[str]) -> tuple[list[str], list[str]]:
    """Paths under Eq. (1), and of Q, K, V; either may be empty."""
    degree = _roles.degree_paths(roles, paths)
    qkv = [p for layer in _roles.layers(roles, paths) for p in layer.qkv]
    if both := [p for p in qkv if p in degree]:
        raise ValueError(
            f"roles: degree matches {_tree.listing(both)}, which Eq. (2) covers as query, "
            "key and value. Take them out of degree."
        )
    return degree, qkv


def _layers_with_heads(roles: Roles, paths: list[str]) -> list[_roles.Layer]:
    return [x for x in _roles.layers(roles, paths) if x.qkv and x.out]


def _factors(leaves, parts, roles, weigh, attention) -> dict[str, Array]:
    """The weight `c` of each soft threshold, shaped to broadcast to its leaf."""
    out = {}
    found = _roles.layers(roles, list(leaves))
    qkv = {p for layer in found for p in layer.qkv}
    for path in (p for part in parts for p in part if p not in qkv):
        matrix = leaves[path]  # [stack, fan_in, units]
        layer = next((x for x in found if x.out == path and x.qkv), None)
        explicit = layer is not None and _has_explicit_heads(leaves, layer, roles)
        if explicit:  # W_O as [..., heads, head_dim, d]
            matrix = matrix.reshape(*matrix.shape[:-3], -1, matrix.shape[-1])
        floor = 0.5 / matrix.shape[-2]
        c = jnp.maximum(weigh(matrix), floor)[..., None, :]
        out[path] = c[..., None, :] if explicit else c
    for layer in (x for x in found if x.qkv):
        kernels = [leaves[p] for p in layer.qkv]
        plain = 2
        if _has_explicit_heads(leaves, layer, roles):
            plain = 3 if len(kernels) == 3 else 4
        stacked = kernels[0].ndim > plain
        rows = [x.reshape(*x.shape[: 2 if stacked else 1], -1) for x in kernels]
        ones = jnp.ones(rows[0].shape[:-1], jnp.float32)
        c = ones if attention == "l1" else penalties.sqrt_l1_slope(rows)
        c = jnp.where(jnp.isnan(c), 0, c)  # a row with NaN is left alone
        for path, kernel in zip(layer.qkv, kernels, strict=True):
            out[path] = c.reshape(*c.shape, *(1,) * (kernel.ndim - c.ndim))
    return out


def _has_explicit_heads(leaves, layer: _roles.Layer, roles: Roles) -> bool:
    """Whether heads are an axis of their own in the attention of a layer."""
    return _roles.has_head_axis(leaves[layer.qkv[0]], roles.heads or 0)


def _split(leaves, layer: _roles.Layer, roles: Roles):
    """Query, key and value as `[stack, d, heads, head_dim]`."""
    explicit = _has_explicit_heads(leaves, layer, roles)
    return _roles.split_qkv([leaves[p] for p in layer.qkv], roles, explicit=explicit)


def _by_head(qkv, roles: Roles):
    """Q, K, V as `[stack, heads, d, head_dim]`, K and V repeated for grouped queries."""
    repeat = (roles.heads or 0) // roles.groups
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in qkv)
    return q, jnp.repeat(k, repeat, axis=1), jnp.repeat(v, repeat, axis=1)


def _redundant(qkv, alive, theta, theta_rel):
    """Heads that stay, and which one stands in for which; one layer."""
    distance = _heads.head_distance(qkv)
    if theta_rel is not None:
        theta = theta_rel * jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in qkv]))
    similar = (distance <= theta) & alive[:, None] & alive[None, :]
    dominating = _heads.find_dominating(similar)
    # The rows of heads removed earlier are zero, so that folding them again is harmless.
    return alive & _heads.kept_heads(dominating), dominating


def _head_masks(leaves, alive, roles: Roles) -> dict[str, Bool[Array, "..."]]:
    """Masks of Q, K, V and W_O that remove the heads that are no longer alive."""
    out = {}
    for layer in _layers_with_heads(roles, list(leaves)):
        kernels = [leaves[p] for p in layer.qkv]
        explicit = _has_explicit_heads(leaves, layer, roles)
        stays = alive[layer.name]  # [stack, heads]
        group_stays = stays.reshape(stays.shape[0], roles.groups, -1).any(-1)
        ones = [jnp.ones_like(x, bool) for x in kernels]
        parts = _roles.split_qkv(ones, roles, explicit=explicit)
        q, k, v = (
            x & s[:, None, :, None]
            for x, s in zip(parts, (stays, group_stays, group_stays), strict=True)
        )
        joined = _roles.join_qkv((q, k, v), kernels, explicit=explicit)
        out |= dict(zip(layer.qkv, joined, strict=True))
        kernel = leaves[layer.out]
        view = _roles.split_out(
            jnp.ones_like(kernel, bool), roles.heads or 0, explicit=explicit
        )
        view = view & stays[:, :, None, None]
        out[layer.out] = _roles.join_out(view, kernel, explicit=explicit)
    return out


def _fold(kernel, dominating, layer: _roles.Layer, leaves, roles: Roles, fold: str):
    """Folds the heads of W_O, or the rows of L_in; in each layer of a stack."""
    if fold == "mlp":
        stacked = kernel if kernel.ndim == 3 else kernel[None]
        return jax.vmap(_heads.fold_into_mlp)(stacked, dominating).reshape(kernel.shape)
    explicit = _has_explicit_heads(leaves, layer, roles)
    view = _roles.split_out(kernel, roles.heads or 0, explicit=explicit)
    folded = jax.vmap(_heads.fold_heads)(view, dominating)
    return _roles.join_out(folded, kernel, explicit=explicit)


def _bools(packed: PyTree) -> PyTree:
    return masks.unpack(packed)


def _check_options(sparsity, strengths, reading, attention, eps, allocation, fold):
    if (sparsity is None) == (strengths is None):
        raise ValueError(
            f"sparsity: got {sparsity} with strengths={strengths}; expected one of the two: "
            "a target such as 0.7, or soft thresholds a step for Eq. (1) and Eq. (2)."
        )
    if strengths is not None:
        pair = strengths if isinstance(strengths, tuple | list) else ()
        if len(pair) != 2 or not all(x >= 0 for x in pair):
            raise ValueError(
                f"strengths: got {strengths}; expected two numbers of at least 0, the soft "
                "thresholds a step for Eq. (1) and Eq. (2), as in (1e-5, 1e-6)."
            )
    for name, value, allowed in (
        ("attention", attention, ("sqrt_l1", "l1")), ("fold", fold, ("out", "mlp")),
        ("allocation", allocation, ("global", "uniform")),
        ("reading", reading, get_args(penalties.Reading)),
    ):  # fmt: skip
        if value not in allowed and not (name == "reading" and callable(value)):
            raise ValueError(f"{name}: got {value!r}; expected one of {allowed}.")
    if not eps > 0:
        raise ValueError(f"eps: got {eps}; expected a size above 0, such as 1e-4.")


def _check_heads(theta, theta_rel, head_every):
    if head_every is not None and head_every < 1:
        raise ValueError(
            f"head_every: got {head_every}; expected at least 1 step, or None."
        )
    if theta_rel is not None and theta_rel < 0 or theta is not None and theta < 0:
        raise ValueError(
            f"theta, theta_rel: got {theta}, {theta_rel}; expected a distance of at least 0."
        )
    if theta is None and theta_rel is None and head_every is not None:
        raise ValueError(
            "theta: got None with head_every; expected theta or theta_rel."
        )


def _check_layers(found: list[_roles.Layer], fold: str):
    """What removing heads needs."""
    heads = [x for x in found if x.qkv and x.out]
    if not heads:
        raise ValueError(
            "head_every: no layer has both query, key and value, and out; heads cannot be "
            "removed. Give out= in the roles, or head_every=None."
        )
    if fold == "mlp" and any(not x.mlp_in for x in heads):
        layers = _tree.listing([x.name for x in heads if not x.mlp_in])
        raise ValueError(
            f"fold: 'mlp' needs mlp_in in each layer with heads; it is missing in {layers}. "
            "Give mlp_in= with wildcards that stand for the same text, or fold='out'."
        )
