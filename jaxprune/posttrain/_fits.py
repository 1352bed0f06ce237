"""Refuses what cannot be pruned as wanted, before anything is run."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxprune._tree import PyTree
from jaxprune.posttrain._run import Run, uses
from jaxprune.posttrain._solver import of_matrix
from jaxprune.posttrain._wanted import Wanted
from jaxprune.posttrain._work import Work
from jaxprune.tracing import Block, Leaf


def check(
    params: PyTree,
    work: Work,
    wanted: Mapping[Leaf, Wanted],
    rules: Mapping[str, Any] | None,
) -> None:
    """Follows all chosen leaves to their matrices, by shapes alone.

    Raises:
      ValueError: if one cannot be followed, is used in two ways, or has a matrix that groups
        or blocks do not divide.
    """
    run, seen = Run(params, work, None, (), offload=False, donate=False), set()
    for block in work.blocks.blocks[: work.last + 1]:
        own, picked = _shapes(block, run.weights), work.picked(block)
        structures = tuple(wanted[block.leaves[j]].structure for j in picked)
        key = block.fn, tuple(picked), structures
        if picked and key not in seen:
            seen.add(key)
            stats = run.calibrate(block, own, picked, rules)
            for j, structure in zip(picked, structures, strict=True):
                leaf = block.leaves[j]
                for site, _ in uses(leaf, own[j], stats, str(j)):
                    w = jax.ShapeDtypeStruct(site.matrix, own[j].dtype)
                    of_matrix(structure, w, leaf.path)
        run.propagate(block, own)


def _shapes(block: Block, weights: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a block reads of the parameters; of layers their shapes."""
    return tuple(
        weights[path]
        if layer is None
        else jax.eval_shape(lambda x, i=layer: x[i], weights[path])
        for path, layer in block.leaves
    )
