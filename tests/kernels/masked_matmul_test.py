"""Masked products against those with the masked matrix, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxprune.kernels.masked_matmul import reference, shapes

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASES = [
    *((s, "xla") for s in (*shapes.SMALL, *shapes.WIDE[2:4])),
    *((s, "tpu") for s in shapes.WIDE),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def make(shape, dtype="float32", seed=0, stack=()):
    """x, w, its mask, and a cotangent."""
    random = np.random.default_rng(seed)
    m, k, n, density = shape
    mask = random.random((*stack, k, n)) < density
    if density < 1:
        mask[..., 1:2, :], mask[..., 1:2] = False, False
    x, w, dy = (
        jnp.asarray(random.standard_normal((*stack, *s)), dtype)
        for s in ((m, k), (k, n), (m, n))
    )
    return x, w, jnp.asarray(mask), dy


def backend_options(backend):
    if backend != "tpu":
        return {"backend": backend}
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return {"backend": "tpu", "interpret": interpret}


def with_gradients(f, x, w, mask, dy, **options):
    """The product, and its gradients for x and w."""
    y, back = jax.vjp(lambda x, w: f(x, w, mask, **options), x, w)
    return y, *back(dy.astype(y.dtype))


def check(found, x, w, mask, dy, dtype):
    exact = [a.astype(jnp.float32) for a in (x, w)]
    dy = dy.astype(jnp.float32)
    wanted = with_gradients(reference.masked_matmul, *exact, mask, dy)
    for name, a, b in zip(("y", "dx", "dw"), found, wanted, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        size = max(1.0, float(jnp.abs(b).max(initial=0)))
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max(initial=0)
        assert error <= TOLERANCE[dtype] * size, name
    assert not found[2][~mask].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "backend"), CASES, ids=str)
def test_agrees_with_the_masked_matrix(shape, backend, dtype):
    x, w, mask, dy = make(shape, dtype)
    options = backend_options(backend)

    @jax.jit
    def fast(x, w, mask, dy):
        return with_gradients(jp.kernels.masked_matmul, x, w, mask, dy, **options)

    check(fast(x, w, jp.masks.pack(mask), dy), x, w, mask, dy, dtype)


@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_boolean_masks_other_packings_and_what_is_pruned(backend):
    shape, options = shapes.WIDE[1], backend_options(backend)
    x, w, mask, dy = make(shape)
    right = with_gradients(reference.masked_matmul, x, w, mask, dy)
    # What is pruned counts for nothing, whatever it is.
    w = jnp.where(mask, w, jnp.nan)
    along_n = jp.masks.repack(mask, jp.masks.PackedMask(mask, mask.shape, 1))
    fast = jax.jit(
        lambda mask: with_gradients(jp.kernels.masked_matmul, x, w, mask, dy, **options)
    )
    plain = jp.masks.PackedMask(mask, mask.shape, None)
    for m in (along_n,) if backend == "tpu" else (mask, along_n, plain):
        for a, b in zip(fast(m), right, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_stacks(backend):
    # The interpreter that looks for races does not take kernels under vmap.
    options = {"backend": backend, "interpret": backend == "tpu"}
    x, w, mask, dy = make(shapes.Shape(2, 256, 130, 0.5), stack=(2,))

    @jax.jit
    def fast(x, w, mask, dy):
        return with_gradients(jp.kernels.masked_matmul, x, w, mask, dy, **options)

    check(fast(x, w, jp.masks.pack(mask), dy), x, w, mask, dy, "float32")


def test_leading_axes_and_promotion():
    x, w, mask, _ = make(shapes.SMALL[1])
    y = jp.kernels.masked_matmul(jnp.stack([x, 2 * x])[:, None], w, mask)
    wanted = reference.masked_matmul(x, w, mask)
    np.testing.assert_allclose(y[1, 0], 2 * wanted, atol=1e-4)
    assert jp.kernels.masked_matmul(x[0], w, mask).shape == (70,)
    y = jp.kernels.masked_matmul(x, w.astype(jnp.bfloat16), mask)
    assert y.dtype == jnp.float32


def test_messages():
    f = jp.kernels.masked_matmul
    x, w = jnp.ones((3, 8)), jnp.ones((8, 6))
    with pytest.raises(ValueError, match=r"mask: its shape is \(6, 8\), that of w is"):
        f(x, w, jnp.ones((6, 8), bool))
    with pytest.raises(
        ValueError, match=r"x: its shape is \(3, 6\); expected \['...', 8\]"
    ):
        f(x[:, :6], w, w != 0)
    with pytest.raises(TypeError, match="mask: it is float32; expected bool"):
        f(x, w, w)
    with pytest.raises(ValueError, match="backend: got 'gpu'; expected"):
        f(x, w, w != 0, backend="gpu")
    with pytest.raises(
        ValueError, match="this matrix: it is 8 x 6; expected 256 x 128"
    ):
        f(x, w, w != 0, backend="tpu")
    x, w = jnp.ones((3, 256), jnp.float16), jnp.ones((256, 128), jnp.float16)
    with pytest.raises(ValueError, match="this matrix: it would be float16"):
        f(x, w, w != 0, backend="tpu")
