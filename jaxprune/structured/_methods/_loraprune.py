"""LoRAPrune: groups masked step by step while factors of low rank are trained."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxprune import _groups, _lora, _tree, masks
from jaxprune._groups import Groups
from jaxprune._lora import LoRA
from jaxprune._tree import PyTree
from jaxprune.scores import lora_taylor
from jaxprune.structured._methods._lora import check_shape, lora_merge

_TINY = 1e-8


class LoRAPruneState(NamedTuple):
    """What LoRAPrune knows of units.

    Attributes:
      step: how many updates there were.
      scores: moving averages, float32 [units], by name of the group.
      kept: which units are left, [units], by name; for `planned`.
    """

    step: Int[Array, ""]
    scores: dict[str, Float[Array, "units"]]
    kept: dict[str, Bool[Array, "units"]]


class LoRAPrune(NamedTuple):
    """The functions of `loraprune`; all are pure and run under `jit`.

    Attributes:
      init: `init()` gives the state, with all units kept.
      update: `update(state, params, factors, gradients)` gives the next state; `gradients`
        are those of the loss by the factors.
      view: `view(state, params, factors)` gives the parameters for the loss: the weights
        with the factors in them, 0 where a unit is gone.
    """

    init: Callable[[], LoRAPruneState]
    update: Callable[..., LoRAPruneState]
    view: Callable[..., PyTree]


def loraprune(
    groups: Groups,
    sparsity: Callable[[Array], Array],
    *,
    decay: float = 0.9,
) -> LoRAPrune:
    """Prunes coupled units of frozen weights while their adapters are trained.

    At each step the weights of a unit are scored by the gradients of the adapters
    (`jaxprune.scores.lora_taylor`), and summed in each leaf; the sums of a leaf are divided
    by their l2 norm, and added up over the leaves of the group that have adapters. A
    moving average of this decides: of each group the share `sparsity(step)` with the
    lowest ones is masked in the forward pass. What is gone does not come back.

    Read for this: the authors' code (loraprune/utils.py, trainer.py, lora.py). There the
    groups are heads and neurons of all layers but the first tenth and the last, each with
    the same share; the cubic schedule runs over the middle 80 % of training, and masks
    follow it every 10 steps. Differences: their last update of masks comes before the
    schedule ends, so that a little less than the final share is gone, here it is met;
    counts are rounded, there cut off; one unit of a group always stays, or as many as the
    model needs.

    Args:
      groups: `graph.as_groups(kinds=("head", "neuron"))`, say; leave layers whole with
        `ignore=`.
      sparsity: share of each group that is gone, of the number of the step, such as
        `jaxprune.schedules.cubic(0.5, begin=100, end=900, every=10)`.
      decay: of the moving average.

    Returns:
      Functions `init`, `update`, `view`. In the end, `planned(graph, state.kept)` is the
      plan, which shrinks `lora_merge(params, factors)`.

    Raises:
      ValueError: if `decay` is out of range; in `update`, if a group has no adapter.
      TypeError: if `groups` are no `Groups`, or `sparsity` is no function.

    Example:
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["up"]) @ params["down"]
      >>> params, x = {"up": jnp.ones((2, 8)), "down": jnp.ones((8, 3))}, jnp.ones((5, 2))
      >>> graph = jp.structured.trace(fn, params, x)
      >>> factors = jp.structured.lora_init(fn, params, x, key=jax.random.key(0))
      >>> method = jp.structured.loraprune(graph.as_groups(), jp.schedules.constant(0.25))
      >>> state = method.init()
      >>> gradients = jax.grad(lambda f: fn(method.view(state, params, f), x).sum())(factors)
      >>> state = method.update(state, params, factors, gradients)
      >>> plan = jp.structured.planned(graph, state.kept)
      >>> plan.shrink(jp.structured.lora_merge(params, factors))["up"].shape
      (2, 6)

    References:
      Zhang et al., LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient
      Fine-Tuning, arXiv 2305.18403; github.com/aim-uofa/LoRAPrune.
    """
    _check(groups, sparsity, decay)

    def init() -> LoRAPruneState:
        sizes = groups.sizes.items()
        return LoRAPruneState(
            step=jnp.int32(0),
            scores={name: jnp.zeros(n, jnp.float32) for name, n in sizes},
            kept={name: jnp.ones(n, bool) for name, n in sizes},
        )

    def update(
        state: LoRAPruneState,
        params: PyTree,
        factors: Mapping[str, LoRA],
        gradients: Mapping[str, LoRA],
    ) -> LoRAPruneState:
        new = _scores(groups, params, factors, gradients)
        finite = jnp.all(jnp.array([jnp.isfinite(x).all() for x in new.values()]))
        scores = {
            name: jnp.where(finite, decay * old + (1 - decay) * new[name], old)
            for name, old in state.scores.items()
        }
        share = sparsity(state.step)
        kept = {
            g.name: _kept(scores[g.name], state.kept[g.name], share, g.minimum)
            for g in groups.groups
        }
        return LoRAPruneState(state.step + 1, scores, kept)

    def view(
        state: LoRAPruneState, params: PyTree, factors: Mapping[str, LoRA]
    ) -> PyTree:
        merged = lora_merge(params, factors)
        return masks.apply(merged, groups.masks(merged, state.kept))

    return LoRAPrune(init, update, view)


def _scores(
    groups: Groups,
    params: PyTree,
    factors: Mapping[str, LoRA],
    gradients: Mapping[str, LoRA],
) -> dict[str, Float[Array, "units"]]:
    """Of this step: sums over the leaves of a group, each of them of norm 1."""
    weights = dict(zip(*_tree.flatten(params)[:2], strict=True))
    used = [p for p in groups.paths if p in factors]
    by_weight = {p: _by_weight(p, weights, factors[p], gradients[p]) for p in used}
    found = {}
    for g in groups.groups:
        sums = [
            _groups.sum_along(by_weight[m.path], m, g.size)
            for m in g.members
            if m.path in by_weight
        ]
        if not sums:
            raise ValueError(
                f"groups: {g.name} has no leaf with an adapter, so that its units have no "
                f"scores. Its leaves are: {_tree.listing([m.path for m in g.members])}; "
                f"adapters are there for: {_tree.listing(list(factors))}. Leave the group "
                "out, as with kinds= of as_groups, or give one of these leaves an adapter."
            )
        found[g.name] = sum(x / (jnp.linalg.norm(x) + _TINY) for x in sums)
    return found


def _by_weight(
    path: str, weights: Mapping[str, Any], part: LoRA, slopes: LoRA
) -> Array:
    """Scores of the shape of the leaf."""
    check_shape(path, part, weights[path])
    matrices = _lora.to_matrices(weights[path], part.axes)
    scores = lora_taylor(
        matrices,
        part.a,
        part.b,
        gradients=(slopes.a, slopes.b),
        scale=part.scale or 1.0,
    )
    return _lora.from_matrices(scores, part.axes, weights[path].shape)


def _kept(scores: Array, kept: Array, share: Array, minimum: int) -> Array:
    """The best units, of those that are left; ties go to the lower number."""
    left = jnp.maximum(jnp.round(scores.size * (1 - share)), max(minimum, 1))
    order = jnp.argsort(jnp.where(kept, -scores, jnp.inf), stable=True)
    place = jnp.argsort(order)  # of each unit, the best first
    return kept & (place < left)


def _check(groups: Any, sparsity: Any, decay: float) -> None:
    if not isinstance(groups, Groups):
        raise TypeError(
            f"groups: got a {type(groups).__name__}; expected jaxprune.Groups. Take "
            "graph.as_groups(kinds=('head', 'neuron'))."
        )
    if not callable(sparsity):
        raise TypeError(
            f"sparsity: got {sparsity!r}; expected a function of the step, such as "
            "jaxprune.schedules.cubic(0.5, begin=100, end=900, every=10)."
        )
    if not 0 <= decay < 1:
        raise ValueError(f"decay: got {decay!r}; expected a number in [0, 1).")
