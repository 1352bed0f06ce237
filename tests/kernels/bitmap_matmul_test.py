"""Products with bitmaps against the dense one, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprune.kernels.bitmap_matmul import reference, shapes, xla

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def make(shape, dtype="float32", seed=0, stack=()):
    """x, the packed matrix, and a cotangent."""
    random = np.random.default_rng(seed)
    m, k, n, density, spare = shape
    mask = random.random((*stack, k, n)) < density
    if density < 1:
        mask[..., 1:2, :], mask[..., 1:2] = False, False
    x, w, dy = (
        jnp.asarray(random.standard_normal((*stack, *s)), dtype)
        for s in ((m, k), (k, n), (m, n))
    )
    capacity = max(1, mask.sum((-2, -1)).max()) + spare
    mask = jnp.asarray(mask)
    packed = jp.formats.pack(w, mask, jp.Unstructured(), capacity=int(capacity))
    return x, packed, dy


def with_gradients(f, x, packed, dy):
    """The product, and its gradients for x and the values."""

    def product(x, values):
        return f(x, dataclasses.replace(packed, values=values))

    y, back = jax.vjp(product, x, packed.values)
    return y, *back(dy.astype(y.dtype))


def close(a, b, dtype):
    size = max(1.0, float(jnp.abs(b).max(initial=0)))
    error = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32))
    return error.max(initial=0) <= TOLERANCE[dtype] * size


def exactly(tree):
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        tree,
    )


fast = jax.jit(lambda *a: with_gradients(jp.kernels.bitmap_matmul, *a))
wanted = jax.jit(lambda *a: with_gradients(reference.bitmap_matmul, *a))


@pytest.mark.parametrize("stretch", [1, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", shapes.SMALL, ids=str)
def test_agrees_with_the_dense_product(shape, dtype, stretch, monkeypatch):
    # A word of rows at a time, or the whole matrix at once.
    monkeypatch.setattr(xla, "STRETCH", stretch)
    fast.clear_cache()
    operands = make(shape, dtype)
    found, right = fast(*operands), wanted(*exactly(operands))
    for name, a, b in zip(("y", "dx", "dvalues"), found, right, strict=True):
        assert a.dtype == operands[0].dtype and a.shape == b.shape
        assert close(a, b, dtype), name


def test_stacks_and_leading_axes():
    operands = make(shapes.SMALL[1], stack=(2, 3))
    for a, b in zip(fast(*operands), wanted(*operands), strict=True):
        assert a.shape == b.shape and close(a, b, "float32")
    x, packed, _ = make(shapes.SMALL[1])
    y = jp.kernels.bitmap_matmul(jnp.stack([x, 2 * x])[:, None], packed)
    assert y.shape == (2, 1, *x.shape[:-1], 70)
    assert close(y[1, 0], 2 * reference.bitmap_matmul(x, packed), "float32")
    assert jp.kernels.bitmap_matmul(x[0], packed).shape == (70,)


def test_integers_are_promoted_and_have_no_gradient():
    random = np.random.default_rng(0)
    w = jnp.asarray(random.integers(-128, 128, (40, 20)), jnp.int8)
    packed = jp.formats.pack(w, w > 30, jp.Unstructured())
    x = jnp.asarray(random.standard_normal((3, 40)), jnp.bfloat16)
    y, back = jax.vjp(jp.kernels.bitmap_matmul, x, packed)
    assert y.dtype == jnp.bfloat16
    assert close(y, reference.bitmap_matmul(*exactly((x, packed))), "bfloat16")
    dx, gradient = back(y)
    assert dx.dtype == jnp.bfloat16
    assert gradient.values.dtype == jax.dtypes.float0


def test_another_pattern_of_the_same_capacity_is_the_same_program():
    traces = []

    @jax.jit
    def f(x, packed):
        traces.append(None)
        return jp.kernels.bitmap_matmul(x, packed)

    for seed in range(3):
        x, packed, _ = make(shapes.Shape(4, 50, 40, 0.5), seed=seed)
        w = jp.formats.unpack(packed)
        packed = jp.formats.pack(w, w != 0, jp.Unstructured(), capacity=1200)
        assert close(f(x, packed), x @ w, "float32")
    assert len(traces) == 1


def test_no_dense_copy():
    # What is written out at a time is a stretch, whatever the size of the matrix.
    x, packed, _ = make(shapes.Shape(1, 32 * 400, 1024, 0.01))
    compiled = jax.jit(jp.kernels.bitmap_matmul).lower(x, packed).compile()
    dense = 4 * 32 * 400 * 1024
    assert compiled.memory_analysis().temp_size_in_bytes < 0.7 * dense


def test_messages():
    w = jnp.ones((2, 8, 6))
    packed = jp.formats.pack(w, w != 0, jp.Unstructured())
    with pytest.raises(
        TypeError, match="packed: got ArrayImpl; expected a BitmapArray"
    ):
        jp.kernels.bitmap_matmul(jnp.ones(8), w)
    with pytest.raises(ValueError, match=r"expected \[2, '...', 8\].*a stack \[2\]"):
        jp.kernels.bitmap_matmul(jnp.ones((3, 8)), packed)
    with pytest.raises(ValueError, match="backend: got 'tpu'; expected 'xla' or None"):
        jp.kernels.bitmap_matmul(jnp.ones((2, 8)), packed, backend="tpu")
    whole = jp.formats.pack(w.astype(jnp.int8), w != 0, jp.Unstructured())
    with pytest.raises(TypeError, match="x: it is int8, and the values are int8"):
        jp.kernels.bitmap_matmul(jnp.ones((2, 8), jnp.int8), whole)
