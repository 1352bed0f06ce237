"""What was done with each masked leaf, and why: for people and for programs."""

import math
from typing import Literal, NamedTuple, TypeAlias

Basis: TypeAlias = Literal["measured", "predicted", "predicted, not timed", ""]


class Candidate(NamedTuple):
    """A format that a leaf could have.

    Attributes:
      format: `"dense"`, `"Block(64, 64)"`, `"NM(2, 4)"` or `"Bitmap"`.
      nbytes: bytes of the leaf in this format.
      seconds: of all products with the leaf in one call; NaN where it is not known.
      reason: why it was not chosen; empty if it was.
    """

    format: str
    nbytes: int
    seconds: float
    reason: str


class Choice(NamedTuple):
    """What was chosen for a leaf.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      rows: of x in its products, in one call of the function.
      sparsity: share of its weights that the mask prunes.
      format: that of the candidate that was chosen.
      speedup: time of the dense products over that of the chosen format or, where the leaf
        is dense, of the fastest other candidate; 0 if no time is known.
      basis: of the times. `"measured"`: timed here. `"predicted"`: by a model that was
        set with timings on such a device. `"predicted, not timed"`: by a model that
        nobody has held against the device.
      nbytes: bytes as packed, or of the dense leaf.
      dense_nbytes: bytes of the dense leaf.
      reason: why it was left dense; empty if it was not.
      candidates: all formats that its mask allows, dense first. Empty where none was
        looked for.
    """

    path: str
    shape: tuple[int, ...]
    rows: int
    sparsity: float
    format: str
    speedup: float
    basis: Basis
    nbytes: int
    dense_nbytes: int
    reason: str
    candidates: tuple[Candidate, ...] = ()

    @property
    def go(self) -> bool:
        """Whether the leaf was packed."""
        return self.format != "dense"


class Report(NamedTuple):
    """Choices for all masked leaves.

    `print(report)` shows a table, a line for each leaf; `print(report.details())` one
    with all candidates.
    """

    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        head = (
            "leaf", "shape", "rows", "sparsity", "format", "dense/fast", "bytes", "why"
        )  # fmt: skip
        held = sum(c.nbytes for c in self.choices)
        dense = sum(c.dense_nbytes for c in self.choices)
        packed = sum(c.go for c in self.choices)
        total = (
            f"{packed} of {len(self.choices)} masked leaves are packed; they hold "
            f"{held / max(dense, 1):.0%} of the dense bytes together with the others."
        )
        return f"{_table([head, *map(_line, self.choices)])}\n{total}"

    def details(self) -> str:
        """The table of all candidates, with the time of each and why it was not chosen."""
        lines = [("leaf", "format", "ms", "dense/fast", "bytes", "why not")]
        for choice in self.choices:
            for candidate in choice.candidates:
                ratio = choice.candidates[0].seconds / candidate.seconds
                lines.append(
                    (
                        choice.path,
                        candidate.format,
                        _number(candidate.seconds * 1e3),
                        _number(ratio),
                        _share(candidate.nbytes, choice.dense_nbytes),
                        candidate.reason or "chosen",
                    )
                )
        return _table(lines)


def _line(c: Choice) -> tuple[str, ...]:
    speedup = f"{c.speedup:.2f} {c.basis}" if c.speedup else "-"
    return (
        c.path, "x".join(map(str, c.shape)), str(c.rows), f"{c.sparsity:.1%}", c.format,
        speedup, _share(c.nbytes, c.dense_nbytes), c.reason,
    )  # fmt: skip


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.3g}"


def _share(nbytes: int, dense: int) -> str:
    return f"{nbytes / max(dense, 1):.0%}"
