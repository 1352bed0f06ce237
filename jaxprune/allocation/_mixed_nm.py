"""N:M with another N for each leaf."""

import math
from fractions import Fraction

from jaxprune import _tree
from jaxprune.allocation._allocate import Shapes, Sparsities, exact
from jaxprune.structures import NM


def mixed_nm(shapes: Shapes, sparsities: Sparsities, *, m: int = 8) -> dict[str, NM]:
    """N:M in which each leaf has the N that is nearest to its sparsity.

    All densities are moved by one number before they are rounded, so that the whole keeps
    as nearly what `sparsities` keep as that can give; leaves of one sparsity get one N.

    Args:
      shapes: of the leaves to prune, by path.
      sparsities: of each, as `owl` gives them.
      m: size of the groups, 2 or more. N is from 1 to `m - 1`.

    Raises:
      ValueError: if `m` is below 2, a leaf has no sparsity, or one is outside [0, 1).

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
      keep more or less than was asked for; their `Lamda` of 2 is a `limit` of 1/8 of `owl`.
    """
    if m < 2:
        raise ValueError(f"m: got {m}; expected 2 or more, such as 8.")
    if missing := sorted(set(shapes) - set(sparsities)):
        raise ValueError(
            f"sparsities: nothing for {_tree.listing(missing)}; expected a sparsity of every "
            "leaf, as an allocation gives them."
        )
    sizes = {p: math.prod(shape) for p, shape in shapes.items()}
    kept = {p: m * (1 - exact(sparsities[p], f"sparsities of {p}")) for p in shapes}
    wanted = sum((kept[p] * sizes[p] for p in shapes), Fraction(0))

    def rounded(shift: Fraction) -> dict[str, int]:
        return {p: min(max(math.floor(n + shift), 1), m - 1) for p, n in kept.items()}

    def miss(shift: Fraction) -> tuple[Fraction, Fraction]:
        total = sum(n * sizes[p] for p, n in rounded(shift).items())
        return abs(total - wanted), abs(shift - half)

    half = Fraction(1, 2)  # which is to round each by itself
    steps = {n - x for x in set(kept.values()) for n in range(1, m)}
    best = rounded(min(sorted({half, *steps}), key=miss))
    return {p: NM(n, m) for p, n in best.items()}
