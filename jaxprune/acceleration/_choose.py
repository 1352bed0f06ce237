"""Chooses a format for a leaf, out of those that its mask allows."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxprune.acceleration._packing import Packing
from jaxprune.acceleration._report import Basis, Candidate, Choice
from jaxprune.acceleration._sites import Site

Prefer: TypeAlias = Literal["speed", "memory"]

_WORTH = 1.1  # speedup from which a leaf is packed


class Aim(NamedTuple):
    """What a format has to do to be chosen.

    Attributes:
      prefer: the fastest format if it is faster than dense, or the smallest that is not
        much slower.
      slowdown: times the dense time that the smallest may take.
      kind: of the device.
      basis: of the seconds.
    """

    prefer: Prefer
    slowdown: float
    kind: str
    basis: Basis


def aim(prefer: Prefer, slowdown: float | None, kind: str, measure: bool) -> Aim:
    """The arguments of the same names, checked."""
    if prefer not in ("speed", "memory"):
        raise ValueError(f"prefer: got {prefer!r}; expected 'speed' or 'memory'.")
    if slowdown is not None and (prefer == "speed" or not slowdown > 0):
        raise ValueError(
            f"slowdown: got {slowdown} with prefer={prefer!r}; expected a positive "
            "number, such as 1.5, with prefer='memory', and None with 'speed'."
        )
    basis = "predicted" if kind == "cpu" else "predicted, not timed"
    slowdown = 1.1 if slowdown is None else slowdown
    return Aim(prefer, slowdown, kind, "measured" if measure else basis)


def why_dense(
    shape: tuple[int, ...], sites: Sequence[Site], others: Sequence[str]
) -> str:
    """Why no format comes into question for a leaf used like this; empty if some do."""
    if others:
        return f"used by {', '.join(dict.fromkeys(others))}: not followed further"
    if not sites:
        return "not used in a product"
    k_axes, n_axes = sites[0].axes
    if not k_axes or not n_axes:
        return "not used as a matrix"
    if any(set(s.axes) != set(sites[0].axes) for s in sites):
        return "contracted over different axes in different places"
    if min(*k_axes, *n_axes) < -len(k_axes) - len(n_axes):
        return "its stacked axes are not in front"
    return ""


def choose(
    path: str,
    leaf: Any,
    sparsity: float,
    packings: Sequence[Packing],
    sites: Sequence[Site],
    aim: Aim,
    seconds: Callable[[Site], Sequence[tuple[float, str]]],
) -> tuple[Choice, Packing | None]:
    """The choice for a leaf, and its format if that is not dense.

    Args:
      path: of the leaf.
      leaf: it, or its shape and type.
      sparsity: share of it that is pruned.
      packings: the formats in question.
      sites: its products.
      aim: of the choice.
      seconds: of one of its products, dense and in each of the formats; and why they are
        not known.
    """
    found = [(site.times, seconds(site)) for site in sites]
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    names = ["dense", *(packing.name for packing in packings)]
    sizes = [size, *(packing.shapes(leaf).nbytes for packing in packings)]
    rows = []
    for i, (name, nbytes) in enumerate(zip(names, sizes, strict=True)):
        time = sum(times * each[i][0] for times, each in found)
        unknown = next((each[i][1] for _, each in found if each[i][1]), "")
        rows.append(Candidate(name, nbytes, time, unknown))
    best = _best(rows, aim)
    candidates = tuple(
        c._replace(reason="" if i == best else c.reason or _why_not(c, best, rows, aim))
        for i, c in enumerate(rows)
    )
    chosen, dense = candidates[best], candidates[0]
    others = sorted(
        (c for c in candidates[1:] if not math.isnan(c.seconds)),
        key=lambda c: c.seconds,
    )
    speedup = dense.seconds / (chosen if best else [*others, dense][0]).seconds
    choice = Choice(
        path=path,
        shape=tuple(leaf.shape),
        rows=sum(s.rows * s.times for s in sites),
        sparsity=sparsity,
        format=chosen.format,
        speedup=speedup if best or others else 0.0,
        basis=aim.basis if best or others else "",
        nbytes=chosen.nbytes,
        dense_nbytes=size,
        reason="" if best else _why_none(candidates, others, aim),
        candidates=candidates,
    )
    return choice, packings[best - 1] if best else None


def _best(rows: Sequence[Candidate], aim: Aim) -> int:
    """The index of the candidate to choose, of which the first is dense."""
    dense = rows[0]
    if aim.prefer == "speed":
        known = [i for i, c in enumerate(rows) if not math.isnan(c.seconds)]
        best = min(known, key=lambda i: rows[i].seconds)
        return best if dense.seconds >= _WORTH * rows[best].seconds else 0
    most = aim.slowdown * dense.seconds
    small = [i for i, c in enumerate(rows) if i == 0 or c.seconds <= most]
    return min(small, key=lambda i: (rows[i].nbytes, rows[i].seconds))


def _why_not(c: Candidate, best: int, rows: Sequence[Candidate], aim: Aim) -> str:
    """Of a candidate whose time is known."""
    ratio = rows[0].seconds / c.seconds
    if aim.prefer == "memory":
        if ratio * aim.slowdown < 1 and c is not rows[0]:
            return f"takes {1 / ratio:.3g} times as long as dense, more than {aim.slowdown}"
        return f"larger than {rows[best].format}"
    if best and ratio >= _WORTH or c is rows[0]:
        return f"slower than {rows[best].format}"
    return f"{ratio:.2f} times as fast as dense, not {_WORTH}"


def _why_none(
    candidates: Sequence[Candidate], known: Sequence[Candidate], aim: Aim
) -> str:
    """Of a leaf that stays dense: the fastest candidate of each kind, or what is amiss."""
    dense = candidates[0]
    if not known:
        return "; ".join(dict.fromkeys(c.reason for c in candidates[1:]))
    fastest: dict[str, Candidate] = {}
    for c in known:
        fastest.setdefault(c.format.split("(")[0], c)
    if aim.prefer == "speed":
        each = (f"{c.format} {dense.seconds / c.seconds:.2f}" for c in fastest.values())
        return f"{', '.join(each)} times as fast; expected {_WORTH}"
    each = (f"{c.format} {c.seconds / dense.seconds:.2f}" for c in fastest.values())
    return (
        f"{', '.join(each)} times as long as dense; expected {aim.slowdown} at most, "
        "and fewer bytes"
    )
