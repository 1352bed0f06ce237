"""Sparsities from what calibration says of blocks: outliers, or how little they change."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _tree
from jaxprune.allocation._allocate import Shapes, exact


def owl(
    shapes: Shapes,
    sparsity: float | Fraction,
    *,
    outliers: Mapping[str, float],
    limit: float | Fraction = 0.08,
) -> dict[str, Fraction]:
    """Outlier Weighed Layerwise sparsity: denser where more scores stand out.

    The density of a block is `2 λ (D - min D) / (max D - min D)`, moved by what makes the
    densities meet the budget `sum(density * size) = (1 - sparsity) * sum(size)` exactly,
    as fractions; for blocks of one size this is the paper's. A density that would pass 1
    stays there, and the others are moved again. Where all ratios are equal, for which the
    authors' code divides by 0, the sparsity is uniform.

    Args:
      shapes: of the leaves to prune, by path.
      sparsity: of the whole.
      outliers: the ratio `D` of each block, as `outlier_ratio` gives it, by a pattern on
        the paths of its leaves; the last that matches counts. In any unit.
      limit: `λ`; no sparsity is further than `2 λ` from another. 0.08 as the paper's for
        LLaMA.

    Raises:
      ValueError: if a pattern matches nothing, a leaf has no pattern, a ratio is not
        finite, or a leaf would lose everything.

    Example:
      >>> shapes = {"0/kernel": (8, 8), "1/kernel": (8, 8)}
      >>> jp.allocation.owl(shapes, 0.5, outliers={"0/*": 0.04, "1/*": 0.01}, limit=0.125)
      {'0/kernel': Fraction(3, 8), '1/kernel': Fraction(5, 8)}

    `functools.partial(jp.allocation.owl, outliers=...)` is an `allocation` for
    `jaxprune.prune`.

    References:
      Yin et al., Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for
      Pruning LLMs to High Sparsity, arXiv 2310.05175, and their code.
    """
    found = _by_leaf("outliers", outliers, shapes)
    least, most = min(found.values(), default=0), max(found.values(), default=0)
    span = most - least or Fraction(1)
    width = _positive("limit", limit, zero=True)
    raw = {p: 2 * width * (d - least) / span for p, d in found.items()}
    return _shifted(raw, shapes, exact(sparsity), "limit", limit)


def by_similarity(
    shapes: Shapes,
    sparsity: float | Fraction,
    *,
    similarities: Mapping[str, float],
    amplitude: float | Fraction = 0.05,
) -> dict[str, Fraction]:
    """Sparser where a block's output is more like its input: it does less.

    The importance of a block is minus its similarity, moved to a mean of 0 over the
    weights and scaled so that the largest in size is 1; its density is that of the whole
    plus `amplitude` times its importance. The budget is met exactly, as with `owl`. This
    is one step of Adapt-Pruner, which takes many, with training between them, from
    cosine similarities; its amplitude is not given for a single step, and ours is a
    guess. ShortGPT removes whole blocks by the same measure.

    Args:
      shapes: of the leaves to prune, by path.
      sparsity: of the whole.
      similarities: of the input and output of each block, as
        `jaxprune.calibration.similarity` gives them, by a
        pattern on the paths of its leaves; the last that matches counts.
      amplitude: the largest distance from the sparsity of the whole.

    Raises:
      ValueError: as `owl`.

    Example:
      >>> shapes = {"0/kernel": (8, 8), "1/kernel": (8, 8)}
      >>> found = jp.allocation.by_similarity(
      ...     shapes, 0.5, similarities={"0/*": 0.75, "1/*": 0.25}, amplitude=0.125
      ... )
      >>> found
      {'0/kernel': Fraction(5, 8), '1/kernel': Fraction(3, 8)}

    References:
      Wang et al., Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language
      Model Training, arXiv 2502.03460; Men et al., ShortGPT, arXiv 2403.03853.
    """
    found = _by_leaf("similarities", similarities, shapes)
    sizes = {p: math.prod(s) for p, s in shapes.items()}
    total = sum(sizes.values()) or 1
    mean = sum(found[p] * sizes[p] for p in found) / Fraction(total)
    most = max((abs(s - mean) for s in found.values()), default=0) or Fraction(1)
    width = _positive("amplitude", amplitude, zero=True)
    raw = {p: width * (mean - s) / most for p, s in found.items()}
    return _shifted(raw, shapes, exact(sparsity), "amplitude", amplitude)


def outlier_ratio(scores: Any, *, multiple: float = 5.0) -> Float[Array, ""]:
    """The share of scores above `multiple` times their mean, of all matrices of a block.

    Args:
      scores: a tree of scores of one block, as `jaxprune.scores.wanda` gives them.
      multiple: `M`; 5 as in the authors' commands for LLaMA.

    Returns:
      A share in [0, 1], float32. The authors give it in percent, which `owl` makes no
      difference of.

    Raises:
      ValueError: if there is no score, or `multiple` is not above 0.

    Example:
      >>> jp.allocation.outlier_ratio({"kernel": jnp.array([[1.0, 1, 1, 1, 1, 1, 1, 21]])})
      Array(0.125, dtype=float32)

    References:
      Yin et al., arXiv 2310.05175 (Layerwise Outlier Distribution).
    """
    _positive("multiple", multiple)
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(scores)]
    size = sum(x.size for x in leaves)
    if not size:
        raise ValueError(
            "scores: got no score; expected the scores of the matrices of one block."
        )
    # Shares, not sums: a sum of ones ends at 2**24.
    mean = sum(_mean(x) * (x.size / size) for x in leaves)
    return sum(
        (_mean(x > multiple * mean) * (x.size / size) for x in leaves), jnp.float32(0)
    )


def _mean(x: Array) -> Array:
    """Axis by axis, so that no sum passes what float32 counts."""
    x = x.astype(jnp.float32)
    while x.ndim:
        x = jnp.mean(x, axis=-1)
    return x


def _by_leaf(
    name: str, table: Mapping[str, float], shapes: Shapes
) -> dict[str, Fraction]:
    """The number of each leaf, exactly; raises where there is none."""
    _tree.check_patterns(list(shapes), table, name=name)
    found = {p: _tree.lookup(p, table) for p in shapes}
    if missing := [p for p, x in found.items() if x is None]:
        raise ValueError(
            f"{name}: no pattern of {list(table)} matches {_tree.listing(missing)}. Give a "
            "number for every leaf that is pruned, or leave it out with where=."
        )
    out = {}
    for path, x in found.items():
        number = float(np.asarray(x))
        if not math.isfinite(number):
            raise ValueError(
                f"{name}: got {number} for {path}; expected a finite number. Check the "
                "calibration batches."
            )
        out[path] = Fraction(number)
    return out


def _positive(name: str, value: float | Fraction, *, zero: bool = False) -> Fraction:
    number = float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        wanted = "of 0 or more" if zero else "above 0"
        raise ValueError(f"{name}: got {value}; expected a finite number {wanted}.")
    return value if isinstance(value, Fraction) else Fraction(str(number))


def _shifted(
    raw: Mapping[str, Fraction],
    shapes: Shapes,
    sparsity: Fraction,
    name: str,
    value: float | Fraction,
) -> dict[str, Fraction]:
    """Densities `raw` plus a constant, at most 1, that meet the budget exactly."""
    sizes = {p: math.prod(s) for p, s in shapes.items()}
    dense: set[str] = set()
    shift = Fraction(0)
    while free := [p for p in raw if p not in dense and sizes[p]]:
        left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[p] for p in dense)
        weight = sum(sizes[p] for p in free)
        shift = (left - sum(raw[p] * sizes[p] for p in free)) / Fraction(weight)
        over = [p for p in free if raw[p] + shift > 1]
        if not over:
            break
        # The largest first, and those equal to it: the others may fall back under 1.
        most = max(raw[p] for p in over)
        dense |= {p for p in over if raw[p] == most}
    found = {
        p: Fraction(0) if p in dense or not sizes[p] else 1 - raw[p] - shift
        for p in raw
    }
    if gone := [p for p, s in found.items() if s >= 1]:
        raise ValueError(
            f"{name}: {value} with sparsity {float(sparsity)} would leave nothing of "
            f"{_tree.listing(gone)}. Give a smaller {name}, or a lower sparsity."
        )
    return found
