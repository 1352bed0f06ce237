"""One-shot pruning of a whole model, block by block."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _tree, masks, structures, tracing
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.calibration import Inputs, Statistics
from jaxprune.calibration._calibrate import check_statistics
from jaxprune.posttrain import _mesh, _wanted, _work
from jaxprune.posttrain._folder import Folder, Solved
from jaxprune.posttrain._report import Report, Row
from jaxprune.posttrain._run import Run, uses
from jaxprune.posttrain._solver import Solution, Solver, Sparsity, layer_error
from jaxprune.posttrain._sparsegpt import sparsegpt
from jaxprune.posttrain._wanted import Structures, Wanted
from jaxprune.structures import NM, Structure, Unstructured
from jaxprune.tracing import Block, Leaf

_DEFAULT = sparsegpt()

Refine = Callable[[Array, Solution, Inputs], Solution]


def prune(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    *,
    method: Solver = _DEFAULT,
    sparsity: Sparsity = None,
    structure: Structures = Unstructured(),
    allocation: Allocation = "uniform",
    where: _tree.Where = None,
    refine: Refine | None = None,
    statistics: tuple[str, ...] = (),
    propagate_error: bool = True,
    block_of: tracing.BlockOf = tracing.block_of,
    token_weights: Callable[..., Array] | None = None,
    empty_rows: str | Sequence[str] = (),
    batch_axes: Mapping[str, int | tuple[int, ...]] | None = None,
    rules: Mapping[str, Any] | None = None,
    offload: bool = False,
    donate: bool = False,
    directory: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[PyTree, PyTree, Report]:
    """Prunes the matrices of a model by what they do to its activations.

    The function is cut into blocks (`jaxprune.tracing.blocks`), of unrolled and of scanned
    models. Each block is run on the batches, so that its statistics are those behind
    blocks that are pruned already; its matrices are solved one by one; and it is run again
    to give the inputs of the next. Held at a time are the statistics of one block, and the
    activations of all batches between two blocks.

    Args:
      fn: `fn(params, *args)`, pure, of arrays, dropout off.
      params: its parameters.
      batches: tuples of arguments, of one set of shapes; anything else is one argument.
      method: a solver, such as `wanda()` or `sparsegpt()`.
      sparsity: share of the weights to prune, in [0, 1); may be left out with `NM`.
      structure: what is kept or pruned as one, in matrices `[K, N]`; or a mapping of path
        patterns to structures, in which the last match counts; or a function of shapes and
        the sparsities of `allocation`, such as
        `functools.partial(jaxprune.allocation.mixed_nm, m=8)`, which says all there is to
        say where it answers `NM`.
      allocation: how sparsity is divided among leaves, not `"global"`; see
        `jaxprune.prune`. Each layer of a leaf that a scan runs over has a sparsity of its
        own, and is called as in an unrolled model: `"layers/3/up/kernel"`.
      where: which leaves are pruned; see `jaxprune.prune`.
      refine: `refine(w, solution, inputs) -> solution`, called after the solver with the
        dense matrices `[stack, batch, K, N]`; gives weights and mask that fit each other.
      statistics: what `refine` needs beside what the solver does; fields of `Inputs`.
      propagate_error: whether the inputs of a block are those behind pruned blocks, or
        those of the dense model.
      block_of: name of the block that a leaf belongs to; see `jaxprune.tracing.blocks`.
        `lambda path: None` takes the function as one block.
      token_weights: `token_weights(*args)` gives a weight for each token, 0 for padding.
      empty_rows: patterns of paths; see `jaxprune.calibration.calibrate`.
      batch_axes: see there.
      rules: see `jaxprune.tracing.sites`.
      offload: whether weights, masks and activations rest in the memory of the host, as
        NumPy arrays, and only what a block needs comes to the device. Parameters may be
        given there; pruned ones and masks are there when they come back. For one process.
      donate: whether the arrays of `params` are given up, so that weights are held once:
        one is deleted as soon as its pruned values are there, or, with `offload`, once it
        rests on the host. As with `donate_argnums` of `jax.jit`, `params` cannot be used
        again, even if `prune` raises. One that stands at several places is kept.
      directory: where each block is saved when it is done. A run that was killed goes on
        there if it is started again with the same arguments: arrays of the same values,
        and an `fn` of the same equations.
      progress: `progress(name, i, n)`, called in front of block `i` of `n`.

    Returns:
      The pruned parameters; masks, `None` for leaves that were not chosen; a report with
      a row for each matrix. Where only a part of a leaf is contracted, the rest is kept.

    Raises:
      ValueError: if there is no batch, activations or statistics are not finite, a chosen
        leaf cannot be followed to where it is used, is used in several blocks or in two
        ways, `refine` gives what does not fit, or `directory` was begun with other
        arguments or cannot be read.
      TypeError: if `method` is no solver, or `refine` gives no solution.

    Example:
      >>> def fn(params, x):
      ...     for layer in params["layers"]:
      ...         x = jnp.tanh(x @ layer["kernel"])
      ...     return x
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"layers": [{"kernel": jax.random.normal(k, (8, 8))} for k in keys]}
      >>> batches = [jax.random.normal(key, (32, 8)) for key in keys]
      >>> pruned, masks, report = jp.posttrain.prune(fn, params, batches, sparsity=0.5)
      >>> jp.masks.sparsity(masks)
      0.5
    """
    if not isinstance(method, Solver):
        raise TypeError(
            f"method: got {method!r}; expected a solver, such as posttrain.wanda() or "
            "posttrain.sparsegpt(damping=0.1)."
        )
    if statistics:
        check_statistics(statistics)
    work = _work.begin(fn, params, batches, where, block_of, batch_axes, empty_rows)
    wanted = _wanted.by_leaf(work, sparsity, structure, allocation)
    names = tuple(dict.fromkeys((*method.statistics, *statistics)))
    settings = {
        "method": method.name, "sparsity": sparsity, "structure": structure,
        "allocation": allocation, "where": sorted(work.shapes), "refine": refine,
        "statistics": names, "propagate_error": propagate_error,
        "batch_axes": batch_axes, "empty_rows": empty_rows, "block_of": block_of,
        "rules": rules, "token_weights": token_weights,
    }  # fmt: skip
    folder = None
    if directory is not None:
        folder = Folder(directory, fn, params, work.batches, settings)
    run = Run(params, work, token_weights, names, offload, donate)
    rows: list[Row] = []
    for i, block in enumerate(work.blocks.blocks[: work.last + 1]):
        if progress is not None:
            progress(block.name, i, work.last + 1)
        own, picked = run.leaves(block), work.picked(block)
        done = None if folder is None else folder.restore(i, [own[j] for j in picked])
        begun = done is None and bool(picked)
        stats = run.calibrate(block, own, picked, rules) if begun else None
        found = []
        for n, j in enumerate(picked):
            if stats is not None:
                solved = _solved(block, j, own[j], stats, method, refine, wanted)
            else:
                solved = done[n]
            run.replace(block.leaves[j], solved.w, solved.mask)
            if propagate_error:
                run.release()
            found.append(solved)
            rows += solved.rows
        if folder is not None and stats is not None:
            folder.save(i, found)
        del stats
        if i < work.last:
            run.propagate(block, run.leaves(block) if propagate_error else own)
        run.release()
    return (*run.trees(params), Report(tuple(rows)))


def _solved(
    block: Block,
    j: int,
    w: Array,
    stats: Statistics,
    method: Solver,
    refine: Refine | None,
    wanted: Mapping[Leaf, Wanted],
) -> Solved:
    """Prunes leaf `j` of a block, which then lies as it lay."""
    with _mesh.auto((w, stats)) as (free, known):
        solved = _solve(block, j, free, known, method, refine, wanted[block.leaves[j]])
    new, mask = jax.device_put(solved[:2], getattr(w, "sharding", None))
    return Solved(new, mask, solved.rows)


def _solve(
    block: Block,
    j: int,
    w: Array,
    stats: Statistics,
    method: Solver,
    refine: Refine | None,
    wanted: Wanted,
) -> Solved:
    """Prunes leaf `j` of a block, use by use."""
    leaf, structure = block.leaves[j], wanted.structure
    new, mask = w, jnp.ones(w.shape, bool)
    rows = []
    for site, inputs in uses(leaf, w, stats, str(j)):
        start = time.perf_counter()
        dense = site.to_matrix(w)
        stack, batch, k, n = dense.shape
        _check_units(structure, leaf.path, dense)
        try:
            solution = method.solve(dense, inputs, wanted.sparsity, structure)
        except ValueError as e:
            raise ValueError(f"{leaf}: {e}") from e
        if refine is not None:
            solution = _refined(refine, dense, solution, inputs)
        new = site.from_matrix(solution.w, new)
        mask = site.from_matrix(solution.mask, mask)
        error = float("nan")
        if inputs.gram is not None:
            change, whole = (
                float(jnp.sum(layer_error(dense, x, inputs.gram)))
                for x in (solution.w, jnp.zeros_like(dense))
            )
            error = change / whole if whole else 0.0
        damping = solution.damping
        rows.append(
            Row(
                leaf.path, leaf.layer, block.name,
                (stack * batch, k, n),
                1 - int(masks.count_leaf(solution.mask)) / dense.size,
                error,
                float("nan") if damping is None else float(jnp.max(damping)),
                time.perf_counter() - start,
            )
        )  # fmt: skip
    return Solved(new, mask, rows)


def _check_units(structure: Structure, path: str, w: Array) -> None:
    """Refuses groups or blocks that do not divide a matrix, by the path of the leaf."""
    if isinstance(structure, NM | structures.Block):
        plain = dataclasses.replace(structure, axis=-2)
        plain.units(path, jax.ShapeDtypeStruct(w.shape[-2:], w.dtype))


def _refined(
    refine: Refine, dense: Array, solution: Solution, inputs: Inputs
) -> Solution:
    found = refine(dense, solution, inputs)
    if not isinstance(found, Solution):
        raise TypeError(
            f"refine: it gave {type(found).__name__}; expected a Solution, such as "
            "solution._replace(w=jnp.where(mask, w, 0), mask=mask)."
        )
    if not found.w.shape == found.mask.shape == dense.shape or found.mask.dtype != bool:
        raise ValueError(
            f"refine: it gave w of {found.w.shape} and a mask of {found.mask.shape}, "
            f"{found.mask.dtype}; expected {dense.shape}, the mask of booleans."
        )
    if bool(jnp.any((found.w != 0) & ~found.mask)):
        raise ValueError(
            "refine: weights that its mask prunes are not 0. Give it both: "
            "solution._replace(w=jnp.where(mask, w, 0), mask=mask)."
        )
    return found
