"""Times products with bitmaps beside dense ones.

`python -m jaxprune.kernels.bitmap_matmul.bench` runs it on the device that JAX takes by
default; other sizes than `SIZES` may follow.
"""

import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxprune.kernels import _bench
from jaxprune.kernels.bitmap_matmul import api

from jaxprune.formats import pack
from jaxprune.structures import Unstructured

SIZES = (1024, 2048)  # of K and N


def cases(sizes: tuple[int, ...] = SIZES) -> Iterator[_bench.Case]:
    """All of them."""
    for sparsity in (0.5, 0.9):
        for size in sizes:
            for rows in (1, 64):
                keys = jax.random.split(jax.random.key(rows), 3)
                x = jax.random.normal(keys[0], (rows, size))
                w = jax.random.normal(keys[1], (size, size))
                mask = jax.random.uniform(keys[2], w.shape) > sparsity
                name = f"{rows} x {size} x {size}, {sparsity:.0%} pruned"
                packed = pack(w, mask, Unstructured())
                yield _bench.Case(name, api.bitmap_matmul, jnp.dot, x, packed, w * mask)


if __name__ == "__main__":
    chosen = tuple(map(int, sys.argv[1:])) or SIZES
    _bench.table("bitmap_matmul", cases(chosen))
