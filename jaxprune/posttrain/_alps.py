"""ALPS: a mask and its weights by operator splitting, then least squares on the mask.

Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models, arXiv 2406.07831.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxprune.posttrain import _hessian, _selection, _solver
from jaxprune.posttrain._solver import Group, Solver

_EVERY = 3  # iterations between two looks at the support
_SETTLING = 30  # iterations after which a support that hardly changes ends the search
_STEPS = 10  # of conjugate gradients
_MAX_RHO = 1e6


def alps(
    *,
    group: Group = "layer",
    damping: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
) -> Solver:
    """Alternates ridge regression and projection, and ends with conjugate gradients.

    Inputs are scaled to a unit diagonal of the Gram matrix. With `A` that matrix and `W`
    the dense weights, both scaled, each iteration sets

        B = (A + rho I)⁻¹ (A W - V + rho D),  D = best(B + V / rho),  V += rho (B - D),

    where `best` keeps the largest entries. `rho` grows with every third iteration, faster
    the more of the mask changed, until the mask stands; ten steps of conjugate gradients
    then solve for the weights on it.

    Args:
      group: `"layer"` keeps the largest entries of the matrix, as the authors do;
        `"output"` as many of each output.
      damping: added to the Gram matrix first, as a share of the mean of its diagonal; ten
        times more where its Cholesky factor fails.
      rho: at the start.
      iterations: at most.

    Returns:
      A `Solver` that needs `gram`. Where the authors decompose `A` into eigenvectors once,
      in float64, we factor `A + rho I` for each `rho`, in float32; inputs that were
      always 0 get weights of 0; damping is a share of the mean over the other inputs; and
      conjugate gradients do not stop early. The counts of `NM(n, m)` are those kept, as
      theirs are.

    Raises:
      ValueError: for another group, a damping or rho that is not positive, or less than
        one iteration.

    Example:
      >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> inputs = jp.calibration.Inputs(jnp.float32(8), gram=gram)
      >>> solver = jp.posttrain.alps(damping=1e-6)
      >>> w = jnp.array([[4.0], [1.0]])
      >>> solver.solve(w, inputs, 0.5, jp.Unstructured()).w.round(3).tolist()
      [[4.5], [0.0]]

    References:
      Meng et al., arXiv 2406.07831, Algorithms 1 and 2, Eq. (4); the schedule of rho is
      that of the authors' code.
    """
    _solver.check_group("alps", group, ("layer", "output"))
    _solver.check_damping("alps", damping)
    if not 0 < rho < _MAX_RHO:
        raise ValueError(
            f"alps: got rho={rho!r}; expected a number above 0, such as 0.1."
        )
    if iterations < 1:
        raise ValueError(f"alps: got iterations={iterations!r}; expected at least 1.")
    return _solver.solver(
        "alps", ("gram",), _alps,
        group=group, damping=damping, rho=rho, iterations=iterations,
    )  # fmt: skip


def _alps(w, inputs, kept, *, structure, group, damping, rho, iterations):
    known = _scale(inputs.gram, damping)
    dense = jnp.where(known.dead[:, None], 0, w) * known.scale[:, None]
    target = _product(known.matrix, dense)

    def project(x: Array) -> Bool[Array, "K N"]:
        return _selection.best(x * x, kept, structure, group)

    found = _search(known.matrix, dense, target, project, rho, iterations)
    start = jnp.where(found.keep, found.values, 0)
    scaled, left = _conjugate_gradients(known.matrix, target, start, found.keep)
    live = found.keep & ~known.dead[:, None]
    new = jnp.where(live, scaled / known.scale[:, None], 0) + 0 * known.damping
    change = jnp.where(known.dead[:, None], 0, w - new)
    damped = jnp.sum((dense - scaled) * left)
    error = jnp.maximum(damped - known.added * jnp.sum(change**2), 0 * damped)
    return new, found.keep, error, known.damping


class _Scaled(NamedTuple):
    """The damped Gram matrix, scaled to a diagonal of ones."""

    matrix: Float[Array, "K K"]
    scale: Float[Array, " K"]
    dead: Bool[Array, " K"]
    damping: Float[Array, ""]
    added: Float[Array, ""]


def _scale(gram: Float[Array, "K K"], damping: float) -> _Scaled:
    factored = _hessian.factor(gram, damping)
    diagonal = jnp.diagonal(gram)
    mean = factored.added / factored.damping
    diagonal = jnp.where(factored.dead, mean, diagonal) + factored.added
    scale = jnp.sqrt(diagonal)
    matrix = (gram + jnp.diag(diagonal - jnp.diagonal(gram))) / scale / scale[:, None]
    return _Scaled(matrix, scale, factored.dead, factored.damping, factored.added)


class _Found(NamedTuple):
    values: Float[Array, "K N"]
    keep: Bool[Array, "K N"]


class _State(NamedTuple):
    step: Int[Array, ""]
    b: Float[Array, "K N"]
    d: Float[Array, "K N"]
    v: Float[Array, "K N"]
    keep: Bool[Array, "K N"]
    rho: Float[Array, ""]
    moved: Bool[Array, ""]  # the mask has changed by more than a little, once
    done: Bool[Array, ""]


def _search(matrix, dense, target, project, rho: float, iterations: int) -> _Found:
    rows, columns = dense.shape

    def ridge(rho):
        """How to divide by `A + rho I`."""
        lower = _hessian.cholesky(matrix + rho * jnp.eye(rows, dtype=matrix.dtype))
        if 3 * columns > 2 * rows:
            root = lax.linalg.triangular_solve(
                lower, jnp.eye(rows, dtype=matrix.dtype), left_side=True, lower=True
            )
            inverse = _product(root, root.T)
            return lambda x: _product(inverse, x)

        def solve(x):  # with few outputs an inverse is not worth its time
            y = lax.linalg.triangular_solve(
                lower, x, left_side=True, lower=True, transpose_a=True
            )
            return lax.linalg.triangular_solve(lower, y, left_side=True, lower=True)

        return solve

    keep = project(dense)
    kept = jnp.sum(keep, dtype=jnp.float32)
    first = jnp.where(keep, dense, 0)
    zeros = jnp.zeros_like(dense)

    def look(state: _State) -> _State:
        divide = ridge(state.rho)

        def iterate(_, x):
            _, d, v, _ = x
            b = divide(target - v + state.rho * d)
            wanted = b + v / state.rho
            keep = project(wanted)
            d = jnp.where(keep, wanted, 0)
            return b, d, v + state.rho * (b - d), keep

        x = state.b, state.d, state.v, state.keep
        b, d, v, keep = lax.fori_loop(0, _EVERY, iterate, x)
        step = state.step + _EVERY
        changed = jnp.sum(keep != state.keep, dtype=jnp.float32)
        share = changed / kept
        moved = state.moved | (share > 0.005)
        faster = jnp.where(share > 0.1, 1.3, jnp.where(share > 0.005, 1.2, 1.1))
        rho = jnp.minimum(state.rho * jnp.where(moved, faster, 0.2), _MAX_RHO)
        # Held too tightly from the start: begin again, with less.
        again = ~moved & (changed > 0)
        b, d, v = (
            jnp.where(again, x, y) for x, y in ((dense, b), (first, d), (zeros, v))
        )
        settled = (step > _SETTLING) & (share < 3e-4)
        return _State(
            step, b, d, v, keep, rho, moved, (moved & (changed == 0)) | settled
        )

    def unfinished(state: _State):
        return (state.step < iterations) & ~state.done

    start = _State(
        jnp.int32(0), dense, first, zeros, keep, jnp.float32(rho),
        jnp.bool_(False), jnp.bool_(False),
    )  # fmt: skip
    b = lax.while_loop(unfinished, look, start).b
    return _Found(b, project(b))


def _conjugate_gradients(matrix, target, x, keep):
    """Solves `A X = target` on the mask, each column by itself; gives what is left, too."""

    def energy(r):
        return jnp.sum(r * r, axis=0)

    def step(_, state):
        x, left, along, before = state
        product = _product(matrix, along)
        length = jnp.sum(along * product, axis=0)
        size = jnp.where(length > 0, before / length, 0)
        x, left = x + size * along, left - size * product
        inside = jnp.where(keep, left, 0)
        now = energy(inside)
        turn = jnp.where(before > 0, now / before, 0)
        return x, left, inside + turn * along, now

    left = target - _product(matrix, x)
    inside = jnp.where(keep, left, 0)
    start = x, left, inside, energy(inside)
    return lax.fori_loop(0, _STEPS, step, start)[:2]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
