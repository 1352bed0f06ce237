"""A function in blocks that can be run one after the other, and their values."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

_NUMBERED = re.compile(r"^(?:[^/]*/)*?[^/]*\d[^/]*(?=/|$)")


class Leaf(NamedTuple):
    """A leaf that a block reads, or one layer of a leaf that a scan runs over.

    Attributes:
      path: of the leaf.
      layer: index along the first axis; `None` for the whole leaf.
    """

    path: str
    layer: int | None

    def __str__(self) -> str:
        return self.path if self.layer is None else f"{self.path}[{self.layer}]"


class Slot(NamedTuple):
    """Where a value rests between blocks.

    Attributes:
      number: of the value.
      layer: index along the first axis of what a scan reads or writes, or `None`.
    """

    number: int
    layer: int | None = None


class Block(NamedTuple):
    """A part of a function.

    Attributes:
      name: `"layers/3"`, or `""` in front of the first block and behind the last.
      leaves: what it reads of the parameters.
      reads: values that it needs.
      writes: values that it gives, for later blocks.
      fn: `fn(leaves, *reads) -> writes`, tuples of arrays, pure. Blocks that do the same
        have the same function, so that it is compiled once.
    """

    name: str
    leaves: tuple[Leaf, ...]
    reads: tuple[Slot, ...]
    writes: tuple[Slot, ...]
    fn: Callable[..., tuple[Array, ...]]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A function in parts.

    Attributes:
      blocks: in the order in which they run.
      inputs: slots of the arguments, in the order of their leaves.
      outputs: slots of the leaves of the output.
    """

    blocks: tuple[Block, ...]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]


def take(block: Block, weights: Mapping[str, Array]) -> tuple[Array, ...]:
    """The leaves of a block, from weights by path."""
    return tuple(
        weights[x.path] if x.layer is None else weights[x.path][x.layer]
        for x in block.leaves
    )


def reads(block: Block, values: Mapping[Slot, Any]) -> tuple[Any, ...]:
    """What a block reads of the values that rest: arrays, or shapes of them."""
    return tuple(value_of(slot, values) for slot in block.reads)


def value_of(slot: Slot, values: Mapping[Slot, Any]) -> Any:
    """What rests in a slot, where layers may lie in one array or each by itself."""
    if slot in values:
        return values[slot]
    if slot.layer is not None:
        whole, layer = values[Slot(slot.number)], slot.layer
        return _either(lambda x: x[layer], whole)
    layers = sorted(s for s in values if s.number == slot.number)
    return _either(lambda *xs: jnp.stack(xs), *(values[s] for s in layers))


def _either(f: Callable[..., Any], *xs: Any) -> Any:
    shapes = isinstance(xs[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(f, *xs) if shapes else f(*xs)


def block_of(path: str) -> str:
    """The block that a leaf belongs to: the shortest part of its path with a number.

    Without one it is what holds the leaf, or the leaf itself.

    Example:
      >>> from jaxprune import tracing
      >>> tracing.block_of("decoder/layers/3/mlp/up/kernel"), tracing.block_of("head/kernel")
      ('decoder/layers/3', 'head')
    """
    return numbered(path) or path.rpartition("/")[0] or path


def numbered(path: str) -> str | None:
    """The shortest part of a path with a number, or `None`.

    Example:
      >>> from jaxprune import tracing
      >>> tracing.numbered("layers/3/mlp/up/kernel"), tracing.numbered("head/kernel")
      ('layers/3', None)
    """
    found = _NUMBERED.match(path)
    return found.group() if found else None


def joined(*parts: Any) -> str:
    """A path of these parts, those that are empty left out."""
    return "/".join(x for x in map(str, parts) if x)
