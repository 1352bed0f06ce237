"""Codes in 32-bit words, for values of 16 bits that a TPU decodes two at a time.

Two values that stand in one 32-bit word, on top of each other, become two rows of the
matrix that stand in one word too: by halving the word's choices, bit by bit, with masks
of its halves. For 1:M these are the bits of the two places. For 2:4 both values belong to
one group, and one bit for each says whether it goes to rows 0 and 1 or to rows 2 and 3.
Which of the two is given by the half it stands in, unless both have the same parity
(0 and 2, or 1 and 3): then a third bit says that what goes to rows 2 and 3 changes halves.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32, Shaped

_LEAST = 256  # rows of a matrix, below which a tile of words is mostly padding
_SUBLANES, _LANES = 8, 128


class Tiles(NamedTuple):
    """How the rows of a matrix are shared out among words.

    A word holds two values. A plane is 8 words, which one instruction decodes; the bits
    of one code word belong to 32 or 16 different planes. A tile has planes and the words
    of their codes.

    Attributes:
      number: of tiles.
      planes: planes of a tile.
      words: code words of a tile, times 8.
      rows: rows of the matrix that a plane holds.
      halvings: bits for each of the two values.
      turns: 1 if there is a bit for both of them, 0 if not.
    """

    number: int
    planes: int
    words: int
    rows: int
    halvings: int
    turns: int

    @property
    def groups(self) -> int:
        """Groups of weights in all tiles, with those that pad."""
        return self.number * self.planes * _SUBLANES * (1 if self.turns else 2)

    def half(self, plane: int, halving: int) -> tuple[int, int]:
        """Word and bit, 0 to 15, of the lower value; the other has the bit 16 above."""
        return divmod(plane * self.halvings + halving, 16)

    def turn(self, plane: int) -> tuple[int, int]:
        """Word and bit for both values: the free ones, in order."""
        pairs = self.planes * self.halvings
        word, used = divmod(pairs, 16)
        free = [b for b in range(32) if b % 16 >= used]  # of the word that is shared
        if plane < len(free):
            return word, free[plane]
        after, bit = divmod(plane - len(free), 32)
        return word + 1 + after, bit


def fits(n: int, m: int, itemsize: int, matrix: tuple[int, int]) -> bool:
    """Whether this coding is for such values, and would not be mostly padding."""
    simple = (n, m) in ((2, 4), (1, 2), (1, 4), (1, 8), (1, 16))
    rows, cols = matrix
    return simple and itemsize == 2 and rows >= _LEAST and 8 * (-cols % _LANES) <= cols


def by_lanes(
    values: Shaped[Array, "... kept N"],
) -> Shaped[Array, "... N/128 kept 128"]:
    """Columns in stretches of 128, padded, so that all rows of one follow each other."""
    *batch, rows, cols = values.shape
    values = jnp.pad(values, [(0, 0)] * (len(batch) + 1) + [(0, -cols % _LANES)])
    return jnp.swapaxes(values.reshape(*batch, rows, -1, _LANES), -2, -3)


def by_rows(values: Array, cols: int) -> Shaped[Array, "... kept N"]:
    """Undoes `by_lanes`."""
    *batch, _, rows, _ = values.shape
    return jnp.swapaxes(values, -2, -3).reshape(*batch, rows, -1)[..., :cols]


def tiles(n: int, m: int, groups: int) -> Tiles:
    """The tiles that hold so many groups in about the fewest words."""
    halvings, turns = (m // n).bit_length() - 1, n - 1
    rows = 2 * _SUBLANES // n * m
    planes = -(-groups * m // rows)
    most = min(32, 2048 // rows)

    def tiles_of(count):
        each = -(-planes // count)
        words = -(-each * (2 * halvings + turns) // 32)
        return Tiles(count, each, words, rows, halvings, turns)

    fewest = -(-planes // most)
    choices = [tiles_of(count) for count in range(fewest, fewest + 8)]

    def cost(tiles):
        # x is not copied for tiles whose rows fill lanes.
        aligned = tiles.planes * tiles.rows % _LANES == 0
        return tiles.number * (tiles.planes + tiles.words) * (1 if aligned else 1.03)

    return min(choices, key=cost)


def encode(
    places: Int[Array, "... groups n N"], tiles: Tiles
) -> tuple[Int32[Array, "... words N"], Bool[Array, "... groups N"]]:
    """The code words, and in which groups the two values change places before."""
    *batch, groups, n, cols = places.shape
    if tiles.turns:
        first, second = places[..., 0, :], places[..., 1, :]  # first < second
        turn = (first ^ second) & 1 == 0
        # The lower half is for even places, but of two odd ones it takes the second.
        swap = first & 1 == 1
        low, high = jnp.where(swap, second, first), jnp.where(swap, first, second)
        low, high = (
            jnp.stack([x < 2], -2) for x in (low, high)
        )  # [..., groups, halvings, N]
    else:
        turn, swap = None, jnp.zeros((*batch, groups, cols), bool)
        pairs = places.reshape(*batch, groups // 2, 2, cols)
        bits = [(pairs >> i) & 1 == 1 for i in reversed(range(tiles.halvings))]
        bits = jnp.stack(bits, -2)  # [..., pairs, 2, halvings, N]
        low, high = bits[..., 0, :, :], bits[..., 1, :, :]
    split = (*batch, tiles.number, tiles.planes, _SUBLANES)
    low, high = (x.reshape(*split, tiles.halvings, cols) for x in (low, high))
    words: list[list[Array]] = [[] for _ in range(tiles.words)]
    for plane in range(tiles.planes):
        for i in range(tiles.halvings):
            word, bit = tiles.half(plane, i)
            words[word] += [
                x[..., plane, :, i, :].astype(jnp.uint32) << b
                for x, b in ((low, bit), (high, bit + 16))
            ]
        if turn is not None:
            word, bit = tiles.turn(plane)
            turned = turn.reshape(*split, cols)[..., plane, :, :]
            words[word].append(turned.astype(jnp.uint32) << bit)
    stacked = jnp.stack([sum(w[1:], w[0]) for w in words], -3)
    rows = tiles.number * tiles.words * _SUBLANES
    return stacked.astype(jnp.int32).reshape(*batch, rows, cols), swap


def decode(
    codes: Int32[Array, "... words N"], tiles: Tiles
) -> Int[Array, "... groups n N"]:
    """The places in the order of the values, which need not rise."""
    *batch, _, cols = codes.shape
    words = codes.reshape(*batch, tiles.number, tiles.words, _SUBLANES, cols)

    def bit(places):
        taken = jnp.stack([(words[..., w, :, :] >> b) & 1 for w, b in places], -3)
        return taken.reshape(*batch, -1, cols)  # a bit for each word of values

    planes = range(tiles.planes)
    halves = [
        [bit([(w, b + up) for w, b in (tiles.half(p, i) for p in planes)])
         for up in (0, 16)]
        for i in range(tiles.halvings)
    ]  # fmt: skip
    if tiles.turns:
        [(low, high)], turn = halves, bit([tiles.turn(p) for p in planes])
        low, high = jnp.where(low == 1, 0, 2 + turn), jnp.where(high == 1, 1, 3 - turn)
        return jnp.stack([low, high], -2)
    low, high = (sum(h[up] << i for i, h in enumerate(halves[::-1])) for up in (0, 1))
    places = jnp.stack([low, high], -2)  # [..., pairs, 2, N]
    return places.reshape(*batch, -1, 1, cols)
