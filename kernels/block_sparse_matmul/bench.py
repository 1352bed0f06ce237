"""Times block-sparse products beside dense ones.

`python -m jaxprune.kernels.block_sparse_matmul.bench` runs it on the device that JAX takes by
default; other sizes than `SIZES` may follow.
"""

import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxprune.kernels import _bench
from jaxprune.kernels.block_sparse_matmul import api

from jaxprune.formats import pack
from jaxprune.structures import Block

SIZES = (1024, 2048)  # of K and N


def cases(sizes: tuple[int, ...] = SIZES) -> Iterator[_bench.Case]:
    """All of them."""
    for sparsity in (0.8, 0.9):
        for size in sizes:
            for rows in (1, 64, 512):
                keys = jax.random.split(jax.random.key(rows), 3)
                x = jax.random.normal(keys[0], (rows, size))
                w = jax.random.normal(keys[1], (size, size))
                kept = (
                    jax.random.uniform(keys[2], (size // 128, size // 128)) > sparsity
                )
                mask = jnp.repeat(jnp.repeat(kept, 128, 0), 128, 1)
                name = (
                    f"{rows} x {size} x {size}, {sparsity:.0%} of blocks of 128 pruned"
                )
                packed = pack(w, mask, Block(128, 128))
                yield _bench.Case(
                    name, api.block_sparse_matmul, jnp.dot, x, packed, w * mask
                )


if __name__ == "__main__":
    chosen = tuple(map(int, sys.argv[1:])) or SIZES
    _bench.table("block_sparse_matmul", cases(chosen))
