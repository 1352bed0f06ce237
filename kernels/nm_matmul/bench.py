"""Times N:M products beside dense ones.

`python -m jaxprune.kernels.nm_matmul.bench` runs it on the device that JAX takes by
default; other sizes than `SIZES` may follow.
"""

import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxprune.kernels import _bench
from jaxprune.kernels.nm_matmul import api

from jaxprune.formats import pack
from jaxprune.structures import NM

SIZES = (1024, 2048)  # of K and N


def cases(sizes: tuple[int, ...] = SIZES) -> Iterator[_bench.Case]:
    """All of them."""
    for structure in (NM(2, 4), NM(1, 4)):
        for size in sizes:
            for rows in (1, 16, 64):
                keys = jax.random.split(jax.random.key(rows), 2)
                x = jax.random.normal(keys[0], (rows, size), jnp.bfloat16)
                w = jax.random.normal(keys[1], (size, size), jnp.bfloat16)
                mask = structure.best("w", jnp.abs(w).astype(jnp.float32))
                name = f"{rows} x {size} x {size}, {structure.n}:{structure.m}"
                packed = pack(w, mask, structure)
                yield _bench.Case(name, api.nm_matmul, jnp.dot, x, packed, w * mask)


if __name__ == "__main__":
    chosen = tuple(map(int, sys.argv[1:])) or SIZES
    _bench.table("nm_matmul", cases(chosen))
