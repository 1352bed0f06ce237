"""Functions in which some leaves come with others of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import _tree, tracing


def with_views(
    fn: Callable[..., Any],
    stacked: Mapping[str, int],
    *,
    contract: Callable[..., Any],
    dense: Callable[..., Any],
) -> Callable[..., Any]:
    """`fn` of a pair, parameters and more leaves by path, for some of which views stand.

    The value of a view is the leaf and what the other tree has at its path.

    Args:
      fn: of the parameters alone.
      stacked: by path of these leaves, over how many axes a scan runs.
      contract: see `jaxprune.tracing.replay`.
      dense: see `jaxprune.tracing.replay`.
    """

    def new_fn(pair: Any, *args: Any) -> Any:
        params, others = pair
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
        operands = []
        for path, leaf in zip(*_tree.flatten(params)[:2], strict=True):
            if path in stacked:
                axes = tuple(range(jnp.ndim(leaf)))
                view = (leaf, others[path]), path, axes, stacked[path]
                operands.append(tracing.View(*view))
            elif not _tree.is_hole(leaf):
                operands.append(leaf)
        outs = tracing.replay(
            closed, [*operands, *jax.tree.leaves(args)], contract=contract, dense=dense
        )
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return new_fn
