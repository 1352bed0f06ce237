"""What one-shot pruning did to each matrix: for people and for programs."""

from typing import NamedTuple


class Row(NamedTuple):
    """What was done to the matrices of one use of a leaf.

    Attributes:
      path: of the leaf.
      layer: of a leaf that a scan runs over, or `None`.
      block: in which it was pruned.
      shape: `(matrices, K, N)`.
      sparsity: share of the weights that are pruned.
      error: squared change of the outputs over their squares, `tr(dWᵀ G dW) / tr(Wᵀ G W)`,
        on the inputs that it was pruned with; NaN without a Gram matrix.
      damping: the largest, as a share of the mean of the Gram matrix's diagonal; NaN from
        a method that does not damp.
      seconds: for this leaf's solution.
    """

    path: str
    layer: int | None
    block: str
    shape: tuple[int, int, int]
    sparsity: float
    error: float
    damping: float
    seconds: float


class Report(NamedTuple):
    """A row for each use of each leaf; `print(report)` shows a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("leaf", "matrices", "sparsity", "error", "damping", "seconds")
        lines = [head, *map(_line, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _line(row: Row) -> tuple[str, ...]:
    count, k, n = row.shape
    return (
        row.path if row.layer is None else f"{row.path}[{row.layer}]",
        f"{k}x{n}" if count == 1 else f"{count} of {k}x{n}",
        f"{row.sparsity:.1%}",
        "-" if row.error != row.error else f"{row.error:.4f}",
        "-" if row.damping != row.damping else f"{row.damping:.3g}",
        f"{row.seconds:.2f}",
    )
