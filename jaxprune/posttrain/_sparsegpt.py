"""SparseGPT: prune input by input, and let the inputs to come make up for it.

Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv 2301.00774.

The authors invert the Gram matrix `H` and use `U`, with `inv(H) = Uᵀ U`. We do without the
inverse. With `H = Lᵀ L`, `U = inv(L)ᵀ`, and errors `e` as theirs, `W - W_dense = -Uᵀ e`
means `e = L (W_dense - W)`. So what earlier rows add to a tile of rows is a product of `L`
with the change of these rows so far, and only the corners of `L` on the tiles are inverted.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune._wide import Wide
from jaxprune.posttrain import _hessian, _selection, _solver
from jaxprune.posttrain._solver import Group, Solver
from jaxprune.structures import NM, Block, Structure

_STRIP = 16  # rows pruned one by one before a product takes them to the next ones
_LENGTHS = (
    8  # of the product with earlier rows that are compiled, whatever the size of K
)
_HIGHEST = lax.Precision.HIGHEST


def sparsegpt(
    *, group: Group = "block", block_size: int = 128, damping: float = 0.01
) -> Solver:
    """Prunes row by row of `[K, N]`; rows not yet reached take over what is lost.

    With `inv(H) = Uᵀ U`, `H` the damped Gram matrix, the weights of a block of rows are
    scored by `(w_k / U_kk)²`. Those pruned are set to 0 in turn, and each of them changes
    the rows below by `-U_kj w_k / U_kk`.

    Args:
      group: what is compared within a block, when its turn comes. `"block"`: the weights
        of all outputs, as the authors do. `"output"`: those of one output. `"layer"`
        compares the whole matrix once, before anything is pruned.
      block_size: rows chosen together, 128 in the paper. With `NM` each group is chosen
        when its first row is reached, whatever this is.
      damping: added to the diagonal of the Gram matrix, as a share of its mean; ten times
        more, and again, where the Cholesky factor fails.

    Returns:
      A `Solver` that needs `gram`. It keeps exact counts, where the authors prune one
      weight more in every block. Inputs that were always 0 get weights of 0, even where
      the mask keeps them, as theirs; their diagonal becomes the mean of the others rather
      than 1, and damping is a share of that mean, so that scaling the inputs changes
      nothing. The error comes from the sum of squares that pruning adds up, to rounding
      of float32. Blocks of weights, which the authors do not have, are scored by the sums
      of their weights' scores.

    Raises:
      ValueError: for another group, a block size below 1 or, from `solve`, one that is no
        multiple of the rows of a `Block`.

    Example:
      >>> gram = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> inputs = jp.calibration.Inputs(jnp.float32(8), gram=gram)
      >>> solver = jp.posttrain.sparsegpt(damping=1e-6)
      >>> w = jnp.array([[1.0], [4.0]])
      >>> solver.solve(w, inputs, 0.5, jp.Unstructured()).w.round(3).tolist()
      [[0.0], [4.5]]

    References:
      Frantar & Alistarh, arXiv 2301.00774, Algorithm 1 and Section 3.
    """
    _solver.check_group("sparsegpt", group, ("block", "output", "layer"))
    _solver.check_damping("sparsegpt", damping)
    if block_size < 1:
        raise ValueError(
            f"sparsegpt: got block_size={block_size}; expected at least 1, such as 128."
        )

    def tile(rows: int, structure: Structure) -> int:
        return rows if group == "layer" else _height(rows, structure, block_size)

    return _solver.solver(
        "sparsegpt", ("gram",), _sparsegpt,
        group=group, tile=tile, block_size=block_size, damping=damping,
    )  # fmt: skip


def _height(rows: int, structure: Structure, block_size: int) -> int:
    """Rows of a tile."""
    if isinstance(structure, NM):
        whole = structure.m * max(1, block_size // structure.m)
        return min(rows, whole)
    if isinstance(structure, Block) and block_size % structure.rows:
        raise ValueError(
            f"sparsegpt: block_size={block_size} is no multiple of the rows of "
            f"{structure}; choose one, such as {structure.rows}."
        )
    return min(rows, block_size)


def _sparsegpt(w, inputs, kept: Wide, *, structure, group, block_size, damping):
    order = _selection.group_order(structure, w.shape[0])
    gram = inputs.gram
    if order is not None:
        w, gram = w[order], gram[order][:, order]
    factored = _hessian.factor(gram, damping)
    change, mask, loss = prune_rows(
        w, factored, kept, structure=structure, group=group, block_size=block_size
    )
    new = jnp.where(mask & ~factored.dead[:, None], w - change, 0)
    error = jnp.maximum(loss - factored.added * jnp.sum(change**2), 0 * loss)
    # Factors that failed show in every weight, not only in those that follow.
    new = new + 0 * factored.damping
    if order is not None:
        back = np.argsort(order)
        new, mask = new[back], mask[back]
    return new, mask, error, factored.damping


def prune_rows(
    w: Float[Array, "K N"],
    factored: _hessian.Factored,
    kept: Wide,
    *,
    structure: Structure,
    group: str,
    block_size: int,
) -> tuple[Float[Array, "K N"], Bool[Array, "K N"], Float[Array, ""]]:
    """What pruning takes from the weights, the mask, and `tr(dWᵀ H dW)`."""
    rows = w.shape[0]
    nm = structure if isinstance(structure, NM) else None
    size = _height(rows, structure, block_size)
    tiles = -(-rows // size)
    # Rows that fill up the last tile: alone, of no weight, and the last to be kept.
    more = tiles * size - rows
    w = jnp.pad(jnp.where(factored.dead[:, None], 0, w), ((0, more), (0, 0)))
    lower = jnp.pad(factored.lower, ((0, more), (0, more)))
    lower = lower if more == 0 else lower + jnp.diag(jnp.arange(rows + more) >= rows)
    is_row = jnp.arange(rows + more)[:, None] < rows

    def score(values, diagonal, is_row):
        return jnp.where(is_row, (values * diagonal[:, None]) ** 2, -1)

    chosen = None
    if group == "layer" and nm is None:
        scores = score(w[:rows], jnp.diagonal(factored.lower), True)
        chosen = _selection.best(scores, kept, structure, group)
        chosen = jnp.pad(chosen, ((0, more), (0, 0)))
    if group == "layer":
        kept = jax.tree.map(lambda x: jnp.repeat(x, tiles), kept)  # not read below
    ends = size * np.arange(0, tiles + _step(tiles) - 1, _step(tiles))
    products = [_product(min(int(end), rows + more)) for end in ends]

    def prune_tile(change, step):
        start, keeps = step
        across = lax.dynamic_slice_in_dim(lower, start, size)  # [size, K]
        corner = lax.dynamic_slice_in_dim(across, start, size, axis=1)
        inverse = jax.scipy.linalg.solve_triangular(
            corner, jnp.eye(size, dtype=corner.dtype), lower=True
        )
        dense = lax.dynamic_slice_in_dim(w, start, size)
        length = jnp.searchsorted(ends, start)
        before = lax.switch(length, products, across, change)
        now = dense + jnp.matmul(inverse, before, precision=_HIGHEST)
        if nm is not None:
            mask = None
        elif chosen is not None:
            mask = lax.dynamic_slice_in_dim(chosen, start, size)
        else:
            real = lax.dynamic_slice_in_dim(is_row, start, size)
            scores = score(now, jnp.diagonal(corner), real)
            mask = _selection.best_of_tile(scores, keeps, structure, group)
        errors, mask = _eliminate(now, inverse, mask, nm)
        final = now - jnp.matmul(inverse, errors, precision=_HIGHEST)
        gone = dense - jnp.where(mask, final, 0)
        change = lax.dynamic_update_slice_in_dim(change, gone, start, 0)
        return change, (mask, jnp.sum(errors**2))

    steps = size * np.arange(tiles), kept
    change, (masks, losses) = lax.scan(prune_tile, jnp.zeros_like(w), steps)
    mask = masks.reshape(w.shape)
    return change[:rows], mask[:rows], jnp.sum(losses)


def _step(tiles: int) -> int:
    return -(-tiles // _LENGTHS)


def _product(end: int) -> Callable[[Array, Array], Array]:
    """The product with what changed in the first `end` rows: 0 in those not reached."""
    return lambda across, change: jnp.matmul(
        across[:, :end], change[:end], precision=_HIGHEST
    )


def _eliminate(
    now: Float[Array, "rows N"],
    inverse: Float[Array, "rows rows"],
    mask: Bool[Array, "rows N"] | None,
    nm: NM | None,
) -> tuple[Float[Array, "rows N"], Bool[Array, "rows N"]]:
    """The errors `e` of one tile: what pruning leaves to the rows that follow.

    Row by row, `e_i = (w_i - sum over j < i of inverse_ij e_j) / inverse_ii` where pruned,
    and 0 elsewhere. With `nm` there is no mask: that of every group is found when its first
    row is reached. Rows not reached have errors of 0, which spares every product its limits.
    """
    rows = now.shape[0]
    m = 1 if nm is None else nm.m
    strip = m * math.gcd(max(1, _STRIP // m), rows // m)

    def prune_strip(s, state):
        errors, keeps = state
        at = s * strip
        before = lax.dynamic_slice_in_dim(inverse, at, strip)
        square = lax.dynamic_slice_in_dim(before, at, strip, axis=1)
        values = lax.dynamic_slice_in_dim(now, at, strip)
        values = values - jnp.matmul(before, errors, precision=_HIGHEST)
        kept = lax.dynamic_slice_in_dim(keeps, at, strip)

        def prune_row(i, found, keep):
            earlier = jnp.sum(square[i][:, None] * found, axis=0)
            error = jnp.where(keep, 0, (values[i] - earlier) / square[i, i])
            return found.at[i].set(error)

        def prune_group(nm, g, state):
            found, kept = state
            i = g * m
            links = lax.dynamic_slice_in_dim(square, i, m)
            group = lax.dynamic_slice_in_dim(values, i, m)
            group = group - jnp.matmul(links, found, precision=_HIGHEST)
            scale = lax.dynamic_slice_in_dim(jnp.diagonal(square), i, m)
            scores = jnp.abs(group) / scale[:, None]
            keep = _selection.best_of_groups(scores, nm, stride=1)
            found = lax.fori_loop(
                0, m, lambda j, f: prune_row(i + j, f, keep[j]), found
            )
            return found, lax.dynamic_update_slice_in_dim(kept, keep, i, 0)

        found = jnp.zeros_like(values)
        if nm is not None:
            found, kept = lax.fori_loop(
                0, strip // m, functools.partial(prune_group, nm), (found, kept)
            )
            keeps = lax.dynamic_update_slice_in_dim(keeps, kept, at, 0)
        else:
            found = lax.fori_loop(
                0, strip, lambda i, f: prune_row(i, f, kept[i]), found
            )
        return lax.dynamic_update_slice_in_dim(errors, found, at, 0), keeps

    keeps = jnp.zeros_like(now, bool) if mask is None else mask
    return lax.fori_loop(0, rows // strip, prune_strip, (jnp.zeros_like(now), keeps))
