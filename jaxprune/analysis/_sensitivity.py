"""What pruning costs, leaf by leaf and for the whole: loss against sparsity."""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jaxprune import _prune, _tree, scores
from jaxprune._tree import PyTree
from jaxprune.allocation import Allocation
from jaxprune.structures import Structure, Unstructured


class Sensitivity(NamedTuple):
    """Losses of a model of which one leaf at a time is pruned.

    Attributes:
      sparsities: what was tried.
      dense: loss without pruning.
      losses: for each path, one a sparsity.
    """

    sparsities: tuple[float, ...]
    dense: float
    losses: Mapping[str, tuple[float, ...]]

    def __str__(self) -> str:
        """A table of losses, the most sensitive leaf first."""
        order = sorted(self.losses, key=lambda p: -self.losses[p][-1])
        width = max(len(p) for p in (*order, "dense"))
        head = "  ".join(f"{f'{100 * s:.4g}%':>9}" for s in self.sparsities)
        lines = [f"{'leaf':<{width}}  {head}"]
        for path in order:
            cells = "  ".join(f"{x:>9.4g}" for x in self.losses[path])
            lines.append(f"{path:<{width}}  {cells}")
        return "\n".join([*lines, f"{'dense':<{width}}  {self.dense:>9.4g}"])

    def plot(self, ax: Any = None) -> Any:
        """Draws a line a leaf; needs matplotlib. Returns the axes."""
        if ax is None:
            from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

            ax = pyplot.figure(layout="constrained").add_subplot()
        for path, losses in self.losses.items():
            ax.plot(self.sparsities, losses, marker=".", label=path)
        ax.axhline(self.dense, color="0.5", linestyle="--", label="dense")
        ax.set(xlabel="sparsity of the leaf", ylabel="loss")
        ax.legend(fontsize="small")
        return ax


def sensitivity(
    loss: Callable[[PyTree], Any],
    params: PyTree,
    sparsities: Sequence[float | Fraction] = (0.5, 0.7, 0.8, 0.9, 0.95),
    *,
    score: _prune.Score | PyTree = scores.magnitude,
    structure: Structure = Unstructured(),
    where: _tree.Where = None,
) -> Sensitivity:
    """Prunes one leaf at a time to each sparsity, and measures the loss.

    Args:
      loss: of parameters, on data of your choice; put it under `jit`.
      params: trained.
      sparsities: in rising order, each in [0, 1).
      score: elementwise score of a weight array, or a tree of scores.
      structure: what is kept or pruned as one.
      where: which leaves; see `jaxprune.prune`.

    Returns:
      Losses by path; `str` of it is a table, and `plot()` draws it.

    Raises:
      ValueError: if there is no sparsity, or one is outside [0, 1).

    Example:
      >>> params = {"up": jnp.array([[3.0, 1.0]]), "down": jnp.array([[1.0], [2.0]])}
      >>> def loss(params):
      ...     return jnp.sum((params["up"] @ params["down"] - 5) ** 2)
      >>> print(jp.analysis.sensitivity(loss, params, [0.5]))
      leaf         50%
      down           9
      up             4
      dense          0
    """
    if not sparsities:
        raise ValueError("sparsities: got none; expected some, such as (0.5, 0.9).")
    paths, leaves, _ = _tree.flatten(_tree.select(params, where))
    chosen = [p for p, x in zip(paths, leaves, strict=True) if not _tree.is_hole(x)]
    losses = {}
    for path in chosen:
        pruned = (
            _prune.prune(
                params, s, score=score, structure=structure,
                where=lambda p, x, path=path: p == path,
            )[0]
            for s in sparsities
        )  # fmt: skip
        losses[path] = tuple(float(loss(p)) for p in pruned)
    return Sensitivity(tuple(float(s) for s in sparsities), float(loss(params)), losses)


class Knee(NamedTuple):
    """Where a model begins to suffer from one-shot pruning.

    Attributes:
      sparsity: the largest tried up to which the measure stays within the tolerance.
      sparsities: all that were tried, 0 first.
      measures: one for each of them.
    """

    sparsity: float
    sparsities: tuple[float, ...]
    measures: tuple[float, ...]


def essential_sparsity(
    evaluate: Callable[[PyTree], Any],
    params: PyTree,
    sparsities: Sequence[float | Fraction] = tuple(
        Fraction(i, 20) for i in range(1, 20)
    ),
    *,
    tolerance: float = 0.01,
    score: _prune.Score | PyTree = scores.magnitude,
    structure: Structure = Unstructured(),
    allocation: Allocation = "global",
    where: _tree.Where = None,
) -> Knee:
    """The sparsity up to which one-shot magnitude pruning costs next to nothing.

    All sparsities are tried, and the answer is the last one before the first whose
    measure has dropped by more than the tolerance, relative to dense. The paper fine-tunes
    under each mask before it measures: do so in `evaluate`, which sees the pruned
    parameters. It gives no formula for the knee; a drop of 1 % is what others use.

    Args:
      evaluate: a measure of which more is better, such as accuracy; above 0 for dense.
      params: trained.
      sparsities: in rising order, each in [0, 1).
      tolerance: share of the dense measure that may be lost.
      score: elementwise score of a weight array, or a tree of scores.
      structure: what is kept or pruned as one. With `NM` there is one sparsity to try.
      allocation: how sparsity is divided among leaves; see `jaxprune.prune`.
      where: which leaves; see `jaxprune.prune`.

    Returns:
      The sparsity, and the whole curve.

    Raises:
      ValueError: if the dense measure is not above 0, or sparsities do not rise.

    Example:
      >>> params = {"kernel": jnp.array([[3.0, 1.0, 0.001, 0.0]])}
      >>> def evaluate(params):
      ...     return jnp.sum(params["kernel"])
      >>> jp.analysis.essential_sparsity(evaluate, params, [0.25, 0.5, 0.75]).sparsity
      0.5

    References:
      Jaiswal et al., The Emergence of Essential Sparsity in Large Pre-trained Models: The
      Weights that Matter, arXiv 2306.03805.
    """
    tried = [float(s) for s in sparsities]
    if not tried or tried != sorted(tried):
        raise ValueError(f"sparsities: got {tried}; expected some, in rising order.")
    dense = float(evaluate(params))
    if not dense > 0:
        raise ValueError(
            f"evaluate: gives {dense} for the dense parameters; expected a measure above "
            "0, of which more is better."
        )
    measures = [dense]
    for s in sparsities:
        pruned, _ = _prune.prune(
            params, s, score=score, structure=structure, allocation=allocation,
            where=where,
        )  # fmt: skip
        measures.append(float(evaluate(pruned)))
    fine = [m >= (1 - tolerance) * dense for m in measures]
    last = fine.index(False) - 1 if False in fine else len(tried)
    return Knee([0.0, *tried][last], (0.0, *tried), tuple(measures))
