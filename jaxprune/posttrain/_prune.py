"""One-shot pruning of a whole model, block by block."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune import _tree, masks, tracing
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.calibration import Inputs, Statistics
from jaxprune.calibration._calibrate import check_statistics
from jaxprune.posttrain import _fits, _mesh, _wanted, _work
from jaxprune.posttrain._folder import Folder, Solved
from jaxprune.posttrain._report import Report, Row
from jaxprune.posttrain._run import Run, uses
from jaxprune.posttrain._solver import Solution, Solver, Sparsity, layer_error
from jaxprune.posttrain._sparsegpt import sparsegpt
from jaxprune.posttrain._wanted import StructureByLeaf, Wanted
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
    structure: StructureByLeaf = Unstructured(),
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
      sparsity: share of the weights to prune, in [0, 1), where `NM` does not say it.
      structure: what is kept or pruned as one, in matrices `[K, N]`: `Unstructured`, `NM` or
        `Block`. Or a mapping of patterns to them, of which the last match counts, on names
        as `allocation` sees them. Or a function of shapes and of the sparsities that
        `allocation` gives, such as `functools.partial(jaxprune.allocation.mixed_nm, m=8)`,
        which answers for each name.
      allocation: how sparsity is divided among leaves, not `"global"`; see
        `jaxprune.prune`. Each layer of a leaf that a scan runs over has a sparsity of its
        own, and is called as in an unrolled model: `"layers/3/up/kernel"`.
      where: which leaves are pruned; see `jaxprune.prune`.
      refine: `refine(w, solution, inputs) -> solution`, called after the solver with the
        dense matrices `[stack, batch, K, N]`; gives weights and mask that fit each other
        and, with `NM`, keep no more of a group than it allows.
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
        those that are pruned are deleted when their pruned values are there, a scanned leaf
        with its first layer, those that offload moved at once. As with `donate_argnums` of
        `jax.jit` they cannot be used again, even if `prune` raises, so that neither `fn` nor
        `refine` may hold them. Arrays that share memory with others in `params` or
        `batches` are kept.
      directory: where each block is saved when it is done. A run that was killed goes on
        there if it is started again with the same arguments: arrays of the same values,
        and an `fn` of the same equations.
      progress: `progress(name, i, n)`, called in front of block `i` of `n`.

    Returns:
      The pruned parameters; masks, `None` for leaves that were not chosen; a report with
      a row for each matrix. Where only a part of a leaf is contracted, the rest is kept.

    Raises:
      ValueError: if there is no batch, activations or statistics are not finite, sparsity,
        structure and allocation contradict each other or the shapes, a chosen leaf cannot
        be followed to where it is used, is used in several blocks or in two ways, `refine`
        gives what does not fit, parameters were deleted, or `directory` was begun with
        other arguments or cannot be read.
      TypeError: if `method` is no solver, `structure` gives what is none, or `refine` gives
        no solution.

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
    by_name = _wanted.by_name(work.shapes, sparsity, structure, allocation)
    wanted = {leaf: by_name[name] for leaf, name in work.names.items()}
    _fits.check(params, work, wanted, rules)
    names = tuple(dict.fromkeys((*method.statistics, *statistics)))
    settings = {
        "method": method.name, "where": sorted(work.shapes), "refine": refine,
        "sparsity": _one_or_each({p: str(x.sparsity) for p, x in by_name.items()}),
        "structure": _one_or_each({p: x.structure for p, x in by_name.items()}),
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
        found = None if folder is None else folder.restore(i, [own[j] for j in picked])
        if found is not None or not picked:
            each = iter(found or ())
        else:
            each = _solved(run, block, own, picked, rules, method, refine, wanted)
            if folder is not None:
                each = folder.saved(i, each)
        for j, solved in zip(picked, each, strict=True):
            run.replace(block.leaves[j], solved.w, solved.mask)
            rows += solved.rows
            if propagate_error:
                run.release()
        if i < work.last:
            run.propagate(block, run.leaves(block) if propagate_error else own)
        run.release()
    return (*run.trees(params), Report(tuple(rows)))


def _one_or_each(found: Mapping[str, Any]) -> Any:
    """What all have, or what each has."""
    first, *others = found.values()
    return found if any(x != first for x in others) else first


def _solved(
    run: Run,
    block: Block,
    own: tuple[Array, ...],
    picked: Sequence[int],
    rules: Mapping[str, Any] | None,
    method: Solver,
    refine: Refine | None,
    wanted: Mapping[Leaf, Wanted],
) -> Iterator[Solved]:
    """Calibrates a block, and prunes its leaves one by one; each then lies as it lay."""
    stats = run.calibrate(block, own, picked, rules)
    for j in picked:
        w, leaf = own[j], block.leaves[j]
        with _mesh.auto((w, stats)) as (free, known):
            solved = _solve(block, j, free, known, method, refine, wanted[leaf])
        new, mask = jax.device_put(solved[:2], getattr(w, "sharding", None))
        yield Solved(new, mask, solved.rows)


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
    new, mask = w, jnp.ones_like(w, bool)
    rows = []
    for site, inputs in uses(leaf, w, stats, str(j)):
        start = time.perf_counter()
        dense = _mesh.columns(site.to_matrix(w))
        stack, batch, k, n = dense.shape
        try:
            solution = method.solve(dense, inputs, wanted.sparsity, structure)
        except ValueError as e:
            raise ValueError(f"{leaf}: {e}") from e
        if refine is not None:
            solution = _refined(refine, dense, solution, inputs, structure)
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


def _refined(
    refine: Refine,
    dense: Array,
    solution: Solution,
    inputs: Inputs,
    structure: Structure,
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
    if isinstance(structure, NM):
        most = int(jnp.max(structure.by_group("w", jnp.sum, found.mask.astype(int))))
        if most > structure.n:
            raise ValueError(
                f"refine: its mask keeps {most} of a group, where {structure} allows "
                f"{structure.n}. Refine within the groups: dsnot takes structure=."
            )
    return found
