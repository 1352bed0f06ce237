"""N:M products against the dense one, forward and backward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxprune.kernels.nm_matmul import reference, shapes

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest number in the result
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def make(shape, dtype="float32", *, seed=0, stack=()):
    """x, the packed matrix, and a cotangent; the first groups are empty."""
    random = np.random.default_rng(seed)
    rows, k, cols, n, m, stride = shape
    groups = -(-k // (m * stride))
    rank = random.random((*stack, groups, m, stride, cols)).argsort(-3).argsort(-3)
    mask = (rank < n).reshape(*stack, -1, cols)[..., :k, :]
    mask[..., : m * stride, : cols // 2] = False
    x, w, dy = (
        jnp.asarray(random.standard_normal((*stack, *s)), dtype)
        for s in ((rows, k), (k, cols), (rows, cols))
    )
    return x, jp.formats.pack(w, jnp.asarray(mask), jp.NM(n, m, stride=stride)), dy


def with_gradients(f, x, packed, dy):
    """The product, and its gradients for x and the values."""

    def product(x, values):
        return f(x, dataclasses.replace(packed, values=values))

    y, back = jax.vjp(product, x, packed.values)
    return y, *back(dy.astype(y.dtype))


def float32(tree):
    return jax.tree.map(
        lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        tree,
    )


def assert_close(found, wanted, dtype):
    for name, a, b in zip(("y", "dx", "dvalues"), found, wanted, strict=False):
        assert a.dtype == dtype and a.shape == b.shape, name
        size = max(1.0, float(jnp.abs(b).max(initial=0)))
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max(initial=0)
        assert error <= TOLERANCE[dtype] * size, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*shapes.SMALL, *shapes.WIDE[2:5]], ids=str)
def test_agrees_with_the_dense_product(shape, dtype):
    x, packed, dy = make(shape, dtype)

    @jax.jit
    def fast(x, packed, dy):
        return with_gradients(jp.kernels.nm_matmul, x, packed, dy)

    w = reference.dense(float32(packed))
    exact, dy32 = float32((x, dy))
    wanted = exact @ w, dy32 @ w.T, packed.pick(exact.T @ dy32)
    assert_close(fast(x, packed, dy), wanted, dtype)


@pytest.mark.parametrize("shape", shapes.WIDE, ids=str)
def test_tpu_kernel(shape):
    x, packed, _ = make(shape, "bfloat16")
    y = jp.kernels.nm_matmul(x, packed, backend="tpu", interpret=INTERPRET)
    wanted = reference.nm_matmul(*float32((x, packed)))
    assert_close([y], [wanted], "bfloat16")


@pytest.mark.parametrize("backend", ["xla", "tpu"])
def test_stacked_matrices(backend):
    shape = shapes.Shape(3, 256, 128, 2, 4)
    x, packed, dy = make(shape, "bfloat16", stack=(2,))

    def product(x, packed):
        # The interpreter that finds races does not take what vmap makes of a kernel.
        interpret = backend == "tpu"
        return jp.kernels.nm_matmul(x, packed, backend=backend, interpret=interpret)

    found = with_gradients(product, x[:, None], packed, dy[:, None])
    wanted = with_gradients(reference.nm_matmul, *float32((x, packed, dy)))
    assert_close((found[0][:, 0], found[1][:, 0], found[2]), wanted, "bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_narrow_values(dtype):
    random = np.random.default_rng(0)
    w = jnp.asarray(random.integers(-9, 9, (32, 8)), dtype)
    packed = jp.formats.pack(w, jp.NM(2, 4).best("w", w.astype(float)), jp.NM(2, 4))
    x = jnp.asarray(random.integers(-3, 3, (4, 32)), jnp.bfloat16)
    y, dx = jax.value_and_grad(lambda x: jp.kernels.nm_matmul(x, packed).sum())(x)
    dense = jp.formats.unpack(packed).astype(jnp.float32)
    assert y == (x.astype(jnp.float32) @ dense).astype(jnp.bfloat16).sum()
    np.testing.assert_allclose(dx[0], dense.sum(1).astype(jnp.bfloat16))


def test_leading_axes_of_x():
    x, packed, _ = make(shapes.SMALL[0])
    wanted = reference.nm_matmul(x, packed)
    np.testing.assert_allclose(jp.kernels.nm_matmul(x[0], packed), wanted[0], atol=1e-5)
    found = jp.kernels.nm_matmul(x[None, None], packed)
    np.testing.assert_allclose(found, wanted[None, None], atol=1e-5)
    assert jp.kernels.nm_matmul(x[:0], packed).shape == (0, 24)


@pytest.mark.parametrize("rows", [16, 65])
def test_tpu_takes_the_kernel_for_few_rows(rows):
    x, packed, _ = make(shapes.Shape(rows, 512, 256, 2, 4), "bfloat16")
    exported = jax.export.export(jax.jit(jp.kernels.nm_matmul), platforms=["tpu"])
    text = exported(x, packed).mlir_module()
    assert ("tpu_custom_call" in text) == (rows <= 64)


def test_messages():
    x, packed, _ = make(shapes.SMALL[0])
    f = jp.kernels.nm_matmul
    with pytest.raises(TypeError, match="packed: got int; expected an NMArray"):
        f(x, 3)
    with pytest.raises(
        TypeError, match="x: its type is int32; expected floating-point"
    ):
        f(x.astype(jnp.int32), packed)
    with pytest.raises(
        ValueError, match=r"x: its shape is \(1, 63\); expected \['...', 64"
    ):
        f(x[:, 1:], packed)
    with pytest.raises(
        ValueError, match="backend: got 'cpu'; expected 'gpu', 'tpu', 'xla' or"
    ):
        f(x, packed, backend="cpu")
    with pytest.raises(
        ValueError, match="'tpu' does not take this matrix: its values are"
    ):
        f(x, packed, backend="tpu")
    x, packed, _ = make(shapes.SMALL[3], "bfloat16")
    with pytest.raises(
        ValueError, match=r"'tpu' does not take this matrix: it is 3:7 of"
    ):
        f(x, packed, backend="tpu")
