"""Which places of each dimension are kept."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxprune.structured._plans._cut import cut
from jaxprune.structured._reading import _dims
from jaxprune.structured._reading._dims import Dim
from jaxprune.structured._reading._values import Dims


class Kept:
    """Which places of each dimension are kept."""

    def __init__(self, units: Mapping[Dim, np.ndarray]):
        self.units = dict(units)  # boolean, for leaves that lose some
        self._masks: dict[Dim, np.ndarray] = {}
        self._changed: dict[Dim, bool] = {}

    def changed(self, d: Dim) -> bool:
        """Whether `d` loses anything."""
        d = _dims.find(d)
        if d not in self._changed:
            self._changed[d] = any(x in self.units for x in _dims.leaves(d))
        return self._changed[d]

    def mask(self, d: Dim) -> np.ndarray:
        """Boolean, for each place of the full dimension."""
        d = _dims.find(d)
        if d not in self._masks:
            self._masks[d] = self._mask(d)
        return self._masks[d]

    def _mask(self, d: Dim) -> np.ndarray:
        if d.form == "leaf":
            return self.units.get(d, np.ones(d.size, bool))
        parts = [self.mask(p) for p in _dims.parts(d)]
        if d.form == "sum":
            return np.concatenate(parts)
        found = parts[0]
        for x in parts[1:]:
            found = (found[:, None] & x[None, :]).reshape(-1)
        return found

    def size(self, d: Dim) -> int:
        """How many places are kept."""
        d = _dims.find(d)
        if d.form == "leaf":
            return int(self.units[d].sum()) if d in self.units else d.size
        sizes = [self.size(p) for p in _dims.parts(d)]
        return math.prod(sizes) if d.form == "product" else sum(sizes)

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Of an array with what is kept."""
        return tuple(map(self.size, dims))

    def places(self, d: Dim) -> np.ndarray:
        """Of what is kept, in the full dimension."""
        return np.flatnonzero(self.mask(d))

    def cut(self, x: Any, dims: Dims) -> Any:
        """What is kept of an array of full size."""
        changed = ((i, d) for i, d in enumerate(dims) if self.changed(d))
        return cut(x, {i: self.places(d) for i, d in changed})
