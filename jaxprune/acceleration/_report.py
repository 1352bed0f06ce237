"""What was done with each masked leaf, and why: for people and for programs."""

from typing import NamedTuple


class Choice(NamedTuple):
    """What was chosen for a leaf.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      rows: of x in its products, in one call of the function.
      sparsity: share of its weights that the mask prunes.
      format: `"dense"`, or the blocks, `"Block(64, 64)"`.
      speedup: time of the dense product over that of the format that came nearest to
        paying; 0 if there was none.
      measured: whether that was timed here, not predicted.
      nbytes: bytes as packed, or of the dense leaf.
      dense_nbytes: bytes of the dense leaf.
      reason: why it was left dense; empty if it was not.
    """

    path: str
    shape: tuple[int, ...]
    rows: int
    sparsity: float
    format: str
    speedup: float
    measured: bool
    nbytes: int
    dense_nbytes: int
    reason: str

    @property
    def go(self) -> bool:
        """Whether the leaf was packed."""
        return self.format != "dense"


class Report(NamedTuple):
    """Choices for all masked leaves; `print(report)` shows a table."""

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        head = (
            "leaf", "shape", "rows", "sparsity", "format", "dense/fast", "bytes", "why"
        )  # fmt: skip
        lines = [head, *map(_line, self.choices)]
        held = sum(c.nbytes for c in self.choices)
        dense = sum(c.dense_nbytes for c in self.choices)
        packed = sum(c.go for c in self.choices)
        total = (
            f"{packed} of {len(self.choices)} masked leaves are packed; they hold "
            f"{held / max(dense, 1):.0%} of the dense bytes together with the others."
        )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [
            "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([*rows, total])


def _line(c: Choice) -> tuple[str, ...]:
    speedup = "-"
    if c.speedup:
        speedup = f"{c.speedup:.2f} {'measured' if c.measured else 'predicted'}"
    return (
        c.path, "x".join(map(str, c.shape)), str(c.rows), f"{c.sparsity:.1%}", c.format,
        speedup, f"{c.nbytes / c.dense_nbytes:.0%}", c.reason,
    )  # fmt: skip
