"""N:M with another N for each leaf."""

import bisect
import itertools
import math
import numbers
from fractions import Fraction

from jaxprune import _tree
from jaxprune.allocation._allocate import Shapes, Sparsities, exact
from jaxprune.structures import NM


def mixed_nm(shapes: Shapes, sparsities: Sparsities, *, m: int = 8) -> dict[str, NM]:
    """N:M in which each leaf has an N next to its own sparsity.

    The densities, in groups of M, are rounded up where their fraction reaches a threshold,
    which is the same for all and such that the whole keeps as nearly as can be what
    `sparsities` keep; leaves of one sparsity get one N. N is from 1 to M - 1: what is denser
    or sparser than that gets the last one.

    Args:
      shapes: of the leaves to prune, by path.
      sparsities: of each, as `owl` gives them; above 0.
      m: size of the groups, 2 or more.

    Raises:
      ValueError: if `m` is below 2, a leaf has no sparsity, or one is outside (0, 1).

    Example:
      >>> shapes = {"0/kernel": (8, 8), "1/kernel": (8, 8)}
      >>> found = jp.allocation.mixed_nm(shapes, {"0/kernel": 0.3, "1/kernel": 0.7})
      >>> found["0/kernel"].n, found["1/kernel"].n
      (6, 2)

    As the `structure` of `jaxprune.posttrain.prune`, which gives it what the `allocation`
    finds: `functools.partial(jp.allocation.mixed_nm, m=8)`.

    References:
      Yin et al., arXiv 2310.05175, mixed N:M sparsity, after Sun et al., DominoSearch
      (NeurIPS 2021). The authors' code rounds each layer by itself, so that the whole may
      keep more or less than was asked for; their `Lamda` of 2 is a `limit` of 1/M of `owl`.
    """
    if not isinstance(m, numbers.Integral) or m < 2:
        raise ValueError(
            f"m: got {m!r}; expected a whole number of 2 or more, such as 8."
        )
    if missing := sorted(set(shapes) - set(sparsities)):
        raise ValueError(
            f"sparsities: nothing for {_tree.listing(missing)}; expected a sparsity of every "
            "leaf, as an allocation gives them."
        )
    found = {p: exact(sparsities[p], f"sparsities of {p}") for p in shapes}
    if dense := sorted(p for p, x in found.items() if x == 0):
        raise ValueError(
            f"sparsities: got 0 for {_tree.listing(dense)}, of which N:M would prune 1/{m} at "
            "least. Leave them out with where=, or give them a sparsity above 0."
        )
    kept = {p: m * (1 - x) for p, x in found.items()}
    sizes = {p: math.prod(shape) for p, shape in shapes.items()}
    least = _threshold(kept, sizes, m)
    return {p: NM(_rounded(n, least, m), m) for p, n in kept.items()}


def _rounded(n: Fraction, least: Fraction, m: int) -> int:
    """Up where the fraction is `least` or more."""
    return min(max(math.floor(n) + (n % 1 >= least), 1), m - 1)


def _threshold(kept: dict[str, Fraction], sizes: dict[str, int], m: int) -> Fraction:
    """Least fraction that is rounded up; the next to a half of those that are as good."""
    fractions = sorted({n % 1 for n in kept.values()} - {Fraction(0)}, reverse=True)
    choices = [Fraction(1), *fractions]  # from nothing up to all
    gains = dict.fromkeys(choices, 0)
    for p, n in kept.items():
        if n % 1:
            up = _rounded(n, Fraction(0), m) - _rounded(n, Fraction(1), m)
            gains[n % 1] += up * sizes[p]
    down = sum(_rounded(n, Fraction(1), m) * sizes[p] for p, n in kept.items())
    wanted = sum((n * sizes[p] for p, n in kept.items()), Fraction(0))
    totals = itertools.accumulate(gains.values(), initial=down)
    misses = [abs(x - wanted) for x in list(totals)[1:]]
    # Which of the choices rounds each to what is nearest.
    nearest = bisect.bisect_right(choices, Fraction(-1, 2), key=lambda x: -x) - 1
    best = min(range(len(choices)), key=lambda i: (misses[i], abs(i - nearest)))
    return choices[best]
