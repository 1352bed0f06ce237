"""What would pay, before anything is pruned."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxprune.acceleration import _choose, _cost
from jaxprune.acceleration._packing import BLOCKS, Packing
from jaxprune.acceleration._report import Report
from jaxprune.acceleration._sites import Site
from jaxprune.structures import NM, Block, Unstructured

Shape: TypeAlias = tuple[int, int, int]

_AXES = (-2,), (-1,)


def predict(
    shapes: Shape | Sequence[Shape] | Mapping[str, Shape],
    structure: Block | NM | Unstructured,
    sparsity: float,
    device: str | None = None,
    *,
    dtype=jnp.bfloat16,
    prefer: _choose.Prefer = "speed",
    slowdown: float | None = None,
) -> Report:
    """What would pay, before anything is pruned.

    Args:
      shapes: of a product, `(rows of x, K, N)`, or of several, with names or without.
      structure: that would be pruned in.
      sparsity: share of the blocks or weights that would be pruned.
      device: `"cpu"`, `"v4"`, `"v5e"`, `"v5p"`, `"v6e"`, `"tpu7x"`, `"h100"`, `"h200"`;
        by default JAX's own. Nothing but the CPU has been timed, in float32.
      dtype: of the weights and the products.
      prefer: see `accelerate`.
      slowdown: see `accelerate`.

    Raises:
      ValueError: if a shape is not of three positive numbers, the device is not known, or
        the sparsity not in [0, 1) or more than the structure allows.
      TypeError: if the structure is none of these.

    Example:
      >>> report = jp.predict((2048, 4096, 4096), jp.Block(128, 128), 0.9, "v5e")
      >>> report.choices[0].go
      True
      >>> report = jp.predict({"up": (16, 4096, 4096)}, jp.NM(2, 4), 0.5, "v5e")
      >>> report.choices[0].format
      'NM(2, 4)'
    """
    named = _named(shapes)
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity: got {sparsity}; expected a share in [0, 1), such as 0.9."
        )
    kind = _cost.kind_of(device)
    aim = _choose.aim(prefer, slowdown, kind, measure=False)
    choices = []
    for name, (m, k, n) in named.items():
        leaf = jax.ShapeDtypeStruct((k, n), dtype)
        packings = _packings(structure, sparsity, k, n)
        site = Site(m, _AXES, 1, leaf.dtype, None)
        seconds = functools.partial(_cost.predicted, leaf, packings, kind)
        choice, _ = _choose.choose(name, leaf, sparsity, packings, [site], aim, seconds)
        choices.append(choice)
    return Report(tuple(choices))


def _named(shapes: Any) -> dict[str, Shape]:
    if isinstance(shapes, Mapping):
        found = dict(shapes)
    elif isinstance(shapes, Sequence):
        if shapes and not any(isinstance(x, Sequence) for x in shapes):
            shapes = [shapes]
        found = {" x ".join(map(str, x)): x for x in shapes}
    else:
        raise TypeError(
            f"shapes: got {shapes!r}; expected (rows of x, K, N), several of them, or a "
            "mapping from names to them."
        )
    for name, shape in found.items():
        if len(shape) != 3 or not all(isinstance(x, int) and x > 0 for x in shape):
            raise ValueError(
                f"shapes: got {tuple(shape)} for {name!r}; expected the three positive "
                "numbers (rows of x, K, N), as in (2048, 4096, 4096)."
            )
    return found


def _packings(structure, sparsity: float, k: int, n: int) -> list[Packing]:
    """The formats for a matrix that is pruned like this."""
    found = []
    match structure:
        case Block(rows, cols):
            kept = math.ceil((1 - sparsity) * -(-k // rows) * -(-n // cols))
            for size in BLOCKS:
                if size <= min(k, n) and rows % size == cols % size == 0:
                    grid = -(-k // size) * -(-n // size)
                    capacity = min(grid, kept * (rows // size) * (cols // size))
                    found.append(Packing(Block(size, size), max(1, capacity), _AXES))
        case NM():
            most = 1 - structure.n / structure.m
            if sparsity > most + 1e-6:
                raise ValueError(
                    f"sparsity: got {sparsity}, but {structure} prunes {most} of the "
                    f"weights; expected sparsity={most}. Ask for it, or for another n "
                    "and m."
                )
            if sparsity > most - 1e-6:  # else some groups are dense
                found.append(Packing(NM(structure.n, structure.m), None, _AXES))
        case Unstructured():
            pass
        case _:
            raise TypeError(
                f"structure: got {structure!r}; expected Block, NM or Unstructured. "
                "Channels are cut out of a matrix: predict its smaller shape."
            )
    kept = max(1, math.ceil((1 - sparsity) * k * n))
    return [*found, Packing(Unstructured(), kept, _AXES)]
