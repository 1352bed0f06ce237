"""SparseGPT: prune input by input, and let the inputs to come make up for it.

Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv 2301.00774.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxprune import _select
from jaxprune.posttrain import _hessian, _selection, _solver
from jaxprune.posttrain._solver import Group, Solver
from jaxprune.structures import NM, Structure

_STRIP = 16  # rows pruned one by one before a product takes them to the next ones
_SEGMENTS = 8  # products of this many lengths are compiled, whatever the size of K
_HIGHEST = lax.Precision.HIGHEST


def sparsegpt(
    *, group: Group = "block", block_size: int = 128, damping: float = 0.01
) -> Solver:
    """SparseGPT."""
    _solver.check_group("sparsegpt", group, ("block", "output", "layer"))
    _solver.check_damping("sparsegpt", damping)
    return _solver.solver(
        "sparsegpt", ("gram",), _sparsegpt,
        group=group, block_size=block_size, damping=damping,
    )  # fmt: skip


def _sparsegpt(
    w, inputs, *, sparsity: Fraction, structure: Structure, group, block_size, damping
):
    order = _selection.group_order(structure, w.shape[0])
    gram = inputs.gram
    if order is not None:
        w, gram = w[order], gram[order][:, order]
    new, mask, loss, used = prune_rows(
        w, gram, sparsity=sparsity, structure=structure,
        group=group, block_size=block_size, damping=damping,
    )  # fmt: skip
    if order is not None:
        back = np.argsort(order)
        new, mask = new[back], mask[back]
    return new, mask, loss, used


def prune_rows(w, gram, *, sparsity, structure, group, block_size, damping):
    hessian = _hessian.factor(gram, damping)
    w = jnp.where(hessian.dead[:, None], 0, w)
    rows, columns = w.shape
    tile = _tile(rows, structure, block_size)
    kept = np.asarray(_selection.kept_in_tiles(w.shape, tile, sparsity, structure, group))
    whole = None
    if group == "layer" and not isinstance(structure, NM):
        scores = (w * hessian.diagonal[:, None]) ** 2
        whole = _selection.best(scores, sparsity, structure, group)

    def prune_tiles(change, first, count, size):
        """Prunes `count` tiles of `size` rows; gives what changed, masks and loss."""
        ends = np.minimum(rows, first + size * _ends(count))

        def carry_over(change, start):
            """What rows above change in the rows of a tile, before they are scaled."""
            def product(end):
                def f(change, start):
                    upper = lax.dynamic_slice(hessian.upper, (0, start), (end, size))
                    return jnp.matmul(upper.T, change[:end], precision=_HIGHEST)
                return f
            which = jnp.searchsorted(ends, start)
            return lax.switch(which, [product(int(e)) for e in ends], change, start)

        def prune_tile(change, step):
            start, keeps = step
            square = lax.dynamic_slice(hessian.upper, (start, start), (size, size))
            inverse = jax.scipy.linalg.solve_triangular(square, jnp.eye(size))  # of upper
            dense = lax.dynamic_slice_in_dim(w, start, size)
            carried = carry_over(change, start)
            now = dense + jnp.matmul(inverse.T, carried, precision=_HIGHEST)
            if whole is not None:
                mask = lax.dynamic_slice_in_dim(whole, start, size)
            elif isinstance(structure, NM):
                mask = None
            else:
                scores = (now * jnp.diagonal(square)[:, None]) ** 2
                mask = _selection.best_of_tile(scores, keeps, structure, group)
            errors, mask = _eliminate(now, inverse, mask, structure)
            final = now - jnp.matmul(inverse.T, errors, precision=_HIGHEST)
            final = jnp.where(mask, final, 0)
            change = lax.dynamic_update_slice_in_dim(change, dense - final, start, 0)
            return change, (mask, jnp.sum(errors**2))
        i = first // tile
        steps = (first + size * np.arange(count), kept[i : i + count])
        change, (mask, loss) = lax.scan(prune_tile, change, steps)
        return change, mask.reshape(count * size, columns), jnp.sum(loss)

    change = jnp.zeros_like(w)
    masks, losses = [], []
    for run in _runs(rows, tile):
        change, mask, loss = prune_tiles(change, *run)
        masks.append(mask)
        losses.append(loss)
    mask = jnp.concatenate(masks)
    new = jnp.where(mask, w - change, 0)
    return new, mask, sum(losses), hessian.damping


def _eliminate(now, inverse, mask, structure):
    size, columns = now.shape
    m = structure.m if isinstance(structure, NM) else 1
    strip = m * max(1, _STRIP // m)
    if size % strip:
        strip = m if size % m == 0 and m > 1 else int(np.gcd(size, _STRIP))
    diagonal = 1 / jnp.diagonal(inverse)

    def strip_errors(s, state):
        errors, mask = state
        at = s * strip
        above = lax.dynamic_slice(inverse, (0, at), (size, strip))
        part = lax.dynamic_slice_in_dim(now, at, strip)
        part = part - jnp.matmul(above.T, errors, precision=_HIGHEST)
        square = lax.dynamic_slice(above, (at, 0), (strip, strip))
        scale = lax.dynamic_slice_in_dim(diagonal, at, strip)

        def row_error(i, found, keep):
            before = jnp.sum(square[:, i][:, None] * found, axis=0)
            error = jnp.where(keep, 0, (part[i] - before) * scale[i])
            return found.at[i].set(error)

        found = jnp.zeros_like(part)
        if mask_known:
            kept = lax.dynamic_slice_in_dim(mask, at, strip)
            found = lax.fori_loop(0, strip, lambda i, f: row_error(i, f, kept[i]), found)
        else:
            def group(g, state):
                found, kept = state
                rows = lax.dynamic_slice_in_dim(part, g * m, m)
                cols = lax.dynamic_slice_in_dim(square, g * m, m, axis=1)
                rows = rows - jnp.matmul(cols.T, found, precision=_HIGHEST)
                score = (rows * lax.dynamic_slice_in_dim(scale, g * m, m)[:, None]) ** 2
                keep = NM(structure.n, m).best("", score)
                found = lax.fori_loop(
                    0, m, lambda i, f: row_error(g * m + i, f, keep[i]), found)
                return found, lax.dynamic_update_slice_in_dim(kept, keep, g * m, 0)
            found, kept = lax.fori_loop(0, strip // m, group, (found, jnp.zeros(part.shape, bool)))
            mask = lax.dynamic_update_slice_in_dim(mask, kept, at, 0)
        errors = lax.dynamic_update_slice_in_dim(errors, found, at, 0)
        return errors, mask

    mask_known = mask is not None
    if mask is None:
        mask = jnp.zeros(now.shape, bool)
    return lax.fori_loop(0, size // strip, strip_errors, (jnp.zeros_like(now), mask))


def _tile(rows, structure, block_size):
    if isinstance(structure, NM):
        return min(rows, max(structure.m, block_size // structure.m * structure.m))
    return min(rows, block_size)


def _ends(count):
    step = -(-count // _SEGMENTS)
    return np.arange(0, count + step - 1, step)

def _runs(rows, tile):
    """First row, number of tiles and their size."""
    tiles = rows // tile
    found = [(0, tiles, tile)]
    if rows % tile:
        found.append((tiles * tile, 1, rows % tile))
    return found
