"""Axes of values as structured dimensions, made one where they must have one size.

A dimension is a leaf, a product of factors (heads × head width, the major one first) or a
sum of segments (what was concatenated). Two dimensions that must agree are unified: a leaf
becomes the other, products are cut at their factors and sums at their segments. A leaf is
what can be pruned: its units, one by one, wherever it stands.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

_numbers = itertools.count()


class Dim:
    """One axis of a value, or a part of one.

    Attributes:
      number: in the order of making.
      size: how many units.
      form: what it is made of.
      parts: factors or segments.
      link: what the dimension became; see `find`.
      frozen: reasons why its units must stay.
      roles: what is done along it.
      minimum: how many units must stay, whoever chooses.
      beside: dimensions that products of activations are batched over, which leave this
        one free.
      over: dimensions that these contract.
    """

    __slots__ = (
        "beside", "form", "frozen", "link", "minimum", "number", "over", "parts", "roles",
        "size",
    )  # fmt: skip

    def __init__(
        self,
        size: int,
        form: Literal["leaf", "product", "sum"] = "leaf",
        parts: Sequence["Dim"] = (),
    ):
        self.number = next(_numbers)
        self.size = int(size)
        self.form: Literal["leaf", "product", "sum"] = form
        self.parts = list(parts)
        self.link: Dim | None = None
        self.frozen: dict[str, None] = {}
        self.roles: set[str] = set()
        self.minimum = 1
        self.beside: list[Dim] = []
        self.over: list[Dim] = []


class MisalignedError(Exception):
    """Two dimensions, or a dimension and a cut, that fit no common structure."""


def fresh(shape: Sequence[int]) -> tuple[Dim, ...]:
    """New leaves, one for each axis."""
    return tuple(Dim(n) for n in shape)


def find(d: Dim) -> Dim:
    """What `d` is by now."""
    while d.link is not None:
        if d.link.link is not None:
            d.link = d.link.link
        d = d.link
    return d


def parts(d: Dim) -> list[Dim]:
    """Factors of a product, segments of a sum; none of them of the same form.

    A sum whose last segment was cut again and again is a chain of sums, as deep as there
    are cuts. It is made flat here, and stays so.
    """
    d = find(d)
    found, rest = [], d.parts[::-1]
    while rest:
        part = find(rest.pop())
        if part.form == d.form:
            rest += part.parts[::-1]
        elif part.size != (d.form == "product"):
            found.append(part)
    d.parts = found
    return found


def leaves(d: Dim) -> list[Dim]:
    """The leaves of `d`, in order; one may come several times."""
    d = find(d)
    if d.form == "leaf":
        return [d]
    return [leaf for part in parts(d) for leaf in leaves(part)]


def units(d: Dim, leaf: Dim) -> np.ndarray:
    """For each place along `d` the unit of `leaf`, or -1."""
    d = find(d)
    if d.form == "leaf":
        return np.arange(d.size) if d is leaf else np.full(d.size, -1)
    each = [units(p, leaf) for p in parts(d)]
    if d.form == "sum":
        return np.concatenate(each)
    found = each[0]
    for x in each[1:]:
        found = np.where(found[:, None] >= 0, found[:, None], x[None, :]).reshape(-1)
    return found


def steps(d: Dim, leaf: Dim) -> np.ndarray:
    """For each place along `d`, how far the next unit of `leaf` is; 0 if there is none."""
    d = find(d)
    if d.form == "leaf":
        return np.full(d.size, int(d is leaf))
    each = [steps(p, leaf) for p in parts(d)]
    if d.form == "sum":
        return np.concatenate(each)
    found = each[0]
    for x in each[1:]:
        found = (found[:, None] * len(x) + x[None, :]).reshape(-1)
    return found


def freeze(dims: Dim | Sequence[Dim], reason: str) -> None:
    """All units of `dims` must stay."""
    for d in [dims] if isinstance(dims, Dim) else dims:
        for leaf in leaves(d):
            leaf.frozen[reason] = None


def mark(d: Dim, role: str) -> None:
    """Remembers what is done along `d`."""
    for leaf in leaves(d):
        leaf.roles.add(role)


def factors(d: Dim) -> list[Dim]:
    """Factors of `d`, the major one first, without those of size 1."""
    d = find(d)
    if d.size == 1:
        return []
    return parts(d) if d.form == "product" else [d]


def segments(d: Dim) -> list[Dim]:
    """Segments of `d`; itself if it is no sum."""
    d = find(d)
    return parts(d) if d.form == "sum" else [d]


def product(dims: Sequence[Dim]) -> Dim:
    """One axis of several."""
    found = [f for d in dims for f in factors(d)]
    if len(found) == 1:
        return found[0]
    if not found:
        return find(dims[0]) if dims else Dim(1)
    return Dim(math.prod(f.size for f in found), "product", found)


def total(dims: Sequence[Dim]) -> Dim:
    """Several axes, one behind the other."""
    found = [s for d in dims for s in segments(d) if s.size]
    if len(found) == 1:
        return found[0]
    if not found:
        return Dim(0)
    return Dim(sum(s.size for s in found), "sum", found)


def split(d: Dim, at: int) -> tuple[Dim, Dim]:
    """Cuts `d` in two; a leaf becomes a sum everywhere.

    Raises:
      MisalignedError: if the cut goes through a unit of a major factor.
    """
    d = find(d)
    if d.form == "leaf":
        first, second = Dim(at), Dim(d.size - at)
        _bind(d, Dim(d.size, "sum", [first, second]))
        return first, second
    if d.form == "sum":
        found, start = segments(d), 0
        for i, s in enumerate(found):
            if start == at:
                return total(found[:i]), total(found[i:])
            if start + s.size > at:
                first, second = split(s, at - start)
                return total([*found[:i], first]), total([second, *found[i + 1 :]])
            start += s.size
    major, *rest = factors(d)
    inner = math.prod(f.size for f in rest)
    if at % inner:
        raise MisalignedError(f"cut at {at} of {describe(d)}")
    first, second = split(major, at // inner)
    return product([first, *rest]), product([second, *rest])


def window(d: Dim, start: int, stop: int) -> Dim:
    """The dimension of a slice.

    Raises:
      MisalignedError: as `split`.
    """
    size = find(d).size
    if start > 0:
        _, d = split(d, start)
    if stop < size:
        d, _ = split(d, stop - start)
    return find(d)


def unify(a: Dim, b: Dim) -> None:
    """`a` and `b` lose the same units; where they do not fit, none."""
    try:
        _match(a, b)
    except MisalignedError as error:
        freeze((a, b), f"misaligned: {error}")


def describe(d: Dim) -> str:
    """Such as `((4*2)+8)`."""
    d = find(d)
    if d.form == "leaf":
        return str(d.size)
    sign = "*" if d.form == "product" else "+"
    return f"({sign.join(describe(p) for p in parts(d))})"


def _bind(leaf: Dim, to: Dim) -> None:
    """A leaf becomes something else."""
    if any(x is leaf for x in leaves(to)):
        freeze(to, "a part of itself")
        return
    leaf.link = to
    for x in leaves(to):
        x.frozen.update(leaf.frozen)
        x.roles |= leaf.roles
        x.beside += leaf.beside
        x.over += leaf.over
        if x is to:
            x.minimum = max(x.minimum, leaf.minimum)
        elif leaf.minimum > 1:
            x.frozen["a least number of several parts together"] = None


def _match(a: Dim, b: Dim) -> None:
    a, b = find(a), find(b)
    while a is not b and a.size == b.size and "sum" in (a.form, b.form):
        if "leaf" in (a.form, b.form):
            break
        at = min(segments(d)[0].size for d in (a, b) if d.form == "sum")
        firsts, seconds = zip(split(a, at), split(b, at), strict=True)
        _match(*firsts)
        a, b = map(find, seconds)
    if a is b:
        return
    if a.size != b.size:
        raise MisalignedError(f"{describe(a)} and {describe(b)}")
    if a.form == b.form == "leaf":
        # The older one stays, so that dimensions met later change none met before.
        older, newer = sorted((a, b), key=lambda d: d.number)
        _bind(newer, older)
    elif a.form == "leaf":
        _bind(a, b)
    elif b.form == "leaf":
        _bind(b, a)
    else:
        _match_products(factors(a), factors(b))


def _match_products(left: list[Dim], right: list[Dim]) -> None:
    while left and right:
        x, y = find(left[0]), find(right[0])
        if x.form == "product" or y.form == "product":  # refined meanwhile
            left, right = factors(product(left)), factors(product(right))
            x, y = left[0], right[0]
        if x.size == y.size:
            _match(x, y)
            left, right = left[1:], right[1:]
        elif x.size < y.size:
            left, right = right, left
        elif x.form == "sum":
            sizes = list(
                itertools.accumulate((f.size for f in right), lambda m, n: m * n)
            )
            if x.size not in sizes:
                raise MisalignedError(f"{describe(x)} and {describe(product(right))}")
            n = sizes.index(x.size) + 1
            _match(x, product(right[:n]))
            left, right = left[1:], right[n:]
        elif x.size % y.size:
            raise MisalignedError(f"{describe(x)} and {describe(y)}")
        else:
            major, minor = Dim(y.size), Dim(x.size // y.size)
            _bind(x, Dim(x.size, "product", [major, minor]))
            left = [major, minor, *left[1:]]
    if left or right:
        raise MisalignedError("products of different sizes")
