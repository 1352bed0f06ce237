"""Cannistraci-Hebb training with a soft rule: CHTs and CHTss (arXiv 2501.19107)."""

import math
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from jaxprune import _prune, _wide, masks, schedules, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation, exact
from jaxprune.structures import Unstructured
from jaxprune.training import _target
from jaxprune.training._method import (
    Method,
    MethodState,
    advance,
    arrays,
    mask_gradients,
    masked_view,
    packed_masks,
    replace_each,
    start,
)
from jaxprune.training._prune_grow import KeyCarrier, above_all, check_drop


def chts(
    sparsity: float | Fraction,
    *,
    key: Key[Array, ""],
    begin: int = 0,
    end: int,
    every: int = 100,
    drop: float = 0.3,
    removal: Literal["magnitude", "relative"] = "magnitude",
    temperature: tuple[float, float] = (1.0, 9.0),
    initial: float | Fraction | None = None,
    settle: int | None = None,
    allocation: Allocation = "uniform",
) -> Method:
    """Regrows links where the network's own topology predicts them, without gradients.

    Each update removes a share of each leaf's links and grows as many there. What stays is
    drawn with probabilities proportional to `score**T`, and what grows with probabilities
    proportional to the link's CH2-L3n score (`ch2_l3n`); links just removed may grow
    again. `T` rises on a straight line, so that removal goes from explorative to almost
    exact; the share falls to 0 on half a cosine.

    With `initial` (0.5 in the paper) it is CHTss: the density falls on a sigmoid from the
    initial to the final one, and each update first prunes to it by relative importance.

    Differences from the authors' code: neurons that lost all links on one side are not
    removed on the other (percolation), since that needs to know which leaves follow one
    another; the optimizer steps on update steps too; growth is drawn as in the paper,
    where the released code for language models takes the best; the first masks are random
    with any allocation, the paper's other starting topologies are not here.

    Args:
      sparsity: share of the weights to prune, at last.
      key: draws the first masks, and at each update what stays and what grows.
      begin: step of the first update. At step 0 the weights are as they were given, so that
        those grown then keep their values, unless training begins from
        `jaxprune.sparse_params(params, state)`.
      end: step of the last one; three quarters of the run in the authors' code.
      every: steps between updates.
      drop: share of the links that an update exchanges at first; 0.3 in the paper, and
        0.1 for LLaMA.
      removal: score of a link: its magnitude, or its relative importance
        `|w| / (sum of its row) + |w| / (sum of its column)`.
      temperature: `T` at `begin` and at `end`. The authors' code goes from 1 to 9, which
        is delta from 0.5 to 0.9.
      initial: sparsity at first, for CHTss; `None` is constant sparsity, CHTs.
      settle: step at which the final sparsity is reached; `None` means `end`.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    A leaf is a matrix `[..., inputs, outputs]`; leading axes hold layers of their own, so
    that each position of a convolution kernel is one.

    Raises:
      ValueError: if a value is out of range, or a leaf has fewer than two axes.
      TypeError: if `key` is no key.

    Example:
      >>> method = jp.chts(0.9, key=jax.random.key(0), end=7500)

    References:
      Zhang et al., Brain network science modelling of sparse neural networks enables
      Transformers and LLMs to perform as fully connected, arXiv 2501.19107, section 3 and
      Algorithm 1.
    """
    check_drop(drop)
    if removal not in ("magnitude", "relative"):
        raise ValueError(
            f"removal: got {removal!r}; expected 'magnitude' or 'relative'."
        )
    _prune.require(
        "temperature",
        temperature,
        lambda x: len(x) == 2 and all(0 < t < math.inf for t in x),
        "two numbers above 0, such as (1, 9)",
    )
    exchanged = schedules.cosine(0.0, begin, end, every, drop)
    last = end if settle is None else settle
    _target.whole_step("settle", last)
    if settle is not None and initial is None:
        raise ValueError(
            f"settle: got {settle} without initial=; the sparsity is constant then. Give "
            "initial=0.5 for CHTss, or leave settle out."
        )
    if initial is not None and not begin <= last <= end:
        raise ValueError(
            f"settle: got {settle}; expected a step from begin={begin} to end={end}."
        )
    final = exact(sparsity)
    decay = schedules.sigmoid(0.0, begin, last, every)
    first = None if initial is None else exact(initial, "initial")
    if first is not None and first > final:
        raise ValueError(
            f"initial: got {initial}; expected at most sparsity={sparsity}: the density "
            "falls from the initial to the final one."
        )
    target = _target.Target(decay, first, final, Unstructured(), allocation)
    sharpness = schedules.linear(temperature[1], begin, end, every, temperature[0])
    keys = KeyCarrier(key)

    def init(params: PyTree) -> MethodState:
        for path, leaf in zip(target.plan(params).paths, arrays(params), strict=True):
            if leaf.ndim < 2:
                raise ValueError(
                    f"{path}: got shape {tuple(leaf.shape)}; chts needs a matrix of inputs "
                    f"and outputs. Leave it out with where='!{path}'."
                )
        return start(target.first(params, keys.at(-1)), params, keys.data)

    def update(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
        step = state.step
        plan, weights = target.plan(params), arrays(params)
        due = exchanged.due(step) | (decay.due(step) & (initial is not None))
        drawn = keys.at(step, state.own)

        def prune(packed):
            """To the density of this step."""
            old = packed_masks(packed)
            found = [masks.as_bool(m) for m in old]
            leaves = list(zip(map(_relative, weights, found), found, strict=True))
            pruned = _prune.decide(
                plan, target.kept(params, step), _only_active, leaves
            )
            return [masks.repack(m, like) for m, like in zip(pruned, old, strict=True)]

        def rewire(i, mask, w, links):
            del mask
            links = masks.as_bool(links)
            removing, growing = jax.random.split(jax.random.fold_in(drawn, i))
            leaf = _prune.Plan((plan.paths[i],), Unstructured(), (), (0,))
            kept = masks.count_leaf(links)
            stay = _wide.subtract(kept, _wide.share(kept, exchanged(step)))
            chances = sharpness(step) * jnp.log(
                jnp.maximum(_importance(removal, w, links), 1e-12)
            )
            chances = chances + _gumbel(removing, w)
            (left,) = _prune.decide(leaf, [stay], _only_active, [(chances, links)])
            left &= links  # NaN ranks below what is pruned: nothing may stay that was not there
            grown = _growth(left, _gumbel(growing, w))
            (found,) = _prune.decide(leaf, [kept], above_all, [(grown, left)])
            return found

        links = packed_masks(state.masks)
        if initial is not None:
            links = lax.cond(due, prune, packed_masks, state.masks)
        new = advance(grads, state, params)
        return replace_each(new, params, due, rewire, links)

    return Method(init, update, mask_gradients, None, masked_view)


def ch2_l3n(
    mask: Bool[Array, "*stack inputs outputs"],
) -> Float[Array, "*stack inputs outputs"]:
    """How many short paths speak for a link that is missing: CH2-L3n.

    Sums over the paths of three links from an input to an output. A path counts by the
    first node between: its links within the local community, plus 1, over its links
    outside, plus 1; and again by the second.

    Args:
      mask: the links of a layer; leading axes hold layers of their own.

    On a mesh the masks, and the products made of them, are gathered on every device.

    Returns:
      Scores, float32; 0 for links that are there, or that no path speaks for.

    Example:
      >>> mask = jnp.array([[1, 1, 0], [1, 0, 1]], bool)
      >>> jp.training.ch2_l3n(mask).tolist()
      [[0.0, 0.0, 4.0], [0.0, 4.0, 0.0]]

    References:
      Zhang et al., arXiv 2501.19107, Eq. (3) and Algorithm 1; as in the authors' code.
    """
    sharding = jax.typeof(mask).sharding
    explicit = any(s is not None for s in getattr(sharding, "spec", ()))
    links = mask.astype(jnp.float32)
    if explicit:
        whole = jax.P(*(None,) * mask.ndim)
        links = jax.sharding.reshard(links, jax.NamedSharding(sharding.mesh, whole))
    inner, outer = (_weights_of_pairs(x) for x in (links, jnp.swapaxes(links, -1, -2)))
    paths = inner @ links + links @ jnp.swapaxes(outer, -1, -2)
    if explicit:
        paths = jax.sharding.reshard(paths, sharding)
    return jnp.where(mask, 0, paths)


def _weights_of_pairs(links: Array) -> Array:
    """For each pair of nodes of one side: how much a path through the second counts."""
    # Products of 0 and 1 are exact whatever the precision; sums are in float32.
    common = jnp.matmul(links, jnp.swapaxes(links, -1, -2))
    degree = jnp.sum(links, -1)[..., None, :]  # of the second node
    outside = jnp.maximum(degree - common, 1) - 1
    return jnp.where(common > 0, (common + 1) / (outside + 1), 0)


def _growth(mask: Bool[Array, "..."], noise: Array) -> Array:
    """Logarithms of the probabilities of growth, with Gumbel noise."""
    scores = ch2_l3n(mask)
    # Links that no path speaks for get a small chance, lest there be too few.
    scores = scores + jnp.where(jnp.min(scores, where=~mask, initial=1) > 0, 0, 1e-5)
    return jnp.log(scores) + noise


def _importance(removal: str, w: Array, mask: Bool[Array, "..."]) -> Array:
    return _magnitude(w) if removal == "magnitude" else _relative(w, mask)


def _relative(w: Array, mask: Bool[Array, "..."]) -> Array:
    # A weight that is not finite spoils no sums but its own chance.
    sizes = jnp.where(mask & jnp.isfinite(w), _magnitude(w), 0)
    rows, columns = (jnp.sum(sizes, a, keepdims=True) + 1e-5 for a in (-1, -2))
    return sizes / rows + sizes / columns


def _magnitude(w: Array) -> Array:
    return jnp.abs(w).astype(jnp.promote_types(w.dtype, jnp.float32))


def _gumbel(key: Key[Array, ""], w: Array) -> Array:
    uniform = jnp.maximum(scores.random(w, key=key), 1e-9)
    return -jnp.log(-jnp.log(uniform))


def _only_active(scores: Array, mask: Bool[Array, "..."]) -> Array:
    return jnp.where(mask, scores, -jnp.inf)
