"""What a sparse training method is: five pure functions, and the state they share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxprune import _select, _tree, _wide, masks
from jaxprune._tree import PyTree
from jaxprune._wide import Wide


class Info(NamedTuple):
    """What the last mask update did. A `Wide` is an exact count; `int(...)` reads it.

    Attributes:
      changed: whether the last step updated the masks.
      kept: weights kept, for each masked leaf in the order of the tree.
      flipped: weights whose mask the last update changed (churn).
      nonfinite: NaN and infinite weights among the masked leaves at the last update. An
        update cannot mend such a weight, whatever its mask: NaN stays NaN, and a pruned
        infinity becomes NaN.
    """

    changed: Bool[Array, ""]
    kept: tuple[Wide, ...]
    flipped: Wide
    nonfinite: Wide


class MethodState(NamedTuple):
    """State of a method.

    Attributes:
      step: updates so far, int32.
      masks: packed masks; `None` for leaves that are never pruned.
      info: see `Info`.
      own: whatever else the method keeps.
    """

    step: Int[Array, ""]
    masks: PyTree
    info: Info
    own: PyTree


class Method(NamedTuple):
    """A sparse training method, for `jaxprune.masked`.

    In the trees that these functions get, leaves that are not to be pruned are `None`.

    Attributes:
      init: `(params) -> state`.
      update: `(grads, state, params) -> state`; decides masks, from the weights before the
        step, and says in `state.info.changed` whether it did. If `dense`, from the
        weights after the step, so that the next forward pass sees the masks of its own
        weights: what happens at a step of its schedule is seen by the pass after it.
      gradients: `(grads, state, params) -> grads`, what the inner optimizer sees.
      project: `(new, state, old) -> params`, applied after the inner step, which led from
        `old` to `new`, and before the mask; `None` where there is nothing but the mask.
      view: `(params, state) -> params`, what the forward pass must see. It is kept in the
        state, so make it a function of a module, not a closure.
      dense: whether pruned weights live on behind the mask and are 0 only in the view.
        Otherwise they are 0 themselves, and the view changes nothing.
      where: paths of the leaves that the method prunes, where it knows them; otherwise
        `masked` chooses.
    """

    init: Callable[[PyTree], MethodState]
    update: Callable[[PyTree, MethodState, PyTree], MethodState]
    gradients: Callable[[PyTree, MethodState, PyTree], PyTree]
    project: Callable[[PyTree, MethodState, PyTree], PyTree] | None
    view: Callable[[PyTree, MethodState], PyTree]
    dense: bool = False
    where: tuple[str, ...] | None = None


def mask_gradients(grads: PyTree, state: MethodState, params: PyTree) -> PyTree:
    """Gradients of pruned weights are 0, so that their moments stay as they began."""
    del params
    return _tree.map_leaves(_only_kept, grads, state.masks)


def all_gradients(grads: PyTree, state: MethodState, params: PyTree) -> PyTree:
    """Gradients as they come."""
    del state, params
    return grads


def masked_view(params: PyTree, state: MethodState) -> PyTree:
    """Masked weights in the forward pass; gradients go to all of them as they are.

    So a method sees what a pruned weight would do, and decides itself who learns.
    """
    return _tree.map_leaves(
        lambda w, m: straight_through(w, jnp.where(masks.as_bool(m), w, 0)),
        params,
        state.masks,
    )


@jax.custom_jvp
def straight_through(w: Array, seen: Array) -> Array:
    """`seen`, whose derivative is taken to be that of `w`."""
    del w
    return seen


@straight_through.defjvp
def _pass_on(primals, tangents):
    return straight_through(*primals), tangents[0]


def either(
    test: Bool[Array, ""],
    f: Callable[..., PyTree],
    g: Callable[..., PyTree],
    weights: PyTree,
    *fixed: PyTree,
) -> PyTree:
    """`f(weights, *fixed)` if `test` holds, else `g`; derivatives are those by `weights`.

    What a derivative needs is made again from the weights, not stored, and behind a
    branch, so that it is there for these weights only. For reverse mode. Traced arrays go
    through `fixed`, not into closures: the derivative may be taken outside of the `jit`,
    `scan` or `vmap` in which they live.
    """

    @jax.custom_vjp
    def chosen(test, weights, *fixed):
        return lax.cond(test, f, g, weights, *fixed)

    def forward(test, weights, *fixed):
        # Not `chosen`: the derivative of this derivative may be taken in forward mode.
        return lax.cond(test, f, g, weights, *fixed), (test, weights, fixed)

    def backward(residuals, cotangent):
        test, weights, fixed = residuals

        def transposed(h):
            def run(weights, cotangent, *fixed):
                return jax.vjp(lambda w: h(w, *fixed), weights)[1](cotangent)[0]

            return run

        branches = transposed(f), transposed(g)
        by_weights = lax.cond(test, *branches, weights, cotangent, *fixed)
        return None, by_weights, *(None for _ in fixed)

    chosen.defvjp(forward, backward)
    return chosen(test, weights, *fixed)


def softly(w: Array, soft: Array) -> Array:
    """`w` times a soft mask. What is not finite stays, and sends the mask no derivative."""
    return jnp.where(jnp.isfinite(w), finite(w) * soft, w).astype(w.dtype)


def finite(w: Array) -> Array:
    """`w`, with 0 for what is not finite, where it would reach other weights."""
    return jnp.where(jnp.isfinite(w), w, 0)


def _only_kept(g: Array, mask: masks.PackedMask) -> Array:
    return jnp.where(masks.as_bool(mask), g, jnp.zeros_like(g))


def advance(grads: PyTree, state: MethodState, params: PyTree) -> MethodState:
    """One more step, the masks as they were."""
    del grads, params
    info = state.info._replace(changed=jnp.bool_(False))
    return state._replace(step=optax.safe_increment(state.step), info=info)


def start(found: PyTree, params: PyTree, own: PyTree = ()) -> MethodState:
    """The state at step 0 with the masks `found`, packed or not."""
    packed = masks.pack(found)
    info = Info(
        jnp.bool_(False), kept_counts(packed), _wide.from_int(0), nonfinite(params)
    )
    return MethodState(jnp.int32(0), packed, info, own)


def replace_masks(
    state: MethodState, found: Sequence[Bool[Array, "..."]], params: PyTree
) -> MethodState:
    """The state with new masks, one for each masked leaf in order, and their counts."""
    old, treedef = jax.tree.flatten(state.masks, is_leaf=_is_packed)
    leaves = map(_replaced, old, found, arrays(params))
    return _joined(state, treedef, jnp.bool_(True), leaves)


def replace_each(
    state: MethodState,
    params: PyTree,
    due: Bool[Array, ""],
    decide: Callable[..., Bool[Array, "..."]],
    *operands: Sequence[PyTree],
) -> MethodState:
    """As `replace_masks` where an update is `due`, with a branch for each leaf.

    So what a decision needs besides is held for one leaf at a time.

    Args:
      state: with the old masks.
      params: the weights.
      due: whether masks are replaced.
      decide: `(i, old mask, weights, *operands) -> mask` for leaf `i`, booleans.
      *operands: for each masked leaf in order.
    """
    old, treedef = jax.tree.flatten(state.masks, is_leaf=_is_packed)

    def leaf(i, kept, *xs):
        def replaced(mask, w, *rest):
            return _replaced(mask, decide(i, masks.as_bool(mask), w, *rest), w)

        def left(mask, *_):
            return _Leaf(mask, kept, _wide.from_int(0), _wide.from_int(0))

        return lax.cond(due, replaced, left, *xs)

    columns = (state.info.kept, old, arrays(params), *operands)
    leaves = [leaf(i, *xs) for i, xs in enumerate(zip(*columns, strict=True))]
    return _joined(state, treedef, due, leaves)


class _Leaf(NamedTuple):
    """A mask, and what `Info` says of it."""

    mask: masks.PackedMask
    kept: Wide
    flipped: Wide
    nonfinite: Wide


def _replaced(old: masks.PackedMask, mask: Bool[Array, "..."], w: Array) -> _Leaf:
    new = masks.repack(mask, old)
    flips = new.bits ^ old.bits
    flipped = masks.count_leaf(flips) if old.axis is None else _wide.popcount(flips)
    return _Leaf(new, masks.count_leaf(new), flipped, _nonfinite(w))


def _joined(
    state: MethodState, treedef: Any, changed: Bool[Array, ""], leaves: Iterable[_Leaf]
) -> MethodState:
    found, kept, flipped, nonfinite = zip(*leaves, strict=True)
    info = Info(
        changed,
        kept,
        _wide.where(changed, _sum(flipped), state.info.flipped),
        _wide.where(changed, _sum(nonfinite), state.info.nonfinite),
    )
    return state._replace(masks=treedef.unflatten(found), info=info)


def packed_masks(packed: PyTree) -> list[masks.PackedMask]:
    """The leaves of a tree of packed masks."""
    return jax.tree.leaves(packed, is_leaf=_is_packed)


def kept_counts(packed: PyTree) -> tuple[Wide, ...]:
    """Weights kept in each leaf of a tree of packed masks."""
    return tuple(map(masks.count_leaf, packed_masks(packed)))


def nonfinite(params: PyTree) -> Wide:
    """Number of NaN and infinite weights."""
    return _sum(_nonfinite(x) for x in jax.tree.leaves(params) if _tree.is_float(x))


def arrays(tree: PyTree) -> list[Any]:
    """The leaves of `tree` that are no holes."""
    return [x for x in _tree.flatten(tree)[1] if not _tree.is_hole(x)]


def all_kept(params: PyTree) -> list[Bool[Array, "..."]]:
    """Masks that prune nothing, in the order of the leaves."""
    return [jnp.ones_like(x, bool) for x in arrays(params)]


def _nonfinite(w: Array) -> Wide:
    return _select.count(w, lambda x: ~jnp.isfinite(x))


def _sum(counts) -> Wide:
    total = _wide.from_int(0)
    for count in counts:
        total = _wide.add(total, count)
    return total


def _is_packed(x: Any) -> bool:
    return isinstance(x, masks.PackedMask)
