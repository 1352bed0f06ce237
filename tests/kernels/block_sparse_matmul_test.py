"""Block-sparse products against the dense one, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxprune.kernels.block_sparse_matmul import reference, shapes

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = [
    *((s, "xla") for s in (*shapes.SMALL, *shapes.WIDE)),
    *((s, "tpu") for s in shapes.WIDE),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def make(shape, dtype="float32", seed=0):
    """x, the packed matrix, and a cotangent."""
    random = np.random.default_rng(seed)
    m, k, n, block, density, spare = shape
    grid = (-(-k // block[0]), -(-n // block[1]))
    blocks = random.random(grid) < density
    if density < 1:
        blocks[1:2], blocks[:, 1:2] = False, False
    mask = np.kron(blocks, np.ones(block, bool))[:k, :n]
    x, w, dy = (
        jnp.asarray(random.standard_normal(s), dtype) for s in ((m, k), (k, n), (m, n))
    )
    capacity = max(1, int(blocks.sum())) + spare
    packed = jp.formats.pack(w, jnp.asarray(mask), jp.Block(*block), capacity=capacity)
    return x, packed, dy


def backend_options(backend):
    if backend != "tpu":
        return {"backend": backend}
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return {"backend": "tpu", "interpret": interpret}


def with_gradients(f, x, packed, dy):
    """The product, and its gradients for x and the values."""

    def product(x, values):
        return f(x, dataclasses.replace(packed, values=values))

    y, back = jax.vjp(product, x, packed.values)
    return y, *back(dy.astype(y.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "backend"), CASES, ids=str)
def test_agrees_with_the_dense_product(shape, backend, dtype):
    x, packed, dy = make(shape, dtype)
    options = backend_options(backend)

    @jax.jit
    def fast(x, packed, dy):
        def f(x, packed):
            return jp.kernels.block_sparse_matmul(x, packed, **options)

        return with_gradients(f, x, packed, dy)

    exact = jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        (x, packed, dy),
    )
    wanted = with_gradients(reference.block_sparse_matmul, *exact)
    for name, a, b in zip(
        ("y", "dx", "dvalues"), fast(x, packed, dy), wanted, strict=True
    ):
        assert a.dtype == x.dtype
        size = max(1.0, float(jnp.abs(b).max(initial=0)))
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max(initial=0)
        assert error <= TOLERANCE[dtype] * size, name


def test_another_pattern_of_the_same_capacity_is_the_same_program():
    shape = shapes.SMALL[4]
    traces = []

    @jax.jit
    def f(x, packed):
        traces.append(None)
        return jp.kernels.block_sparse_matmul(x, packed)

    for seed in range(3):
        x, packed, _ = make(shape._replace(spare=0), seed=seed)
        room = 40 - packed.capacity
        x, packed, _ = make(shape._replace(spare=room), seed=seed)
        wanted = reference.block_sparse_matmul(x, packed)
        np.testing.assert_allclose(f(x, packed), wanted, atol=1e-4)
    assert len(traces) == 1
