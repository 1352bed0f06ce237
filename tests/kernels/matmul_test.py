"""What all products with packed weights can do: epilogues, stacks of experts, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N = 32, 16
STRUCTURES = {"block_sparse_matmul": jp.Block(8, 8), "nm_matmul": jp.NM(2, 4)}
NAMES = list(STRUCTURES)


@functools.cache
def make(name, rows, dtype="float32", stack=()):
    """The function, x, the packed weights, and these with their zeros."""
    random = np.random.default_rng(0)
    x, w = (
        jnp.asarray(random.standard_normal(s), dtype)
        for s in ((rows, K), (*stack, K, N))
    )
    structure = STRUCTURES.get(name, jp.Unstructured())
    if name == "nm_matmul":
        mask, capacity = _best(w), None
    else:
        blocks = random.random((*stack, K // 8, N // 8)) < 0.6
        mask = jnp.asarray(np.kron(blocks, np.ones((8, 8))), bool)
        most = int(blocks.sum((-2, -1)).max())
        capacity = most * (1 if name == "block_sparse_matmul" else 64)
    packed = _pack(w, mask, structure, capacity)
    return getattr(jp.kernels, name), x, packed, _masked(w, mask)


@jax.jit
def _best(w):
    return STRUCTURES["nm_matmul"].best("w", jnp.abs(w).astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _pack(w, mask, structure, capacity):
    return jp.formats.pack(w, mask, structure, capacity=capacity)


@jax.jit
def _masked(w, mask):
    return jnp.where(mask, w, 0)


def gradients(f, packed, *operands):
    """Of a sum of squares, with respect to the operands and the values."""

    def loss(values, *operands):
        (again,) = jp.formats.with_values([packed], [values])
        return jnp.sum(jnp.square(f(again, *operands).astype(jnp.float32)))

    every = tuple(range(1 + len(operands)))
    return jax.jit(jax.grad(loss, every))(packed.values, *operands)


def of_dense(wanted, *operands):
    """The gradient of a sum of squares with respect to each operand."""
    every = tuple(range(len(operands)))
    loss = lambda *a: jnp.sum(wanted(*a) ** 2)  # noqa: E731
    return jax.jit(jax.grad(loss, every))(*operands)


@jax.jit
def of_values(packed, dw):
    """Where values stand, the gradient of a dense matrix."""
    back = jax.vjp(
        lambda v: jp.formats.unpack(jp.formats.with_values([packed], [v])[0]),
        packed.values,
    )[1]
    return back(dw)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "activation", [None, jax.nn.relu, jax.nn.gelu], ids=["none", "relu", "gelu"]
)
@pytest.mark.parametrize("name", NAMES)
def test_bias_and_activation(name, activation, dtype):
    f, x, packed, w = make(name, 5, dtype)
    bias = jnp.linspace(-2, 2, N).astype(dtype)
    y = jax.jit(lambda *a: f(a[0], a[1], bias=a[2], activation=activation))(
        x, packed, bias
    )
    act = activation or (lambda y: y)
    exact = [a.astype(jnp.float32) for a in (w, x, bias)]

    def wanted(w, x, bias):
        return act(x @ w + bias)

    # Sums are rounded once, after the activation.
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    assert y.dtype == dtype
    np.testing.assert_allclose(
        y.astype(jnp.float32),
        jax.jit(wanted)(*exact),
        rtol=tolerance,
        atol=1e-5 if dtype == "float32" else 1e-2,
    )
    found = gradients(
        lambda p, x, b: f(x, p, bias=b, activation=activation), packed, x, bias
    )
    dw, *right = of_dense(wanted, *exact)
    right = [of_values(packed, dw.astype(dtype)).astype(jnp.float32), *right]
    for a, b in zip(found, right, strict=True):
        scale = np.abs(b).max()
        error = np.abs(a.astype(jnp.float32) - b).max()
        assert a.dtype == dtype
        assert error <= (1e-5 if dtype == "float32" else 2e-2) * scale


@pytest.mark.parametrize("name", NAMES)
def test_activation_alone_and_bias_of_a_stack(name):
    f, x, packed, w = make(name, 5)
    y = jax.jit(lambda x, packed: f(x, packed, activation=jax.nn.silu))(x, packed)
    np.testing.assert_allclose(y, jax.nn.silu(x @ w), atol=1e-5)
    f, x, packed, w = make(name, 5, stack=(3,))
    bias = jnp.arange(3.0 * N).reshape(3, N)
    y = jax.jit(lambda x, packed, bias: f(x, packed, bias=bias))(
        jnp.stack([x] * 3), packed, bias
    )
    np.testing.assert_allclose(y, x @ w + bias[:, None], atol=1e-4)
    with pytest.raises(
        ValueError, match=r"bias: its shape is \(16,\); expected \[3, 16"
    ):
        f(jnp.stack([x] * 3), packed, bias=bias[0])


@pytest.mark.parametrize("name", NAMES)
def test_experts(name):
    f, _, packed, w = make(name, 5, stack=(3,))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 7, K)), jnp.float32)

    def wanted(w, x):
        return jnp.einsum("etk,ekn->etn", x, w)

    np.testing.assert_allclose(jax.jit(f)(x, packed), jax.jit(wanted)(w, x), atol=1e-4)
    mapped = jax.jit(jax.vmap(f))(x, packed)
    np.testing.assert_allclose(mapped, jax.jit(wanted)(w, x), atol=1e-4)
    dvalues, dx = gradients(lambda p, x: f(x, p), packed, x)
    dw, right = of_dense(wanted, w, x)
    np.testing.assert_allclose(dx, right, atol=1e-3)
    np.testing.assert_allclose(dvalues, of_values(packed, dw), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ragged_groups(name):
    f, x, packed, w = make(name, 11, stack=(4,))
    sizes = jnp.array([3, 0, 5, 2])  # and a row of nobody
    expert = np.repeat(np.arange(5), [3, 0, 5, 2, 1])
    bias = jnp.arange(4.0 * N).reshape(4, N)

    def wanted(w, x):
        rows = jnp.einsum("tk,tkn->tn", x[:10], w[expert[:10]])
        return jnp.pad(jax.nn.relu(rows + bias[expert[:10]]), ((0, 1), (0, 0)))

    def product(p, x):
        return f(x, p, group_sizes=sizes, bias=bias, activation=jax.nn.relu)

    np.testing.assert_allclose(
        jax.jit(product)(packed, x), jax.jit(wanted)(w, x), atol=1e-4
    )
    dvalues, dx = gradients(product, packed, x)
    dw, right = of_dense(wanted, w, x)
    np.testing.assert_allclose(dx, right, atol=1e-2)
    np.testing.assert_allclose(dvalues, of_values(packed, dw), atol=1e-2)
    with pytest.raises(
        ValueError, match=r"group_sizes: it is int32\[3\]; expected int"
    ):
        f(x, packed, group_sizes=sizes[1:])
    with pytest.raises(ValueError, match=r"x: its shape is \(1, 11, 32\), and packed"):
        f(x[None], packed, group_sizes=sizes)
    with pytest.raises(ValueError, match="backend: got 'tpu' with group_sizes"):
        f(x, packed, group_sizes=sizes, backend="tpu")


@pytest.mark.parametrize("rows", [16, 512])
@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("name", [*NAMES, "bitmap_matmul"])
def test_rows_over_a_mesh(name, kind, rows):
    f, x, packed, w = make(name, rows)
    kinds = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kinds,) * 2)
    right = gradients(lambda p, x: f(x, p), packed, x)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        packed = jax.device_put(packed, NamedSharding(mesh, P()))

        def product(packed, x):
            if kind != "shard_map":
                return f(x, packed)
            specs = P("data"), P()
            return jax.shard_map(f, in_specs=specs, out_specs=P("data"))(x, packed)

        y = jax.jit(product)(packed, x)
        found = gradients(product, packed, x)
    assert y.sharding.spec[0] == "data"
    np.testing.assert_allclose(y, np.asarray(x) @ np.asarray(w), atol=1e-4)
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_stacks_over_an_explicit_mesh():
    f, _, packed, w = make("nm_matmul", 1, stack=(4,))
    mesh = jax.make_mesh(
        (4, 2), ("expert", "data"), axis_types=(AxisType.Explicit,) * 2
    )
    x = np.random.default_rng(1).standard_normal((4, 6, K)).astype(np.float32)
    with jax.set_mesh(mesh):
        there = jax.device_put(x, NamedSharding(mesh, P("expert", "data")))
        packed = jax.device_put(packed, NamedSharding(mesh, P("expert")))
        y = jax.jit(f)(there, packed)
    assert y.sharding.spec[:2] == ("expert", "data")
    np.testing.assert_allclose(y, x @ np.asarray(w), atol=1e-4)


def test_what_an_explicit_mesh_cannot_do():
    f, x, packed, _ = make("nm_matmul", 8)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        along_k = jax.device_put(x, NamedSharding(mesh, P(None, "model")))
        whole = jax.device_put(packed, NamedSharding(mesh, P()))
        with pytest.raises(
            ValueError, match="sharded along the axis that is contracted"
        ):
            f(along_k, whole)
        along_n = jax.device_put(packed, NamedSharding(mesh, P(None, "model")))
        with pytest.raises(
            ValueError, match="packed: an array of it is.*whole matrices"
        ):
            f(jax.device_put(x, NamedSharding(mesh, P("data"))), along_n)
