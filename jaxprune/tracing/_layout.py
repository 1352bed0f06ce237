"""Where the elements of a view lie in the leaf that it shows: strides, as NumPy has them."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

Atoms: TypeAlias = tuple[tuple[int, int], ...]
"""(size, stride) pairs, the major one first; strides count elements of the leaf."""


class Dim(NamedTuple):
    """One axis of a value, and the part of it that the leaf fills.

    Attributes:
      atoms: which elements of the leaf.
      start: where they start along the axis; not 0 behind another leaf, concatenated.
      total: length of the axis.
    """

    atoms: Atoms
    start: int
    total: int

    @property
    def size(self) -> int:
        """How much of the axis the leaf fills."""
        return size(self.atoms)

    @property
    def whole(self) -> bool:
        """Whether the leaf fills the axis."""
        return self.size == self.total


def size(atoms: Iterable[tuple[int, int]]) -> int:
    """How many elements."""
    return math.prod(n for n, _ in atoms)


def row_major(shape: Sequence[int]) -> tuple[Dim, ...]:
    """The axes of a leaf as it is."""
    dims, stride = [], 1
    for n in reversed(shape):
        dims.append(Dim(((n, stride),) if n != 1 else (), 0, n))
        stride *= n
    return tuple(reversed(dims))


def joined(atoms: Iterable[tuple[int, int]]) -> Atoms:
    """The same elements, neighbours that lie one behind the other made one."""
    found: list[tuple[int, int]] = []
    for n, stride in atoms:
        if n == 1:
            continue
        if found and found[-1][1] == n * stride:
            found[-1] = (found[-1][0] * n, stride)
        else:
            found.append((n, stride))
    return tuple(found)


def reshape(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[Dim, ...] | None:
    """The axes after a reshape; `None` if they have no strides."""
    found: list[Dim] = []
    for old, new in aligned([d.total for d in dims], shape):
        part = [dims[i] for i in old]
        group = _reshape_group(part, [shape[i] for i in new])
        if group is None:
            return None
        found += group
    return tuple(found)


def aligned(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Cuts two shapes of one size into the shortest runs of equal size."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif j < len(new):
                right, j = right * new[j], j + 1
            else:
                return [(range(len(old)), range(len(new)))]
        found.append((range(a, i), range(b, j)))
    return found


def _reshape_group(dims: list[Dim], shape: list[int]) -> list[Dim] | None:
    if not all(d.whole for d in dims):
        return _reshape_part(dims, shape)
    left = list(joined(a for d in dims for a in d.atoms))
    found = []
    for total in shape:
        atoms, need = [], total
        while need > 1:
            if not left:
                return None
            n, stride = left[0]
            if n <= need:
                if need % n:
                    return None
                atoms.append(left.pop(0))
                need //= n
            else:
                if n % need:
                    return None
                atoms.append((need, stride * (n // need)))
                left[0] = (n // need, stride)
                need = 1
        found.append(Dim(tuple(atoms), 0, total))
    return found


def _reshape_part(dims: list[Dim], shape: list[int]) -> list[Dim] | None:
    """Where a leaf fills part of an axis: that may take up the axes behind it."""
    dims = [d for d in dims if d.total != 1]
    places = [i for i, n in enumerate(shape) if n != 1]
    if len(places) != 1 or not all(d.whole for d in dims[1:]):
        return None
    inner = math.prod(d.total for d in dims[1:])
    atoms = joined(a for d in dims for a in d.atoms)
    found = [Dim((), 0, 1)] * len(shape)
    found[places[0]] = Dim(atoms, dims[0].start * inner, dims[0].total * inner)
    return found


def take(dim: Dim, start: int, count: int, step: int = 1) -> tuple[Dim, int] | None:
    """Part of an axis, and how far into the leaf it lies; `None` without strides."""
    if count == dim.total and step == 1:
        return dim, 0
    if not dim.whole:
        low, high = max(start, dim.start), min(start + count, dim.start + dim.size)
        if step != 1:
            return None
        if low >= high:
            return Dim(((0, 1),), 0, count), 0
        found = take(Dim(dim.atoms, 0, dim.size), low - dim.start, high - low)
        if found is None:
            return None
        part, offset = found
        return Dim(part.atoms, low - start, count), offset
    atoms = joined(dim.atoms)
    if count == 1:
        offset, rest = 0, dim.size
        for n, stride in atoms:
            rest //= n
            offset += (start // rest % n) * stride
        return Dim((), 0, 1), offset
    if len(atoms) != 1:
        return None
    stride = atoms[0][1]
    return Dim(((count, stride * step),), 0, count), start * stride


class Digits(NamedTuple):
    """A leaf cut so that a strided part of it is a slice along every axis.

    Attributes:
      shape: what the leaf is reshaped to.
      slices: the part.
      order: which of these axes each atom is; the others have size 1.
    """

    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    order: tuple[int, ...]


def digits(shape: Sequence[int], atoms: Atoms, offset: int) -> Digits | None:
    """Cuts a leaf of `shape` for the elements that `atoms` and `offset` say.

    It is cut between its own axes where that can be, so that a reshape leaves shards in
    place. `None` if the elements cannot be had by slicing.
    """
    axes = {a[1] for d in row_major(shape) for a in d.atoms}
    own = {stride for _, stride in atoms}
    total = math.prod(shape)
    return _digits(total, atoms, offset, axes | own) or _digits(
        total, atoms, offset, own
    )


def _digits(total: int, atoms: Atoms, offset: int, cuts: set[int]) -> Digits | None:
    place = {stride: i for i, (_, stride) in enumerate(atoms)}
    if len(place) != len(atoms):
        return None
    shape, slices, where = [], [], {}
    outer = total
    for stride in sorted(cuts | {1}, reverse=True):
        if outer % stride:
            return None
        n, outer = outer // stride, stride
        start = offset // stride % n
        count = atoms[place[stride]][0] if stride in place else 1
        if start + count > n:
            return None
        if stride in place:
            where[place[stride]] = len(shape)
        shape.append(n)
        slices.append(slice(start, start + count))
    order = tuple(where[i] for i in range(len(atoms)))
    return Digits(tuple(shape), tuple(slices), order)


def cut(atoms: Atoms, shape: Sequence[int]) -> Atoms:
    """The same elements, cut between the axes of a leaf of `shape`."""
    found = []
    for n, stride in joined(atoms):
        span = n * stride
        inner = {
            a[1] for d in row_major(shape) for a in d.atoms
            if stride < a[1] < span and a[1] % stride == 0 and span % a[1] == 0
        }  # fmt: skip
        for low in sorted(inner | {stride}, reverse=True):
            found.append((span // low, low))
            span = low
    return tuple(found)
