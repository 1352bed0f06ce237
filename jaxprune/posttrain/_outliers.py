"""How many outliers each block of a model has, for OWL."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _tree, allocation, scores, tracing
from jaxprune._tree import PyTree
from jaxprune.posttrain import _mesh, _work
from jaxprune.posttrain._run import Run, uses


def outlier_ratios(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    multiple: float = 5.0,
    where: _tree.Where = None,
    block_of: tracing.BlockOf = tracing.block_of,
    token_weights: Callable[..., Array] | None = None,
    empty_rows: str | Sequence[str] = (),
    batch_axes: Mapping[str, int | tuple[int, ...]] | None = None,
    rules: Mapping[str, Any] | None = None,
    offload: bool = False,
) -> dict[str, float]:
    """The share of Wanda scores far above their mean, in each block of the dense model.

    What `jaxprune.allocation.owl` divides a sparsity by:
    `allocation=functools.partial(jp.allocation.owl, outliers=ratios)`.

    Args:
      fn: as for `prune`, like all but `multiple`.
      params: its parameters.
      batches: tuples of arguments, of one set of shapes.
      multiple: of the mean, above which a score is an outlier; 5 as in the authors'
        commands for LLaMA.
      where: which leaves are to be pruned.
      block_of: name of the block that a leaf belongs to.
      token_weights: 0 for padding.
      empty_rows: patterns of paths; see `jaxprune.calibration.calibrate`.
      batch_axes: see there.
      rules: see `jaxprune.tracing.sites`.
      offload: see `prune`.

    Returns:
      The ratio of its block, in [0, 1], for each chosen leaf; for each layer of a leaf
      that a scan runs over, as `"layers/3/up/kernel"`.

    Raises:
      ValueError: as `prune`.

    Example:
      >>> def fn(params, x):
      ...     for layer in params["layers"]:
      ...         x = jnp.tanh(x @ layer["kernel"])
      ...     return x
      >>> kernel = jnp.ones((8, 8)).at[0, 0].set(20.0)
      >>> params = {"layers": [{"kernel": kernel}, {"kernel": jnp.ones((8, 8))}]}
      >>> jp.posttrain.outlier_ratios(fn, params, [jnp.ones((4, 8))])
      {'layers/0/kernel': 0.015625, 'layers/1/kernel': 0.0}

    References:
      Yin et al., Outlier Weighed Layerwise Sparsity, arXiv 2310.05175, Sec. 3.2.
    """
    work = _work.begin(fn, params, batches, where, block_of, batch_axes, empty_rows)
    run = Run(params, work, token_weights, ("square",), offload, donate=False)
    ratios = {}
    for i, block in enumerate(work.blocks.blocks[: work.last + 1]):
        own, picked = run.leaves(block), work.picked(block)
        if picked:
            stats = run.calibrate(block, own, picked, rules)
            with _mesh.auto((own, stats)) as (free, known):
                found = [
                    scores.wanda(site.to_matrix(free[j]), jnp.asarray(inputs.square))
                    for j in picked
                    for site, inputs in uses(block.leaves[j], free[j], known, str(j))
                ]
                ratio = float(allocation.outlier_ratio(found, multiple=multiple))
            ratios |= {work.names[block.leaves[j]]: ratio for j in picked}
        if i < work.last:
            run.propagate(block, own)
    return ratios
