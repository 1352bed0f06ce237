"""What the TPU kernels of N:M products may cost: bundles of a grid step, by generation.

A bundle is what a TPU core issues in a cycle. The numbers are those of the compiler of
libtpu 0.0.52 for bodies of the grid loop; transfers are not part of them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune.kernels.nm_matmul import tpu


class Case(NamedTuple):
    """A product `[rows, K] @ [K, N]` of bfloat16, and its measured bundles.

    Attributes:
      n: weights kept of every `m`.
      m: weights of a group.
      rows: of x.
      k: contracted.
      cols: produced.
      bn: columns of a grid step.
      bundles: of a grid step.
    """

    n: int
    m: int
    rows: int
    k: int
    cols: int
    bn: int
    bundles: dict[str, int]

    def call(self):
        """A function, and the shapes of its arguments."""
        structure = jp.NM(self.n, self.m)
        w = jax.ShapeDtypeStruct((self.k, self.cols), jnp.bfloat16)
        mask = jax.ShapeDtypeStruct(w.shape, bool)
        packed = jax.eval_shape(lambda *a: jp.formats.pack(*a, structure), w, mask)
        x = jax.ShapeDtypeStruct((self.rows, self.k), jnp.bfloat16)
        return functools.partial(tpu.matmul, bn=self.bn), (x, packed)


# A step of 2:4 decodes 1024 x bn weights, a step of the others 2048 x bn, but 1:2 1024 x bn.
CASES = ()
