"""Runs a model over batches, and keeps what its matrices are multiplied with."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from jaxprune import _tree, tracing
from jaxprune._tree import PyTree, Where
from jaxprune.calibration._inputs import Inputs
from jaxprune.calibration._moments import STATISTICS, merge_inputs, nbytes
from jaxprune.calibration._read import tap_of
from jaxprune.calibration._statistics import Statistics, check_alike, of_trace

Rules = Mapping[str, Callable[..., Sequence[tracing.Contraction]]]
BatchAxes = Mapping[str, int | tuple[int, ...]]


class Plan(NamedTuple):
    """What calibration will hold in memory.

    Attributes:
      nbytes: of statistics, for each leaf that has them.
      total: bytes in all; leaves that read the same activation share its statistics.
      trace: the sites, and the uses that are none.
    """

    nbytes: dict[str, int]
    total: int
    trace: tracing.Trace


def plan(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    statistics: Sequence[str] = ("square",),
    where: Where = None,
    batch_axes: BatchAxes | None = None,
    rules: Rules | None = None,
) -> Plan:
    """Says what `calibrate` will hold, before anything is run.

    Besides, a step holds the activations of a forward pass, and the statistics of one
    batch until they are merged.

    Args:
      fn: as for `calibrate`, like the rest.
      params: may be shapes, like `args`.
      *args: one batch.
      statistics: what to collect.
      where: leaves.
      batch_axes: see `calibrate`.
      rules: see `calibrate`.

    Example:
      >>> from jaxprune import calibration
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
      >>> x = jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)
      >>> calibration.plan(
      ...     lambda p, x: x @ p["w"], params, x, statistics=("gram",)
      ... ).total / 2**20
      64.000003...
    """
    names = check_statistics(statistics)
    trace = tracing.sites(
        fn, params, *args, where=where, rules=rules, batch_axes=batch_axes
    )
    each = [nbytes((*r.stack, r.shape[0]), r.shape[1], names) for r in trace.readings]
    found: dict[str, int] = {}
    for path in dict.fromkeys(s.path for s in trace.sites):
        read = {s.activation for s in trace.sites if s.path == path}
        found[path] = sum(each[i] for i in read)
    return Plan(found, sum(each), trace)


def calibrate(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    statistics: Sequence[str] = ("square",),
    where: Where = None,
    token_weights: Callable[..., Array] | None = None,
    empty_rows: str | Sequence[str] = (),
    batch_axes: BatchAxes | None = None,
    rules: Rules | None = None,
    initial: Statistics | None = None,
) -> Statistics:
    """Statistics of what each leaf is multiplied with, over batches.

    Each batch is one forward pass, compiled once for each shape of a batch; the function
    is read from its jaxpr, and need not be changed. To see progress, wrap `batches`, for
    instance `tqdm(batches)`.

    Args:
      fn: `fn(params, *args)`, pure, of arrays. Dropout off, and state that changes is
        to be among the outputs.
      params: its parameters.
      batches: tuples of arguments `args`; anything else is one argument.
      statistics: what to collect: `"square"`, the mean square of each input; `"mean"`;
        `"variance"`, with the mean; `"gram"`, the mean of x xᵀ. See `Inputs`.
      where: leaves, as in `jaxprune.prune`; by default all.
      token_weights: `token_weights(*args)` gives a weight for each token, 0 for padding,
        where activations may be anything, NaN too. Its axes are the first axes of the
        rows of each product.
      empty_rows: glob patterns of leaves for which rows of zeros are none: slots of an
        expert that no token was sent to. Its count then is that of its tokens, and means
        are over these. What shares an activation with such a leaf counts as it does.
      batch_axes: `{pattern: axes}`, contracted axes of leaves that are to count as batch
        axes; see `jaxprune.tracing.sites`.
      rules: for primitives of your own; see `jaxprune.tracing.sites`.
      initial: statistics to go on from.

    Returns:
      The statistics: `stats[path]` has a `SiteInputs` for each use of the leaf, and
      `stats.untraced` the uses that could not be traced, with the reasons.

    Raises:
      ValueError: if there is no batch; if a value is not finite; if an option does not
        fit; if two batches use the parameters differently.

    Example:
      >>> from jaxprune import calibration
      >>> params = {"w": jnp.ones((2, 3))}
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> stats = calibration.calibrate(lambda p, x: x @ p["w"], params, batches)
      >>> (use,) = stats["w"]
      >>> use.inputs.square.tolist(), use.inputs.count.tolist()
      ([[[5.0, 2.0]]], [[2.0]])

    Note:
      Means are over tokens. The authors of Wanda and SparseGPT average over sequences,
      which is the same for sequences of one length, up to a factor.
    """
    return collect(
        fn, params, batches, {},
        statistics=statistics, where=where, token_weights=token_weights,
        empty_rows=empty_rows, batch_axes=batch_axes, rules=rules, initial=initial,
    )  # fmt: skip


def collect(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    steps: dict[Any, "_Step"],
    *,
    statistics: Sequence[str],
    where: Where = None,
    token_weights: Callable[..., Array] | None = None,
    empty_rows: str | Sequence[str] = (),
    batch_axes: BatchAxes | None = None,
    rules: Rules | None = None,
    initial: Statistics | None = None,
    name_of: Callable[[str], str] = str,
) -> Statistics:
    """As `calibrate`; `steps` holds what is compiled, for another call with the same `fn`.

    `name_of` gives what a leaf is called in messages.
    """
    names = check_statistics(statistics)
    stats, pending, count = None, None, 0
    seen = set()
    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        key = _signature((params, args))
        if key not in steps:
            closed = jax.make_jaxpr(fn)(params, *args)
            trace = tracing.of_jaxpr(
                closed, params, where=where, rules=rules, batch_axes=batch_axes
            )
            sparse = _matching(empty_rows, trace)
            steps[key] = _Step(
                closed, trace, names, token_weights, sparse, name_of, (params, args)
            )
        step = steps[key]
        if stats is None:
            stats = step.first(initial)
        if key not in seen:
            check_alike(step.empty, stats, "batches" if count else "initial")
            seen.add(key)
        # Its own copy, from which nothing else is read: the step may write into it.
        stats, finite = step(stats, params, args)
        # Read a batch later, so that the device is never waited for.
        _check_finite(pending, stats, count, name_of)
        pending, count = finite, count + 1
    if stats is None:
        raise ValueError(
            "batches: there is none; expected an iterable of at least one tuple of "
            "arguments for fn. A generator that was used up gives nothing a second time."
        )
    _check_finite(pending, stats, count, name_of)
    return stats


def init(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    statistics: Sequence[str] = ("square",),
    where: Where = None,
    batch_axes: BatchAxes | None = None,
    rules: Rules | None = None,
) -> Statistics:
    """Statistics of no batch: for `merge`, and to restore saved ones into.

    Args:
      fn: as for `calibrate`, like the rest.
      params: may be shapes, like `args`.
      *args: one batch.
      statistics: what to collect.
      where: leaves.
      batch_axes: see `calibrate`.
      rules: see `calibrate`.
    """
    trace = tracing.sites(
        fn, params, *args, where=where, rules=rules, batch_axes=batch_axes
    )
    return of_trace(trace, check_statistics(statistics))


class _Step:
    """One batch, compiled for its shapes."""

    def __init__(
        self,
        closed: ClosedJaxpr,
        trace: tracing.Trace,
        statistics: Sequence[str],
        token_weights: Callable[..., Array] | None,
        sparse: frozenset[int],
        name_of: Callable[[str], str],
        inputs: PyTree,
    ):
        self.closed, self.trace, self.token_weights = closed, trace, token_weights
        self.sparse = sparse
        self.empty = jax.eval_shape(lambda: of_trace(trace, statistics))
        self.paths = [""] * len(trace.readings)
        for site in reversed(trace.sites):
            self.paths[site.activation] = name_of(site.path)
        # Where they are from the first batch to the last, so that one program does.
        self.sharding = _everywhere(inputs)
        shardings = jax.tree.map(lambda _: self.sharding, self.empty)
        self.step = jax.jit(
            self._step, donate_argnums=0, out_shardings=(shardings, self.sharding)
        )

    def first(self, initial: Statistics | None) -> Statistics:
        """What to go on from."""
        if initial is None:
            initial = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.empty)
        else:
            initial = jax.tree.map(jnp.copy, initial)
        return jax.device_put(initial, self.sharding)

    def __call__(self, stats, params, args):
        _, leaves, _ = _tree.flatten(params)
        operands = [x for x in leaves if not _tree.is_hole(x)] + jax.tree.leaves(args)
        return self.step(stats, self.closed.consts, operands, args)

    def _step(self, stats, consts, operands, args):
        weights = self.token_weights(*args) if self.token_weights else None
        taps = {
            i: tap_of(
                r, path, stats.statistics, weights, i in self.sparse, merge_inputs
            )
            for i, (r, path) in enumerate(
                zip(self.trace.readings, self.paths, strict=True)
            )
        }
        closed = ClosedJaxpr(self.closed.jaxpr, consts)
        _, found = tracing.tap(closed, operands, taps)
        inputs = [found[i] for i in range(len(taps))]
        merged = tuple(map(merge_inputs, stats.inputs, inputs))
        finite = [_is_finite(x) for x in inputs]
        return dataclasses.replace(stats, inputs=merged), finite


def _everywhere(inputs: PyTree) -> jax.sharding.Sharding | None:
    """On every device that the inputs are bound to; `None` where they are free."""
    for x in jax.tree.leaves(inputs):
        if getattr(x, "committed", False):
            named = isinstance(x.sharding, jax.sharding.NamedSharding)
            mesh = x.sharding.mesh if named else None
            return jax.sharding.NamedSharding(mesh, jax.P()) if mesh else x.sharding
    return None


def _is_finite(x: Inputs) -> Array:
    arrays = [a for a in (x.count, x.square, x.mean, x.variance) if a is not None]
    if x.gram is not None:
        arrays.append(jnp.diagonal(x.gram, axis1=-2, axis2=-1))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in arrays]))


def _check_finite(
    finite: Sequence[Array] | None,
    stats: Statistics,
    batch: int,
    name_of: Callable[[str], str],
) -> None:
    bad = [i for i, ok in enumerate(finite or ()) if not ok]
    if bad:
        used = (s.path for s in stats.sites if s.activation in bad)
        paths = dict.fromkeys(map(name_of, used))
        raise ValueError(
            f"batches: in batch {batch}, what {_tree.listing(list(paths))} "
            f"{'is' if len(paths) == 1 else 'are'} multiplied with is not finite (NaN, "
            "infinite, or too large to be squared in float32). Look for it in the "
            "parameters and the batch; the first of these paths is the first in the model."
        )


def _matching(patterns: str | Sequence[str], trace: tracing.Trace) -> frozenset[int]:
    """Activations of the leaves that match; of one that is not traced there is none."""
    paths = list(dict.fromkeys([*(s.path for s in trace.sites), *trace.untraced]))
    found = _tree.matching(paths, patterns, name="empty_rows")
    return frozenset(s.activation for s in trace.sites if s.path in found)


def check_statistics(statistics: Sequence[str]) -> tuple[str, ...]:
    """The names, in the order of fields; refuses others."""
    if isinstance(statistics, str):
        raise TypeError(
            f"statistics: got the string {statistics!r}; expected a sequence of names. "
            f"Pass ({statistics!r},)."
        )
    wrong = [s for s in statistics if s not in STATISTICS]
    if wrong or not statistics:
        raise ValueError(
            f"statistics: got {tuple(statistics)!r}; expected one or several of "
            f"{', '.join(STATISTICS)}."
        )
    return tuple(s for s in STATISTICS if s in statistics)


def _signature(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(jax.typeof(x) for x in leaves)
