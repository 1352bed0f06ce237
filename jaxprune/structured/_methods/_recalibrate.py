"""Statistics of batch norms, estimated anew for a model that was changed."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _tree
from jaxprune._tree import PyTree
from jaxprune.structured._methods._biases import replaced

_LEAST = 1e-4  # of a new value in a running average
_AWAY = 0.737  # from what a leaf is, which may be what it comes to


def recalibrate(
    fn: Callable[..., PyTree], params: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Parameters with statistics of batch norms over all batches, without a momentum.

    `fn` runs the model as in training, and gives the statistics after one batch. How much
    of the old ones is in them is found by asking twice, so that the batch's own are known.
    Of these, each batch counting alike, means are averaged; to averaged variances that of
    the means is added: `E[var] + Var[mean]`, the variance of all values together, where
    batches are of one size.

    As in training, norms behind others see values that were normalized batch by batch.
    Larger batches bring what is found closer to what the function with averages sees; with
    one batch both are the same.

    Args:
      fn: `fn(params, *args)`, pure, of arrays: gives new statistics, a tree whose paths are
        those of `params`; other leaves may be among them. Each statistic is to be
        `decay · old + (1 - decay) · batch`, and no output else is to depend on the old one,
        as in `flax` and most libraries; a decay of 0, the batch's own, will do. For linen,
        `lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1]`; for NNX,
        merge, run and return `nnx.state(model)`. Dropout off. For a smaller model,
        `plan.rewrite(fn)`.
      params: with the statistics among the leaves, at any size that `fn` takes.
      batches: tuples of arguments `args`; anything else is one argument. Of noise, where
        there are no data.

    Returns:
      The parameters with new leaves where `fn` gives others than it was given. A variance is
      a leaf whose name has `var` or `variance` where that of its sibling has `mean`, such as
      `running_var`; any other leaf is averaged. Leaves of whole numbers, such as counters,
      stay. Computed in float32, for a decay of 0.99 to a part in 100,000.

    Raises:
      ValueError: if there is no batch; if no statistic changes, one is no running average, or
        a variance by its name without its mean,
        has another shape or is not finite; or if `params` has no such leaf.

    Example:
      >>> def fn(params, x):
      ...     old, keep = params["norm"], 0.9
      ...     new = {"mean": jnp.mean(x, 0), "var": jnp.var(x, 0)}
      ...     return {"norm": jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, old, new)}
      >>> params = {"w": jnp.ones(1), "norm": {"mean": jnp.ones(1), "var": jnp.ones(1)}}
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[7.0], [9.0]])]
      >>> new = jp.structured.recalibrate(fn, params, batches)
      >>> jax.tree.map(lambda x: x.round().tolist(), new["norm"])  # of 1, 3, 7 and 9
      {'mean': [5.0], 'var': [10.0]}

    References:
      Wang et al., "Structurally Prune Anything", arXiv 2403.18955, whose text on this was
      not read: a step of OBSPA, after `refit`. PyTorch's `torch.optim.swa_utils.update_bn`
      averages variances and leaves out that of the means.
    """
    run = jax.jit(lambda params, args: _given(fn, params, args))
    count, start, decays, means, spreads = 0, params, {}, {}, {}
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        if not count:
            start, decays = _decays(run, params, args)
            means = spreads = dict.fromkeys(decays, jnp.zeros(()))
        found = run(start, args)
        count += 1
        apart = {p: found[p] / (1 - decays[p]) - means[p] for p in decays}
        means = {p: means[p] + apart[p] / count for p in decays}
        spreads = {
            p: spreads[p] + apart[p] ** 2 * (1 - 1 / count) for p in decays
        }  # Welford's
    if not count:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for fn."
        )
    return _written(params, means, {p: x / count for p, x in spreads.items()})


def _given(
    fn: Callable[..., PyTree], params: PyTree, args: tuple[Any, ...]
) -> dict[str, Array]:
    """What the function gives, by path, in float32: of leaves that may be statistics."""
    known = _floats(params)
    paths, leaves, _ = _tree.flatten(fn(params, *args))
    found = dict(zip(paths, leaves, strict=True))
    odd = [
        f"{p} of shape {jnp.shape(x)}" for p, x in found.items()
        if _tree.is_float(x) and (p not in known or known[p].shape != x.shape)
    ]  # fmt: skip
    if odd:
        raise ValueError(
            f"fn: it gives {_tree.listing(odd)}; expected leaves of params, which are "
            f"{_tree.listing([f'{p} of shape {x.shape}' for p, x in known.items()])}. "
            "Return statistics alone, at the place that they have in params."
        )
    return {p: x.astype(jnp.float32) for p, x in found.items() if p in known}


def _floats(params: PyTree) -> dict[str, Array]:
    paths, leaves, _ = _tree.flatten(params)
    return {p: x for p, x in zip(paths, leaves, strict=True) if _tree.is_float(x)}


def _decays(
    run: Callable[..., dict[str, Array]], params: PyTree, args: tuple[Any, ...]
) -> tuple[PyTree, dict[str, Array]]:
    """Parameters whose statistics are 0, and how much of the old is in the new, by path."""
    known, given = _floats(params), jax.eval_shape(run, params, args)
    moved = {p: known[p] + jnp.asarray(_AWAY, known[p].dtype) for p in given}
    found = run(replaced(params, moved), args)
    changed = [p for p in given if not jnp.array_equal(found[p], moved[p])]
    if not changed:
        raise ValueError(
            f"fn: what it gives, {_tree.listing(list(given))}, is what it was given; "
            "expected new statistics. Run the model in training mode."
        )
    wide = {p: known[p].astype(jnp.float32) for p in changed}
    start = replaced(params, {p: jnp.zeros_like(x) for p, x in wide.items()})
    zero, decays = run(start, args), {}
    far = {p: 1 + 16 * jnp.max(jnp.abs(zero[p])) for p in changed}
    moved = {p: jnp.full_like(x, far[p]) for p, x in wide.items()}
    other = run(replaced(params, moved), args)
    for p in changed:
        each = (other[p] - zero[p]) / far[p]
        decays[p] = jnp.mean(each)
        close = jnp.max(jnp.abs(each - decays[p])) < _LEAST
        if not (close and -_LEAST < decays[p] < 1 - _LEAST):
            raise ValueError(
                f"fn: {p} is no running average, decay · old + (1 - decay) · batch, or not "
                "finite. Run the model in training mode, with statistics in float32 and a "
                "decay of at most 0.999, and return statistics of batch norms alone."
            )
    return start, decays


def _written(
    params: PyTree, means: Mapping[str, Array], spreads: Mapping[str, Array]
) -> PyTree:
    known, new = _floats(params), {}
    for path, x in means.items():
        mean = _mean_of(path, spreads)
        if mean is not None:
            x = x + spreads[mean]
        if not jnp.all(jnp.isfinite(x)):
            raise ValueError(
                f"batches: {path} is not finite over them. Look for values that are none in "
                "the parameters and the batches."
            )
        new[path] = x.astype(known[path].dtype)
    return replaced(params, new)


def _mean_of(path: str, known: Mapping[str, Any]) -> str | None:
    """Where the mean of a variance is; `None` for a leaf that is no variance."""
    parts = path.split("/")
    for i in reversed(range(len(parts))):
        part = re.sub("var(iance)?", "mean", parts[i])
        other = "/".join([*parts[:i], part, *parts[i + 1 :]])
        if part != parts[i] and other in known:
            return other
    if "var" in parts[-1]:
        raise ValueError(
            f"fn: {path} is a variance by its name, and its mean is not among what changes, "
            f"{_tree.listing(list(known))}; without it the variance over all batches is not "
            "known. Name the two alike, as mean and var."
        )
    return None
