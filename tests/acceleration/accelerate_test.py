"""`accelerate`: the same numbers from packed leaves, and honest reasons for dense ones."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
BLOCK = jp.Block(64, 64)  # large enough for a CPU


def dense(shape):
    return jax.random.normal(KEY, shape) / shape[-2] ** 0.5


def mlp(params, x):
    x = jax.nn.relu(x @ params["up"]["kernel"] + params["up"]["bias"])
    return x @ params["down"]["kernel"]


@pytest.fixture
def pruned():
    params = {
        "up": {"kernel": dense((512, 1024)), "bias": jnp.ones(1024)},
        "down": {"kernel": dense((1024, 512))},
    }
    return jp.prune(params, 0.9, structure=BLOCK)


def test_same_result_and_gradients(pruned):
    params, masks = pruned
    x = jax.random.normal(KEY, (256, 512))
    fast, packed, report = jp.accelerate(mlp, params, masks, x)
    assert [c.go for c in report.choices] == [True, True]
    assert jax.tree.structure(packed) != jax.tree.structure(params)
    np.testing.assert_allclose(jax.jit(fast)(packed, x), mlp(params, x), atol=1e-4)

    def of_values(values, x):
        return jnp.sum(fast(jp.formats.with_values(packed, values), x) ** 2)

    def of_dense(params, x):
        return jnp.sum(mlp(params, x) ** 2)

    found = jax.jit(jax.grad(of_values, (0, 1)))(jp.formats.values(packed), x)
    wanted = jax.grad(of_dense, (0, 1))(params, x)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-4)
    np.testing.assert_allclose(
        found[0]["up"]["bias"], wanted[0]["up"]["bias"], rtol=1e-4, atol=1e-4
    )
    grads = jp.formats.with_values(packed, found[0])
    for name in ("up", "down"):
        there = jnp.where(masks[name]["kernel"], wanted[0][name]["kernel"], 0)
        unpacked = jp.formats.unpack(grads[name]["kernel"])
        np.testing.assert_allclose(unpacked, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_rows_sharded_over_a_mesh(pruned, kind):
    kind = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        whole = jax.NamedSharding(mesh, jax.P())
        params, masks = jax.device_put(pruned, whole)
        x = jax.random.normal(KEY, (256, 512))
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        fast, packed, report = jp.accelerate(mlp, params, masks, x)
        assert [c.go for c in report.choices] == [True, True]
        y = jax.jit(fast)(packed, x)
        assert y.sharding.spec[0] == "data"
        np.testing.assert_allclose(y, mlp(params, x), atol=1e-4)

        def loss(values):
            return jnp.sum(fast(jp.formats.with_values(packed, values), x) ** 2)

        found = jax.jit(jax.grad(loss))(jp.formats.values(packed))
        wanted = jax.grad(lambda p: jnp.sum(mlp(p, x) ** 2))(params)
        np.testing.assert_allclose(
            found["up"]["bias"], wanted["up"]["bias"], rtol=1e-4, atol=1e-4
        )


def test_other_shapes_than_the_example(pruned):
    params, masks = pruned
    example = jax.ShapeDtypeStruct((256, 512), jnp.float32)
    fast, packed, _ = jp.accelerate(mlp, params, masks, example)
    for rows in (1, 7):
        x = jax.random.normal(KEY, (rows, 512))
        np.testing.assert_allclose(fast(packed, x), mlp(params, x), atol=1e-4)


def test_optimizer_state_is_as_large_as_the_values(pruned):
    params, masks = pruned
    x = jax.random.normal(KEY, (256, 512))
    _, packed, report = jp.accelerate(mlp, params, masks, x)
    state = optax.adam(1e-3).init(jp.formats.values(packed))
    kept = sum(p["kernel"].values.size for p in packed.values())
    assert sum(m.size for m in jax.tree.leaves(state[0].mu)) == kept + 1024
    held = sum(p["kernel"].nbytes for p in packed.values())
    assert sum(c.nbytes for c in report.choices) == held
    assert held < 0.12 * sum(c.dense_nbytes for c in report.choices)


def test_scan_over_stacked_layers():
    params, masks = jp.prune({"kernel": dense((3, 512, 512))}, 0.9, structure=BLOCK)

    def fn(params, x):
        @jax.checkpoint
        def layer(x, w):
            return jax.nn.relu(x @ w.astype(jnp.float32)), x.sum()

        return jax.lax.scan(layer, x, params["kernel"])

    x = jax.random.normal(KEY, (256, 512))
    fast, packed, report = jp.accelerate(fn, params, masks, x)
    assert report.choices[0].go and report.choices[0].rows == 3 * 256
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        jax.jit(fast)(packed, x), fn(params, x),
    )  # fmt: skip


def test_contracted_from_the_other_side_and_into_many_axes():
    params = {"left": dense((512, 512)), "heads": dense((512, 8, 64))}
    masks = {
        "left": jp.prune(params["left"], 0.9, structure=BLOCK)[1],
        "heads": jp.prune(
            params["heads"], 0.9, structure=jp.Block(64, 64, axis=0, out_axis=(1, 2))
        )[1],
    }
    params = jp.masks.apply(params, masks)

    def fn(params, x):
        y = params["left"] @ x.T  # over the last axis of the leaf
        return jnp.einsum("km,khd->hmd", y, params["heads"])

    x = jax.random.normal(KEY, (256, 512))
    fast, packed, report = jp.accelerate(fn, params, masks, x)
    assert all(c.go for c in report.choices), report
    np.testing.assert_allclose(
        jax.jit(fast)(packed, x), fn(params, x), rtol=1e-4, atol=1e-4
    )


def test_reasons_for_leaving_a_leaf_dense():
    params = {
        "scattered": dense((512, 512)),
        "table": dense((512, 512)),
        "twice": dense((512, 512)),
        "unused": dense((512, 512)),
        "never": dense((512, 512)),
    }
    params, masks = jp.prune(params, 0.9, structure=BLOCK, where="!never")
    masks["scattered"] = jax.random.bernoulli(KEY, 0.5, (512, 512))

    def fn(params, x):
        y = x @ params["scattered"] + params["table"][0]
        return y @ params["twice"] @ params["twice"].T @ params["never"]

    x = jax.random.normal(KEY, (256, 512))
    fast, packed, report = jp.accelerate(fn, params, masks, x)
    reasons = {c.path: c.reason for c in report.choices}
    assert "never" not in reasons
    assert [c.path for c in report.choices if c.go] == ["twice"]
    assert reasons["scattered"].endswith("times as fast; expected 1.1")
    assert "Bitmap 0." in reasons["scattered"]
    assert "not followed further" in reasons["table"]
    assert reasons["unused"] == "not used in a product"
    masked = jp.masks.apply(params, masks)
    np.testing.assert_allclose(fast(packed, x), fn(masked, x), rtol=1e-5, atol=1e-4)
    table = str(report).splitlines()
    assert len(table) == 6 and "1 of 4 masked leaves are packed" in table[-1]


def test_measured_choices_are_timed():
    params, masks = jp.prune({"w": dense((128, 128))}, 0.75, structure=jp.NM(1, 4))

    def fn(p, x):
        return x @ p["w"] @ p["w"].T

    x = jax.random.normal(KEY, (8, 128))
    fast, packed, report = jp.accelerate(
        fn, params, masks, x, measure=True, prefer="memory", slowdown=math.inf
    )
    (choice,) = report.choices
    assert choice.basis == "measured" and choice.format == "NM(1, 4)"
    seconds = {c.format: c.seconds for c in choice.candidates}
    assert all(0 < seconds[name] < 1 for name in ("dense", "NM(1, 4)", "Bitmap"))
    full = next(c for c in choice.candidates if c.format == "Block(64, 64)")
    assert math.isnan(full.seconds) and full.reason == "the mask keeps 100% of them"
    np.testing.assert_allclose(fast(packed, x), fn(params, x), atol=1e-4)


def one(fn, *args, rows=256, packed=True):
    """`accelerate` on a matrix that pays; checks what comes out, and whether it is packed."""
    params, masks = jp.prune({"w": dense((512, 512))}, 0.9, structure=BLOCK)
    x = jax.random.normal(KEY, (rows, 512))
    fast, held, report = jp.accelerate(fn, params, masks, x, *args)
    assert report.choices[0].go == packed, report
    return fast, held, params, x


def low(p, x):
    w = p["w"].astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return x @ w


def logits(p, x):
    half = jnp.bfloat16
    return jnp.dot(
        x.astype(half), p["w"].astype(half), preferred_element_type=jnp.float32
    )


@pytest.mark.parametrize("fn", [low, logits])
def test_casts_and_types_are_those_of_the_function(fn):
    fast, held, params, x = one(fn)
    found, wanted = jax.jit(fast)(held, x), fn(params, x)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_types_without_a_kernel_stay_dense():
    fast, held, params, x = one(lambda p, x: jnp.fft.fft(x) @ p["w"], packed=False)
    assert fast(held, x).dtype == jnp.complex64
    with pytest.raises(TypeError, match="x: it is complex64.*Cast them"):
        packed = jp.formats.pack(params["w"], params["w"] != 0, BLOCK)
        jp.kernels.block_sparse_matmul(jnp.fft.fft(x), packed)


def test_a_leaf_that_is_returned_stays_dense():
    fast, held, params, x = one(lambda p, x: (x @ p["w"], p), packed=False)
    np.testing.assert_array_equal(fast(held, x)[1]["w"], params["w"])


def test_a_derivative_of_its_own_is_kept():
    @jax.custom_vjp
    def frozen(w):
        return w

    frozen.defvjp(lambda w: (w, None), lambda _, g: (0 * g,))
    fast, held, _, x = one(lambda p, x: x @ frozen(p["w"]), packed=False)
    assert not jax.grad(lambda p: fast(p, x).sum())(held)["w"].any()


def test_a_vector_a_scan_over_rows_and_a_total():
    for fn in (
        lambda p, x: jax.lax.scan(
            lambda c, row: (c + x @ row, None), jnp.zeros(len(x)), p["w"]
        )[0],
        lambda p, x: jnp.tensordot(x[:1].T @ x[:1], p["w"], 2),
    ):
        fast, held, params, x = one(fn, packed=False)
        np.testing.assert_allclose(fast(held, x), fn(params, x), rtol=1e-3, atol=1e-3)


def test_numpy_no_rows_and_keywords():
    def fn(p, x, scale=1.0):
        return scale * (x @ p["w"])

    fast, held, params, x = one(fn)
    on_host = jax.tree.map(np.asarray, held)
    np.testing.assert_allclose(
        fast(on_host, np.asarray(x), scale=2.0), 2 * (x @ params["w"]), atol=1e-4
    )
    assert fast(held, x[:0]).shape == (0, 512)


def test_arguments_that_take_another_way_through_the_function():
    params, masks = jp.prune({"w": dense((3, 512, 512))}, 0.9, structure=BLOCK)

    def fn(p, x):
        if x.ndim == 2:
            return jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]
        return jnp.einsum("mk,lkn->lmn", x[0], p["w"])

    x = jax.random.normal(KEY, (256, 512))
    fast, held, report = jp.accelerate(fn, params, masks, x)
    assert report.choices[0].go
    for arg in (x, x[None]):
        np.testing.assert_allclose(fast(held, arg), fn(params, arg), atol=1e-3)


def test_all_products_of_a_leaf_decide():
    few, many = (lambda p, x: x[:1] @ p["w"]), (lambda p, x: x @ p["w"])
    found = []
    for a, b in ((few, many), (many, few)):
        params, masks = jp.prune({"w": dense((512, 512))}, 0.6, structure=BLOCK)
        x = jax.random.normal(KEY, (2048, 512))
        report = jp.accelerate(
            lambda p, x, a=a, b=b: (a(p, x), b(p, x)), params, masks, x
        )[2]
        found.append(report.choices[0].speedup)
    np.testing.assert_allclose(*found)


def test_values_in_place_of_packed_leaves_are_refused():
    fast, held, params, x = one(lambda p, x: x @ p["w"])
    values = jp.formats.values(held)
    with pytest.raises(
        ValueError, match=r"params: w has shape .*with_values\(packed, v"
    ):
        fast(values, x)
    with pytest.raises(ValueError, match=r"new: a packed leaf gets values of shape"):
        jp.formats.with_values(held, params)
    # The dense leaf is as good as the packed one.
    np.testing.assert_allclose(fast(params, x), fast(held, x), atol=1e-4)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(512)(x))
        return nn.DenseGeneral((8, 64))(x)


def test_linen_and_nnx_modules():
    x = jax.random.normal(KEY, (256, 512))
    model = Linen()
    params = model.init(KEY, x)["params"]
    axes = {"*DenseGeneral*": 0, "*": -2}
    outs = {"*DenseGeneral*": (1, 2), "*": -1}
    kinds = {p: jp.Block(64, 64, axis=axes[p], out_axis=outs[p]) for p in axes}
    masks = {}
    for name, layer in params.items():
        kind = next(s for p, s in kinds.items() if p == "*" or p.strip("*") in name)
        masks[name] = jp.prune(layer, 0.9, structure=kind, where="kernel")[1]
    params = jp.masks.apply(params, masks)

    def linen(params, x):
        return model.apply({"params": params}, x)

    fast, packed, report = jp.accelerate(linen, params, masks, x)
    assert [c.go for c in report.choices] == [True, True], report
    np.testing.assert_allclose(fast(packed, x), linen(params, x), rtol=1e-4, atol=1e-4)

    module = nnx.Sequential(
        nnx.Linear(512, 512, rngs=nnx.Rngs(0)), nnx.relu,
        nnx.Linear(512, 512, rngs=nnx.Rngs(1)),
    )  # fmt: skip
    graph, state = nnx.split(module)
    state, masks = jp.prune(state, 0.9, structure=BLOCK)

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    fast, packed, report = jp.accelerate(apply, state, masks, x)
    assert [c.go for c in report.choices] == [True, True], report
    np.testing.assert_allclose(
        jax.jit(fast)(packed, x), apply(state, x), rtol=1e-4, atol=1e-4
    )


MASK = {"w": jnp.ones((4, 4), bool)}


def times(p, x):
    return x @ p["w"]


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        ({"w": jnp.ones((4, 5), bool)}, {}, r"masks: w has shape \(4, 5\)"),
        ({"w": jax.ShapeDtypeStruct((4, 4), bool)}, {}, "what w keeps is not known"),
        (
            MASK,
            {"measure": True, "device": "v5e"},
            "device: got 'v5e' with measure=True",
        ),
        (MASK, {"prefer": "size"}, "prefer: got 'size'; expected 'speed' or 'memory'"),
        (MASK, {"slowdown": 2.0}, "slowdown: got 2.0 with prefer='speed'"),
        (MASK, {"slowdown": 0.0, "prefer": "memory"}, "expected a positive number"),
    ],
)
def test_bad_input(masks, options, message):
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
    with pytest.raises(ValueError, match=message):
        jp.accelerate(times, params, masks, x, **options)


def test_masks_of_a_traced_function_are_refused():
    def inside(masks):
        return jp.accelerate(times, {"w": jnp.ones((4, 4))}, masks, jnp.ones((2, 4)))[1]

    with pytest.raises(ValueError, match="Call accelerate outside of jax.jit"):
        jax.jit(inside)(MASK)
