"""The walk that a kernel takes over the blocks of a matrix, a group of them at a time."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32


class Steps(NamedTuple):
    """Steps of `group` neighbouring blocks that add to the same output.

    An output without blocks has a step too, which writes its zeros. There are as many
    steps as the worst pattern with this many blocks would take; what is left over is idle.

    Attributes:
      place: the output that a step adds to, counted in blocks.
      start: the first block that it reads.
      flags: bit 0 in the first step of an output; bit `1 + i` if block `start + i` belongs
        to this step. 0 in an idle step.
      number: of steps that are not idle.
    """

    place: Int32[Array, " steps"]
    start: Int32[Array, " steps"]
    flags: Int32[Array, " steps"]
    number: Int32[Array, ""]


def count(capacity: int, outputs: int, group: int) -> int:
    """The most steps that `capacity` blocks may take."""
    return outputs + capacity // group


def walk(places: Int32[Array, " capacity"], outputs: int, group: int) -> Steps:
    """The steps over blocks that are sorted by the output they add to.

    Args:
      places: output of each block, rising; `outputs` for room that is not taken.
      outputs: how many there are, counted in blocks.
      group: blocks a step, no more than there is room for.
    """
    capacity = places.shape[0]
    every = jnp.arange(outputs, dtype=jnp.int32)
    begin = jnp.searchsorted(places, every).astype(jnp.int32)
    end = jnp.searchsorted(places, every, side="right").astype(jnp.int32)
    taken = jnp.maximum(-(-(end - begin) // group), 1)
    done = jnp.cumsum(taken, dtype=jnp.int32)
    step = jnp.arange(count(capacity, outputs, group), dtype=jnp.int32)
    place = jnp.searchsorted(done, step, side="right").astype(jnp.int32)
    idle = place >= outputs
    place = jnp.minimum(place, outputs - 1)
    number = step - (done - taken)[place]
    wanted = begin[place] + number * group
    # Near the end a group reaches back, over blocks that are not its own.
    start = jnp.clip(wanted, 0, capacity - group)
    slots = jnp.arange(group, dtype=jnp.int32)
    block = start[:, None] + slots
    own = (block >= wanted[:, None]) & (block < end[place][:, None])
    flags = jnp.sum(own.astype(jnp.int32) << (1 + slots), -1, dtype=jnp.int32)
    flags = jnp.where(idle, 0, flags | (number == 0))
    return Steps(place, start, flags, done[-1])


def slots(
    places: Int32[Array, " capacity"], steps: Steps, outputs: int, group: int
) -> Int32[Array, " capacity"]:
    """Where each block stands in the groups of all steps, `step * group + place in it`.

    One past the last for room that is not taken.
    """
    capacity = places.shape[0]
    every = jnp.arange(outputs, dtype=jnp.int32)
    begin = jnp.searchsorted(places, every).astype(jnp.int32)
    first = jnp.searchsorted(steps.place, every).astype(jnp.int32)
    block = jnp.arange(capacity, dtype=jnp.int32)
    taken = places < outputs
    output = jnp.minimum(places, outputs - 1)
    step = first[output] + (block - begin[output]) // group
    slot = step * group + block - steps.start[jnp.where(taken, step, 0)]
    return jnp.where(taken, slot, steps.place.shape[0] * group)


def best_group(capacity: int, outputs: int, most: int) -> int:
    """Blocks a step, if outputs have about as many each; a step costs two or three blocks.

    Args:
      capacity: blocks in all.
      outputs: that they are shared out among.
      most: the largest group to consider.
    """
    each = capacity / outputs

    def cost(group):
        # On average half a group is missing in the last step of an output.
        return max(1.0, each / group + 0.5) * (2.5 + group)

    groups = [g for g in (1, 2, 4, 8, 16) if g <= max(1, min(most, capacity))]
    return min(groups, key=cost)
