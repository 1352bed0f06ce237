"""Times products with a masked matrix beside dense ones.

`python -m jaxprune.kernels.masked_matmul.bench` runs it on the device that JAX takes by
default; other sizes than `SIZES` may follow.
"""

import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxprune.kernels import _bench
from jaxprune.kernels.masked_matmul import api

from jaxprune import masks

SIZES = (1024, 2048)  # of K and N


def cases(sizes: tuple[int, ...] = SIZES) -> Iterator[_bench.Case]:
    """All of them."""
    for size in sizes:
        for rows in (1, 64, 512):
            keys = jax.random.split(jax.random.key(rows), 3)
            x = jax.random.normal(keys[0], (rows, size))
            w = jax.random.normal(keys[1], (size, size))
            mask = jax.random.bernoulli(keys[2], 0.5, w.shape)
            yield _bench.Case(
                f"{rows} x {size} x {size}, packed mask",
                lambda x, weights: api.masked_matmul(x, *weights),
                jnp.dot,
                x,
                (w, masks.pack(mask)),
                w * mask,
            )


if __name__ == "__main__":
    chosen = tuple(map(int, sys.argv[1:])) or SIZES
    _bench.table("masked_matmul", cases(chosen))
