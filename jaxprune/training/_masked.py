"""`masked`: any optax optimizer, any sparse training method, and exact zeros."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxprune import _tree, masks
from jaxprune._tree import PyTree
from jaxprune._wide import Wide
from jaxprune.training._method import (
    Info,
    Method,
    MethodState,
    advance,
    mask_gradients,
    masked_view,
    start,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedState:
    """State of `masked`: the inner optimizer's, the method's, and the forward view."""

    inner: PyTree
    method: MethodState
    view: Callable[[PyTree, MethodState], PyTree] = dataclasses.field(
        metadata={"static": True}
    )


def masked(
    inner: optax.GradientTransformation,
    method_or_masks: Method | PyTree,
    *,
    where: _tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains with `inner` while a method, or fixed masks, keep weights at zero.

    After `optax.apply_updates` every pruned, finite weight is exactly 0; there is no
    second call to remember. The exception are methods that keep dense weights behind the
    mask (`ste`, `sr_ste`, `mdgf`, `sdgf`, `top_kast`, `pdp`, `soft_top_k`): their weights
    are 0 in `sparse_params` only, which the loss must see.

    Moments of weights whose mask changes go back to what `inner.init` gave them, and
    copies of the weights inside `inner` (schedule-free's z, prodigy's start) follow the
    mask. They are found in the optimizer state by path and shape; what has neither, such
    as adafactor's factored moments, is left alone. A step count that all weights share
    goes on: late in a run, the bias correction of adam no longer holds new second moments
    up, and the first steps of a weight that has just grown are several times as long as
    those of the others.

    Args:
      inner: the optimizer. It receives all extra arguments.
      method_or_masks: a method such as `jaxprune.gmp(...)`, or masks that stay fixed
        (fine-tuning).
      where: which leaves the method may prune; see `jaxprune.prune`. Not with masks, nor
        with methods for coupled groups, which say it themselves.

    Returns:
      A transformation that needs `params` in `update`. Put it last in a `chain`; it may
      itself stand in `partition`, `MultiSteps` or `inject_hyperparams`. Methods that move
      weights themselves (`dhspg`, `hesso`, `hesso_cric`, `iss_p`, `neuroprune`,
      `soft_top_k`, `sora`, `top_kast`, `training.task`) give float32 updates for weights of two
      bytes, so that these land where they should; there `apply_if_finite` goes around
      `inner`.

    Raises:
      ValueError: if the masks do not fit the parameters, or `where` selects nothing.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]])}
      >>> params, masks = jp.prune(params, sparsity=0.5)
      >>> tx = jp.masked(optax.adamw(0.1), masks)
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> (params["kernel"] != 0).tolist()
      [[True, False], [False, True]]
    """
    if isinstance(inner, Method) or not hasattr(inner, "update"):
        raise TypeError(
            f"inner: got {_briefly(inner)}; expected an optax optimizer, as in "
            "jaxprune.masked(optax.adamw(3e-4), jaxprune.gmp(0.9, end=800))."
        )
    if isinstance(method_or_masks, optax.GradientTransformation):
        raise TypeError(
            "method_or_masks: got an optax optimizer; expected a method or masks. The "
            "optimizer comes first: jaxprune.masked(optimizer, method)."
        )
    inner = optax.with_extra_args_support(inner)
    if isinstance(method_or_masks, Method):
        method, fixed = method_or_masks, None
        if method.where is not None and where is not None:
            raise ValueError(
                "where: the groups of the method already say which leaves are pruned. "
                "Leave where= out, and leaves out of the groups."
            )
        where = where if method.where is None else method.where
    else:
        if inspect.isroutine(method_or_masks) or isinstance(
            method_or_masks, float | int
        ):
            raise TypeError(
                f"method_or_masks: got {method_or_masks!r}; expected a method, as "
                "jaxprune.gmp(0.9, end=800) makes one, or a tree of masks."
            )
        if where is not None:
            raise ValueError(
                "where: fixed masks already say which leaves are pruned (None = never). "
                "Leave where= out, or pass a method instead of masks."
            )
        fixed = method_or_masks
        method = _frozen(fixed)

    def init(params: PyTree) -> MaskedState:
        if fixed is None:
            chosen = _tree.select(params, where)
        else:
            chosen = _only_masked(params, masks.check(params, fixed))
            if not jax.tree.leaves(chosen):
                raise ValueError(
                    "masks: every leaf is None, so that nothing would be masked. Make them "
                    "with jaxprune.prune or jaxprune.masks.from_params."
                )
        # `nnx.Optimizer` wraps every leaf of a state anew, and takes it that the leaves
        # under a variable are arrays; packed masks are not.
        state = method.init(_tree.bare(chosen))
        # Copies that the optimizer takes of the weights must obey the mask from the start.
        seen = params if method.dense else masks.apply(params, state.masks)
        return MaskedState(inner.init(seen), state, method.view)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "params: got None; masked needs the parameters. Call "
                "tx.update(grads, opt_state, params)."
            )
        step = step_dense if method.dense else step_masked
        return step(updates, state, params, extra)

    def step_masked(updates, state, params, extra):
        updates, old, params = _after(updates, state.method.masks, params)
        state = dataclasses.replace(state, method=state.method._replace(masks=old))
        chosen, grads = _only_masked(params, old), _only_masked(updates, old)
        method_state = method.update(grads, state.method, chosen)
        grads = _merge(updates, method.gradients(grads, method_state, chosen))
        inner_state = lax.cond(
            method_state.info.changed,
            lambda s: _reset(s, inner.init, params, old, method_state.masks),
            lambda s: s,
            state.inner,
        )
        # Weights just pruned are gone for the optimizer too: weight decay, or a copy of
        # the weights such as schedule-free's z, would otherwise bring them back.
        seen = masks.apply(params, method_state.masks)
        updates, inner_state = inner.update(grads, inner_state, seen, **extra)
        updates = _emit(updates, params, method, method_state)
        return updates, MaskedState(inner_state, method_state, method.view)

    def step_dense(updates, state, params, extra):
        old = state.method
        chosen, grads = (_only_masked(x, old.masks) for x in (params, updates))
        seen = _merge(updates, method.gradients(grads, old, chosen))
        updates, inner_state = inner.update(seen, state.inner, params, **extra)
        updates = _emit(updates, params, method, old)
        moved = _moved(chosen, _only_masked(updates, old.masks))
        new = method.update(grads, old, moved)
        return updates, MaskedState(inner_state, new, method.view)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def get_masks(opt_state: PyTree) -> PyTree:
    """The boolean masks, wherever in `opt_state` the state of `masked` stands.

    While masks are soft (`pdp`, `soft_top_k`) or pruned weights fade (`mdgf`), these are
    the weights that would be kept now; `sparse_params` is what the forward pass sees.

    Works on chains, `partition` (the masks of its parts are joined), `MultiSteps`,
    `TrainState` and `nnx.Optimizer`.

    Raises:
      ValueError: if there is no such state.
    """
    found = [masks.unpack(s.method.masks) for s in _states(opt_state)]
    return jax.tree.map(
        lambda m: None if _tree.is_hole(m) else m,
        functools.reduce(_join, found), is_leaf=_tree.is_hole,
    )  # fmt: skip


def get_info(opt_state: PyTree) -> dict[str, Any]:
    """What the method did, on the host; see `Info`.

    Returns:
      `step`; `changed`, whether the last step updated masks; `density` of the masked
      leaves; `flipped` (weights), `churn` (the same as a share); `kept`, by leaf path;
      `nonfinite` weights at the last update. Counts are Python integers and exact.

    Raises:
      ValueError: if there is no state of `masked` in `opt_state`, or several that
        `jax.vmap` has stacked.
    """
    kept: dict[str, int] = {}
    total = flipped = nonfinite = step = 0
    changed = False
    for state in _states(opt_state):
        if jnp.ndim(state.method.step):
            raise ValueError(
                f"opt_state: holds {state.method.step.size} states stacked to one, as by "
                "jax.vmap; expected one. Pick it out, as with "
                "jax.tree.map(lambda x: x[0], opt_state)."
            )
        paths, leaves, _ = _tree.flatten(
            jax.tree.map(
                lambda m: _Shape(m.shape), state.method.masks, is_leaf=_is_packed
            )
        )
        shapes = [(p, x.shape) for p, x in zip(paths, leaves, strict=True)
                  if isinstance(x, _Shape)]  # fmt: skip
        info: Info = state.method.info
        counts = [int(Wide(*c)) for c in info.kept]
        kept |= {p: n for (p, _), n in zip(shapes, counts, strict=True)}
        total += sum(math.prod(s) for _, s in shapes)
        flipped += int(Wide(*info.flipped))
        nonfinite += int(Wide(*info.nonfinite))
        step, changed = max(step, int(state.method.step)), changed or bool(info.changed)
    return {
        "step": step,
        "changed": changed,
        "density": sum(kept.values()) / total if total else 1.0,
        "flipped": flipped,
        "churn": flipped / total if total else 0.0,
        "kept": kept,
        "nonfinite": nonfinite,
    }


def sparse_params(params: PyTree, opt_state: PyTree) -> PyTree:
    """What the forward pass must see: pruned weights are 0 in it.

    Most methods keep the parameters themselves sparse; methods with dense weights behind
    the mask need this in the loss. Gradients pass through it as the method says.

    Raises:
      ValueError: if there is no state of `masked` in `opt_state`.
    """
    for state in _states(opt_state):
        found = masks.check(params, state.method.masks)
        own = state.method._replace(masks=found)
        params = _merge(params, state.view(_only_masked(params, found), own))
    return params


def _briefly(x: Any) -> str:
    if isinstance(x, Method):
        return "a method"
    return getattr(x, "__name__", None) or f"a {type(x).__name__}"


def _join(a: PyTree, b: PyTree) -> PyTree:
    """One tree of two of which each may have a hole where the other has a subtree."""
    if _tree.is_hole(a) or _tree.is_hole(b):
        return b if _tree.is_hole(a) else a
    children, treedef = jax.tree.flatten(a, is_leaf=lambda x: x is not a)
    if jax.tree_util.treedef_is_leaf(treedef):
        return a
    return treedef.unflatten(map(_join, children, treedef.flatten_up_to(b)))


def _frozen(found: PyTree) -> Method:
    def init(params: PyTree) -> MethodState:
        packed = masks.pack(masks.check(params, found))
        own = jax.tree.map(jnp.copy, packed)  # a state may be donated, `found` may not
        return start(_tree.map_leaves(lambda _, m: m, params, own), params)

    return Method(init, advance, mask_gradients, None, masked_view)


def _emit(
    updates: PyTree, params: PyTree, method: Method, state: MethodState
) -> PyTree:
    """Updates that land on the projected and masked weights, exactly on 0 where pruned."""

    def plain(mask, u, p):
        return u if mask is None else jnp.where(masks.as_bool(mask), u, -p)

    if method.project is None:
        return (
            updates if method.dense else _map_masks(plain, state.masks, updates, params)
        )

    old = _only_masked(params, state.masks)
    moved = _moved(old, _only_masked(updates, state.masks))
    target = method.project(moved, state, old)

    def projected(mask, u, p, new, aim):
        if mask is None:
            return u
        wide = jnp.promote_types(jnp.promote_types(u.dtype, p.dtype), jnp.float32)
        if not method.dense:
            aim = jnp.where(masks.as_bool(mask), aim, jnp.zeros_like(aim))
        step = jnp.where(aim == 0, -p.astype(wide), aim.astype(wide) - p.astype(wide))
        return jnp.where(aim == new, u.astype(wide), step)

    return _map_masks(projected, state.masks, updates, params, moved, target)


def _after(
    updates: PyTree, found: PyTree, params: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """The same trees; of each leaf nothing is there before its gradient.

    XLA would otherwise unpack masks, decide new ones and copy weights to another layout
    before the backward pass, while activations fill the memory.
    """
    _, leaves, treedef = _tree.flatten(updates)
    holed, mask_tree = jax.tree.flatten(found, is_leaf=_is_leaf)
    _, weights, weight_tree = _tree.flatten(params)
    columns = zip(leaves, holed, weights, strict=True)
    grads, holed, weights = zip(
        *(
            xs if any(map(_tree.is_hole, xs)) else lax.optimization_barrier(xs)
            for xs in columns
        ),
        strict=True,
    )
    return (
        treedef.unflatten(grads),
        mask_tree.unflatten(holed),
        weight_tree.unflatten(weights),
    )


def _moved(params: PyTree, updates: PyTree) -> PyTree:
    """What `optax.apply_updates` will give."""
    return _tree.map_leaves(lambda p, u: (p + u).astype(p.dtype), params, updates)


def _reset(state: PyTree, init, params: PyTree, old: PyTree, new: PyTree) -> PyTree:
    """Puts the moments of flipped weights back to what `init` gives them.

    Copies of the weights get the masked weights, by the same rule: `init` copies those.
    """
    fresh = init(masks.apply(params, new))
    flips = {
        tuple(map(str, path)): (
            None if _tree.is_hole(a) else masks.as_bool(a) ^ masks.as_bool(b)
        )
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(old, is_leaf=_is_leaf),
            _leaves(new),
            strict=True,
        )
    }

    def renew(path, x, x0):
        names = tuple(map(str, path))
        # The longest end of the path that is a parameter's.
        ends = (names[i:] for i in range(len(names) + 1))
        flip = next((flips[end] for end in ends if end in flips), None)
        if flip is None or getattr(x, "shape", None) != flip.shape:
            return x
        return jnp.where(flip, x0.astype(x.dtype), x)

    # NNX variables are no part of the paths of masks.
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(_tree.bare(state))]
    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(map(renew, paths, leaves, jax.tree.leaves(fresh)))


def _map_masks(f, found: PyTree, tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `f(mask, x, ...)` over the leaves of `tree`; holes of `tree` stay."""
    _, leaves, treedef = _tree.flatten(tree)
    columns = map(_leaves, (found, *rest))
    return treedef.unflatten(
        [
            x if _tree.is_hole(x) else f(None if _tree.is_hole(m) else m, x, *xs)
            for x, m, *xs in zip(leaves, *columns, strict=True)
        ]
    )


def _only_masked(tree: PyTree, found: PyTree) -> PyTree:
    """The leaves of `tree` that have a mask, in the containers of `found`."""
    holed, treedef = jax.tree.flatten(found, is_leaf=_is_leaf)
    return treedef.unflatten(
        [
            m if _tree.is_hole(m) else x
            for m, x in zip(holed, _leaves(tree), strict=True)
        ]
    )


def _merge(tree: PyTree, chosen: PyTree) -> PyTree:
    """`tree` with the leaves of `chosen` that are no holes in place of its own."""
    _, leaves, treedef = _tree.flatten(tree)
    return treedef.unflatten(
        [
            x if _tree.is_hole(y) else y
            for x, y in zip(leaves, _leaves(chosen), strict=True)
        ]
    )


def _leaves(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_leaf)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A leaf that stands for a mask and is no tree itself."""

    shape: tuple[int, ...]


def _states(opt_state: PyTree) -> list[MaskedState]:
    found = [
        s
        for s in jax.tree.leaves(_tree.bare(opt_state), is_leaf=_is_state)
        if _is_state(s)
    ]
    if not found:
        raise ValueError(
            "opt_state: holds no state of jaxprune.masked. Pass what tx.init or tx.update "
            "returned for tx = jaxprune.masked(...), or an object that contains it."
        )
    return found


def _is_state(x: Any) -> bool:
    return isinstance(x, MaskedState)


def _is_packed(x: Any) -> bool:
    return isinstance(x, masks.PackedMask)


def _is_leaf(x: Any) -> bool:
    return _tree.is_hole(x) or _is_packed(x)
