"""SET: sparse evolutionary training (Mocanu et al., arXiv 1707.04780)."""

from fractions import Fraction

from jaxtyping import Array, Key

from jaxprune import scores
from jaxprune.allocation import Allocation
from jaxprune.structures import Structure, Unstructured
from jaxprune.training import _target
from jaxprune.training._method import Method
from jaxprune.training._prune_grow import regrowing


def set_(
    sparsity: float | Fraction | None = None,
    *,
    key: Key[Array, ""],
    begin: int = 0,
    end: int | None = None,
    every: int = 100,
    drop: float = 0.3,
    structure: Structure = Unstructured(),
    allocation: Allocation = "erk",
) -> Method:
    """Sparse evolutionary training: drops small weights, grows others at random.

    Differences from the paper: an update every `every` steps instead of at each epoch's
    end; the smallest magnitudes go, not the smallest positive and the largest negative
    weights; the share exchanged falls on a cosine if `end` is given; new weights start
    from 0, not from a normal draw.

    Args:
      sparsity: share of the weights to prune, constant; may be left out with `NM`.
      key: draws the initial masks, and what grows.
      begin: step of the first exchange. At step 0 the weights are as they were given, so that
        those grown then keep their values, unless training begins from
        `jaxprune.sparse_params(params, state)`.
      end: step of the last one, at which the share has fallen to 0 on half a cosine.
        `None` goes on at the same share for good.
      every: steps between exchanges.
      drop: share of the active weights of each leaf that is exchanged.
      structure: what is kept or pruned as one.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.

    Raises:
      ValueError: if a value is out of range.
      TypeError: if `key` is no key.

    Example:
      >>> method = jp.set_(0.9, key=jax.random.key(0), end=7500)

    References:
      Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity inspired by Network Science, arXiv 1707.04780, Algorithm 1.
    """
    target = _target.fixed(
        sparsity, structure, allocation, begin=begin, end=end, every=every
    )
    return regrowing(target, key, drop, _same, lambda g, key: scores.random(g, key=key))


def _same(x: Array) -> Array:
    return x
