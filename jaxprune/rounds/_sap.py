"""SAP: rounds whose rate follows the PQ Index (Diao et al., arXiv 2302.05601)."""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxprune import _prune, _select, _tree, _wide, analysis
from jaxprune import masks as mask_trees
from jaxprune._tree import PyTree
from jaxprune.rounds._loop import Rounds, Train, run


def sap(
    train: Train,
    params: PyTree,
    *,
    rounds: int,
    p: float = 0.5,
    q: float = 1.0,
    eta: float = 0.0,
    gamma: float = 1.0,
    beta: float = 0.9,
    scope: Literal["global", "leaf", "neuron"] = "global",
    rewind: int | None = 0,
    where: _tree.Where = None,
    directory: str | os.PathLike[str] | None = None,
) -> Rounds:
    """Sparsity-informed adaptive pruning: the sparser the weights are, the more goes.

    Each round measures the PQ Index `I` of the `d` weights that are left, from which at
    least `r = d (1 + eta)**(-q / (q - p)) (1 - I)**(p q / (q - p))` are to stay, and prunes
    the `floor(d min(gamma (1 - ceil(r) / d), beta))` smallest. The authors take masks from
    the checkpoint of the best test accuracy; here they come from the end of each round.

    Args:
      train: trains parameters under masks; see `Train`.
      params: at initialisation.
      rounds: how many, after a dense one.
      p: norm of the index, 0 < p < q.
      q: norm of the index.
      eta: slack of the bound, at least 0; more prunes more.
      gamma: scale of the share that goes, above 0.
      beta: largest share of a round.
      scope: what has an index and a rate of its own: all leaves together, each leaf, or
        each neuron (a slice of the last axis).
      rewind: step that each round starts from again; `None` trains on.
      where: which leaves may be pruned; see `jaxprune.prune`.
      directory: each round is saved here; see `imp`.

    Returns:
      The last round's parameters and masks; see `Rounds`.

    Raises:
      ValueError: if a value is out of range.

    Example:
      >>> def train(params, masks, *, start, stop):
      ...     return jp.masks.apply(params, masks)  # and train
      >>> params = {"kernel": jnp.array([[100.0, -1.0], [0.5, 0.25]])}
      >>> jp.rounds.sap(train, params, rounds=2).sparsities
      (0.0, 0.5, 0.5)

    References:
      Diao et al., Pruning Deep Neural Networks from a Sparsity Perspective,
      arXiv 2302.05601, Eq. (2), Theorem 2 and Algorithm 1.
    """
    _prune.require(
        "p, q", (p, q), lambda x: 0 < x[0] < x[1], "0 < p < q, such as 0.5 and 1"
    )
    _prune.require("eta", eta, lambda x: 0 <= x < math.inf, "at least 0")
    _prune.require("gamma", gamma, lambda x: 0 < x < math.inf, "a scale above 0")
    _prune.require("beta", beta, lambda x: 0 < x < 1, "a share in (0, 1), such as 0.9")
    if scope not in ("global", "leaf", "neuron"):
        raise ValueError(
            f"scope: got {scope!r}; expected 'global', 'leaf' or 'neuron'."
        )

    def stays(w: PyTree, mask: PyTree) -> int:
        """How many of the weights that are left stay."""
        left = mask_trees.count(mask).kept
        index = float(analysis.pq_index(w, mask, p=p, q=q))
        if math.isnan(index):
            raise ValueError(
                "train: gives weights that are NaN or infinite, whose PQ Index is none."
            )
        bound = left * (1 + eta) ** (-q / (q - p)) * (1 - index) ** (p * q / (q - p))
        # As fractions: rounded products would prune one too few now and then.
        goes = Fraction(str(gamma)) * max(left - math.ceil(bound), 0)
        return left - math.floor(min(goes, Fraction(str(beta)) * left))

    def choose(found: PyTree, masks: PyTree, number: int) -> PyTree:
        del number
        _, holed, treedef = _tree.flatten(masks)
        kept = [m for m in holed if not _tree.is_hole(m)]
        leaves = treedef.flatten_up_to(found)
        weights = [
            w for w, m in zip(leaves, holed, strict=True) if not _tree.is_hole(m)
        ]
        new = iter(_smallest_go(weights, kept, stays, scope))
        return treedef.unflatten([m if _tree.is_hole(m) else next(new) for m in holed])

    return run(
        train, params, choose,
        rounds=rounds, rewind=rewind, where=where, directory=directory,
        settings={"p": p, "q": q, "eta": eta, "gamma": gamma, "beta": beta, "scope": scope},
    )  # fmt: skip


def _smallest_go(
    weights: Sequence[Array], masks: Sequence[Array], stays, scope: str
) -> list[Bool[Array, "..."]]:
    scores = [jnp.where(m, jnp.abs(w), -1) for w, m in zip(weights, masks, strict=True)]
    if scope == "global":
        wanted = [stays(list(weights), list(masks))]
        return _best(scores, wanted, [0] * len(scores))
    if scope == "leaf":
        wanted = [stays(w, m) for w, m in zip(weights, masks, strict=True)]
        return _best(scores, wanted, list(range(len(scores))))
    out = []
    for w, m, s in zip(weights, masks, scores, strict=True):
        columns = [x.reshape(-1, x.shape[-1]).T for x in (w, m, s)]
        counts = [stays(a, b) for a, b in zip(columns[0], columns[1], strict=True)]
        best = jax.vmap(lambda x, k: _best([x], [k], [0])[0])
        kept = best(columns[2], _wide.from_ints(counts))
        out.append(kept.T.reshape(w.shape))
    return out


def _best(scores, wanted, groups) -> list[Bool[Array, "..."]]:
    kept = [k if isinstance(k, _wide.Wide) else _wide.from_int(k) for k in wanted]
    cuts = _select.cuts([_select.stored(s) for s in scores], kept, groups)
    return [_select.keep(s, cut) for s, cut in zip(scores, cuts, strict=True)]
