"""What every solver on one matrix shares: its type, its answer, and what it refuses."""

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import core, lax
from jaxtyping import Array, Bool, Float

from jaxprune import allocation
from jaxprune.calibration import Inputs
from jaxprune.posttrain import _selection
from jaxprune.structures import NM, Block, Structure, Unstructured

Group: TypeAlias = Literal["output", "block", "layer"]
"""Which scores are compared with one another, where weights or blocks are pruned.

`"output"`: those of one output, a column of `[K, N]` and a row of the papers' `[out, in]`.
`"block"`: those of all outputs for `block_size` consecutive inputs. `"layer"`: all.
"""

Sparsity: TypeAlias = float | Fraction | None


class Solution(NamedTuple):
    """A pruned matrix.

    Attributes:
      w: the new weights, of the shape and dtype that came; 0 where pruned.
      mask: True = kept, of the same shape.
      error: `tr(dWᵀ G dW)` with the Gram matrix as given, float32 `[*stack]`: the squared
        change of the outputs, summed over these and averaged over rows; SparseGPT and
        ALPS do not count rounding to the dtype of `w`. `None` if the inputs have no Gram
        matrix. Divide by `layer_error(w, 0 * w, gram)` to see the
        share of the outputs' energy that it is.
      damping: what was added to the diagonal of the Gram matrix, as a share of the
        diagonal's mean, float32 `[*stack]`; more than was asked for where this did not
        do, and NaN, as are `w` and `error`, where nothing did under `jit` (elsewhere
        that is an error). `None` from solvers that do not damp.
    """

    w: Float[Array, "*stack K N"]
    mask: Bool[Array, "*stack K N"]
    error: Float[Array, "*stack"] | None
    damping: Float[Array, "*stack"] | None


class Solver(NamedTuple):
    """A way of pruning one matrix, or each of a stack.

    Attributes:
      name: with its options.
      statistics: fields of `Inputs` that it needs.
      solve: `solve(w, inputs, sparsity, structure) -> Solution`. The matrices `w` are
        `[*stack, K, N]`, in float32 or less, and `inputs` have the same `[*stack]`.
        `sparsity` is a Python number, or `None` with `NM`, which fixes it. Pure, and
        compiled once for each shape and set of options. Weights that are sharded must
        be so on a mesh with automatic axes; `prune` takes those of any mesh.
    """

    name: str
    statistics: tuple[str, ...]
    solve: Callable[[Array, Inputs, Sparsity, Structure], Solution]


Matrix: TypeAlias = Callable[..., tuple[Array, Array, Array | None, Array | None]]


def solver(
    name: str,
    statistics: tuple[str, ...],
    matrix: Matrix,
    *,
    group: Group,
    tile: Callable[[int, Structure], int] | None = None,
    **options: Any,
) -> Solver:
    """Makes a solver of stacks from a function of one matrix.

    Args:
      name: for messages.
      statistics: fields of the inputs that it needs.
      matrix: `matrix(w, inputs, kept, structure=, group=, **options)` gets float32, the
        needed fields and how many units to keep in each tile, and gives new weights,
        mask, error and damping. Where the error is `None` and there is a Gram matrix it
        is computed.
      group: which scores are compared.
      tile: how many rows are pruned together, from the number of rows and the structure;
        `None` for all.
      **options: static.
    """

    def solve(
        w: Array, inputs: Inputs, sparsity: Sparsity, structure: Structure
    ) -> Solution:
        exact, structure = check(name, w, inputs, statistics, sparsity, structure)
        rows = w.shape[-2]
        height = rows if tile is None else tile(rows, structure)
        kept = _selection.counts(w.shape[-2:], height, exact, structure, group)
        frozen = tuple(sorted({**options, "group": group}.items()))
        found = _solve(w, inputs, kept, matrix, structure, statistics, frozen)
        check_solved(name, found)
        return found

    spelled = ", ".join(f"{k}={v!r}" for k, v in {"group": group, **options}.items())
    return Solver(f"{name}({spelled})", statistics, solve)


# The counts are arguments: layers of one shape share a program, whatever their sparsity.
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _solve(w, inputs, kept, matrix, structure, statistics, options) -> Solution:
    def one(w, inputs):
        wide, inputs = jax.tree.map(lambda x: x.astype(jnp.float32), (w, inputs))
        needed = Inputs(inputs.count, **{s: getattr(inputs, s) for s in statistics})
        new, mask, error, damping = matrix(
            wide, needed, kept, structure=structure, **dict(options)
        )
        new = new.astype(w.dtype)
        if error is None and inputs.gram is not None:
            error = layer_error(wide, new, inputs.gram)
        return Solution(new, mask, error, damping)

    return over_stack(one, w.ndim - 2)(w, inputs)


def over_stack(f: Callable[..., Any], axes: int) -> Callable:
    """Maps a function of matrices over that many leading axes."""
    for _ in range(axes):
        f = jax.vmap(f)
    return f


def layer_error(
    w: Float[Array, "*stack K N"],
    new: Float[Array, "*stack K N"],
    gram: Float[Array, "*stack K K"],
) -> Float[Array, "*stack"]:
    """`tr(dWᵀ G dW)`: how much the outputs change, squared, as a mean over rows.

    Args:
      w: the weights.
      new: what stands in their place.
      gram: mean of x xᵀ over the rows x of the inputs.

    Returns:
      The sum over outputs, float32.

    Example:
      >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> float(jp.posttrain.layer_error(w, w.at[0, 0].set(0), jnp.eye(2)))
      1.0
    """
    change = new.astype(jnp.float32) - w.astype(jnp.float32)
    product = jnp.matmul(gram, change, precision=lax.Precision.HIGHEST)
    return jnp.sum(change * product, axis=(-2, -1))


def check_group(name: str, group: str, allowed: tuple[str, ...]) -> None:
    """Raises `ValueError` for a comparison group that the solver does not have."""
    if group not in allowed:
        meant = " | ".join(repr(g) for g in allowed)
        hint = "" if group in get_args(Group) else " 'output' is a row of [out, in]."
        raise ValueError(f"{name}: got group={group!r}; expected {meant}.{hint}")


def check_damping(name: str, damping: float) -> None:
    """Raises `ValueError` unless it is a positive number."""
    if not 0 < damping < float("inf"):
        raise ValueError(
            f"{name}: got damping={damping!r}; expected a positive number, a share of the "
            "mean of the Gram matrix's diagonal, such as 0.01."
        )


def check(
    name: str,
    w: Any,
    inputs: Any,
    statistics: tuple[str, ...],
    sparsity: Sparsity,
    structure: Structure,
) -> tuple[Fraction, Structure]:
    """Refuses what cannot be solved; gives exact sparsity, and the structure of `[K, N]`."""
    check_matrix(name, w, inputs, statistics)
    if not isinstance(structure, Unstructured | NM | Block):
        raise TypeError(
            f"structure: got {structure!r}; expected Unstructured(), NM(2, 4) or "
            f"Block(16, 16): {name} prunes within one matrix. Whole neurons or heads are "
            "for jaxprune.structured."
        )
    structure = of_matrix(structure, w, "w")
    if not isinstance(structure, NM):
        return allocation.exact(sparsity), structure
    whole = 1 - Fraction(structure.n, structure.m)
    if sparsity is not None and allocation.exact(sparsity) != whole:
        raise ValueError(
            f"sparsity: got {sparsity} with {structure}, which prunes {whole} of the "
            f"weights. Leave it out (None), or ask for {float(whole)}."
        )
    return whole, structure


def of_matrix(structure: Structure, w: Any, path: str) -> Structure:
    """The structure of each `[K, N]` in `[*stack, K, N]`, which it must divide."""
    if not isinstance(structure, NM | Block):
        return structure
    k_axes, n_axes = structure.matrix_axes(path, w.shape)
    if (k_axes, n_axes) != ((w.ndim - 2,), (w.ndim - 1,)):
        raise ValueError(
            f"structure: {structure} sees K on axes {k_axes} of weights {tuple(w.shape)}; "
            "expected the last but one, as solvers get [*stack, K, N]. Use axis=-2."
        )
    structure = dataclasses.replace(structure, axis=-2)
    if isinstance(structure, Block):
        structure = dataclasses.replace(structure, out_axis=-1)
    structure.units(path, jax.ShapeDtypeStruct(w.shape[-2:], w.dtype))
    return structure


def check_matrix(name: str, w: Any, inputs: Any, statistics: tuple[str, ...]) -> None:
    """Refuses weights and inputs that are not there, do not fit or are not finite."""
    shape, dtype = getattr(w, "shape", ()), getattr(w, "dtype", None)
    if len(shape) < 2 or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = f"{dtype}{list(shape)}" if dtype is not None else type(w).__name__
        raise TypeError(
            f"w: got {got}; expected floating-point matrices [*stack, K, N], K contracted."
        )
    if not isinstance(inputs, Inputs):
        raise TypeError(
            f"inputs: got {type(inputs).__name__}; expected jaxprune.calibration.Inputs."
        )
    *stack, rows, _ = shape
    for statistic in statistics:
        value = getattr(inputs, statistic)
        if value is None:
            raise ValueError(
                f"inputs: {name} needs {statistic!r}, which was not collected. Calibrate "
                f"with statistics={statistics}."
            )
    for statistic in (s for s in Inputs._fields if getattr(inputs, s) is not None):
        axes = {"count": 0, "gram": 2}.get(statistic, 1)
        wanted = (*stack, *(rows,) * axes)
        if (got := jnp.shape(getattr(inputs, statistic))) != wanted:
            raise ValueError(
                f"inputs: {statistic} has shape {got} beside weights of shape {shape}; "
                f"expected {wanted}. Stacks of both must be alike; repeat what is shared."
            )
    values = {"w": w, **{f"inputs: {s}": getattr(inputs, s) for s in statistics}}
    values = {k: x for k, x in values.items() if not isinstance(x, core.Tracer)}
    if isinstance(inputs.count, core.Tracer):
        empty = None
    else:
        empty = inputs.count if statistics else 1 + 0 * inputs.count
    bad, empty = _flaws(values, empty)
    for part, count in bad.items():
        if int(count):
            why = (
                "The model is broken before it is pruned."
                if part == "w"
                else "Some batch made an activation overflow; calibrate in float32, or "
                "leave it out."
            )
            raise ValueError(
                f"{part}: {int(count)} of {values[part].size} values are NaN or infinite, "
                f"which {name} would spread. {why}"
            )
    if empty is not None and bool(jnp.any(empty)):
        raise ValueError(
            f"inputs: no row other than 0 was seen{_places(empty)}, so {name} cannot tell "
            "which weights matter. Calibrate with more data, or prune these matrices "
            "with magnitude()."
        )


@jax.jit
def _flaws(values: dict[str, Array], count: Array | None):
    """How many values are not finite, and which matrices saw nothing, in one program."""
    bad = {k: jnp.sum(~jnp.isfinite(x)) for k, x in values.items()}
    if count is None:
        return bad, None
    empty = count == 0
    for part, x in values.items():
        if part != "w":
            seen = jnp.diagonal(x, 0, -2, -1) if part == "inputs: gram" else x
            empty = empty | ~jnp.any(seen, axis=-1)
    return bad, empty


def _places(where: Bool[Array, "*stack"]) -> str:
    return f" (of a stack, at {jnp.argwhere(where).tolist()})" if where.ndim else ""


def check_solved(name: str, found: Solution) -> None:
    """Raises `ValueError` where no damping did, unless traced."""
    damping = found.damping
    if damping is None or isinstance(damping, core.Tracer):
        return
    failed = jnp.isnan(damping)
    if bool(jnp.any(failed)):
        raise ValueError(
            f"inputs: the Gram matrix is not positive definite{_places(failed)}, and "
            f"{name} found no damping up to its diagonal's mean that makes it so. It must "
            "be a mean of x xᵀ, symmetric and finite; calibrate again, in float32."
        )
