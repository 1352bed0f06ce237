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


# A step of 2:4 and 1:2 decodes 1024 x bn weights, one of the others 2048 x bn.
CASES = (
    Case(
        2,
        4,
        16,
        4096,
        2048,
        512,
        {"v4": 1019, "v5e": 540, "v5p": 599, "v6e": 503, "tpu7x": 483},
    ),
    Case(
        2,
        4,
        16,
        4096,
        2048,
        1024,
        {"v4": 1841, "v5e": 873, "v5p": 909, "v6e": 843, "tpu7x": 883},
    ),
    Case(
        2,
        4,
        64,
        4096,
        2048,
        1024,
        {"v4": 2271, "v5e": 1436, "v5p": 1470, "v6e": 1016, "tpu7x": 1098},
    ),
    Case(
        2,
        4,
        17,
        1100,
        1100,
        1024,
        {"v4": 1249, "v5e": 750, "v5p": 755, "v6e": 647, "tpu7x": 564},
    ),
    Case(
        2,
        4,
        16,
        11008,
        2048,
        1024,
        {"v4": 1841, "v5e": 869, "v5p": 910, "v6e": 826, "tpu7x": 772},
    ),
    Case(
        1,
        4,
        16,
        4096,
        2048,
        512,
        {"v4": 1276, "v5e": 786, "v5p": 844, "v6e": 715, "tpu7x": 678},
    ),
    Case(
        1,
        4,
        16,
        4096,
        2048,
        1024,
        {"v4": 2297, "v5e": 1297, "v5p": 1333, "v6e": 1210, "tpu7x": 1277},
    ),
    Case(
        1,
        2,
        16,
        4096,
        2048,
        1024,
        {"v4": 1204, "v5e": 768, "v5p": 805, "v6e": 699, "tpu7x": 748},
    ),
    Case(
        1,
        8,
        16,
        4096,
        2048,
        1024,
        {"v4": 2244, "v5e": 1277, "v5p": 1314, "v6e": 1212, "tpu7x": 1181},
    ),
    Case(
        1,
        16,
        16,
        4096,
        2048,
        1024,
        {"v4": 2195, "v5e": 1244, "v5p": 1278, "v6e": 1247, "tpu7x": 1158},
    ),
)
