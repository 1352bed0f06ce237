"""SparseGPT: prune input by input, and let the inputs to come make up for it.

Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot, arXiv 2301.00774.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

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
        scores = (w * jnp.diagonal(hessian.lower)[:, None]) ** 2
        whole = _selection.best(scores, sparsity, structure, group)

    def prune_tiles(change, first, count, size):
        """Prunes `count` tiles of `size` rows; gives what changed, masks and loss."""
        ends = np.minimum(rows, first + size * _ends(count))

        def prune_tile(change, step):
            start, keeps = step
            across = lax.dynamic_slice_in_dim(hessian.lower, start, size)  # [size, K]
            corner = lax.dynamic_slice_in_dim(across, start, size, axis=1)
            inverse = jax.scipy.linalg.solve_triangular(corner, jnp.eye(size), lower=True)
            dense = lax.dynamic_slice_in_dim(w, start, size)
            carried = lax.switch(
                jnp.searchsorted(ends, start), [product(int(e)) for e in ends], across, change)
            now = dense + jnp.matmul(inverse, carried, precision=_HIGHEST)
            if whole is not None:
                mask = lax.dynamic_slice_in_dim(whole, start, size)
            elif isinstance(structure, NM):
                mask = None
            else:
                scores = (now * jnp.diagonal(corner)[:, None]) ** 2
                mask = _selection.best_of_tile(scores, keeps, structure, group)
            errors, mask = _eliminate(now, inverse, mask, structure)
            final = now - jnp.matmul(inverse, errors, precision=_HIGHEST)
            final = jnp.where(mask, final, 0)
            change = lax.dynamic_update_slice_in_dim(change, dense - final, start, 0)
            return change, (mask, jnp.sum(errors**2))

        def product(end):
            def f(across, change):
                return jnp.matmul(across[:, :end], change[:end], precision=_HIGHEST)
            return f

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
    return new, mask, sum(losses) - hessian.added * jnp.sum(jnp.square(change)), hessian.damping


def _eliminate(
    now: Float[Array, "rows N"],
    inverse: Float[Array, "rows rows"],
    mask: Bool[Array, "rows N"] | None,
    structure: Structure,
) -> tuple[Float[Array, "rows N"], Bool[Array, "rows N"]]:
    """The errors `e` of one tile: what pruning leaves to the rows that follow.

    Row by row: `e = (w - sum of U e before) / U_ii` where pruned, and 0 elsewhere. Without
    a mask, that of every N:M group is found when its first row is reached.
    """
    rows = now.shape[0]
    m = structure.m if mask is None else 1
    strip = m * math.gcd(max(1, _STRIP // m), rows // m)
    keeps = jnp.zeros(now.shape, bool) if mask is None else mask

    def prune_strip(s, state):
        errors, keeps = state
        at = s * strip
        before = lax.dynamic_slice_in_dim(inverse, at, strip)
        part = lax.dynamic_slice_in_dim(now, at, strip)
        part = part - jnp.matmul(before, errors, precision=_HIGHEST)
        square = lax.dynamic_slice_in_dim(before, at, strip, axis=1)
        kept = lax.dynamic_slice_in_dim(keeps, at, strip)

        def prune_row(i, found, keep):
            before = jnp.sum(square[i][:, None] * found, axis=0)
            error = jnp.where(keep, 0, (part[i] - before) / square[i, i])
            return found.at[i].set(error)

        def prune_group(g, state):
            found, kept = state
            i = g * m
            links = lax.dynamic_slice_in_dim(square, i, m)
            values = lax.dynamic_slice_in_dim(part, i, m)
            values = values - jnp.matmul(links, found, precision=_HIGHEST)
            scale = lax.dynamic_slice_in_dim(jnp.diagonal(square), i, m)
            keep = _best_rows(jnp.abs(values) / scale[:, None], structure.n)
            found = lax.fori_loop(0, m, lambda j, f: prune_row(i + j, f, keep[j]), found)
            return found, lax.dynamic_update_slice_in_dim(kept, keep, i, 0)

        found = jnp.zeros_like(part)
        if mask is None:
            found, kept = lax.fori_loop(0, strip // m, prune_group, (found, kept))
            keeps = lax.dynamic_update_slice_in_dim(keeps, kept, at, 0)
        else:
            found = lax.fori_loop(0, strip, lambda i, f: prune_row(i, f, kept[i]), found)
        return lax.dynamic_update_slice_in_dim(errors, found, at, 0), keeps

    return lax.fori_loop(0, rows // strip, prune_strip, (jnp.zeros_like(now), keeps))


def _best_rows(scores: Float[Array, "m N"], n: int) -> Bool[Array, "m N"]:
    """The best `n` rows of each column; ties go to the lower row."""
    m = scores.shape[0]
    if m > 8:
        return NM(n, m).best("", scores)
    keep = []  # row by row, which vectorises
    for i in range(m):
        wins = [scores[j] >= scores[i] if j < i else scores[j] > scores[i] for j in range(m) if j != i]
        keep.append(sum(x.astype(jnp.uint8) for x in wins) < n)
    return jnp.stack(keep)


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
