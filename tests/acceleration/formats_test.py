"""Leaves in each format behind a function: N:M, bitmaps, transposes, and packed before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.acceleration import _packing

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
BLOCK, NM, ANY = jp.Block(32, 32), jp.NM(2, 4), jp.Unstructured()


def dense(*shape):
    return jax.random.normal(KEY, shape) / shape[-2] ** 0.5


def pruned(structure, *shape):
    sparsity = 0.5 if structure == NM else 0.8
    return jp.prune({"w": dense(*shape)}, sparsity, structure=structure)


def both_ways(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


@pytest.mark.parametrize("structure", [BLOCK, NM, ANY], ids=["block", "nm", "bitmap"])
@pytest.mark.parametrize("known", [False, True], ids=["argument", "constant"])
def test_contracted_over_both_axes(structure, known):
    params, _ = pruned(structure, 64, 96)
    packed = {"w": jp.formats.pack(params["w"], params["w"] != 0, structure)}
    x = jax.random.normal(KEY, (160, 64))  # so many rows that a known pattern is used
    fast, again, report = jp.accelerate(both_ways, packed, {"w": None}, x)
    assert again["w"] is packed["w"]
    assert report.choices[0].reason == "packed already" and report.choices[0].go

    def loss(values, packed, x):
        return jnp.sum(fast(jp.formats.with_values(packed, values), x) ** 2)

    def of_dense(params, x):
        return jnp.sum(both_ways(params, x) ** 2)

    held = (lambda values, x: loss(values, packed, x)) if known else None
    gradient = jax.jit(jax.value_and_grad(held or loss, (0, 1 if known else 2)))
    operands = (x,) if known else (packed, x)
    values = jp.formats.values(packed)
    y, (dvalues, dx) = gradient(values, *operands)
    wanted, (dw, dx_wanted) = jax.value_and_grad(of_dense, (0, 1))(params, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5)
    np.testing.assert_allclose(dx, dx_wanted, rtol=1e-4, atol=1e-4)
    dw_packed = jp.formats.unpack(jp.formats.with_values(packed, dvalues)["w"])
    held = params["w"] != 0 if structure != BLOCK else dw_packed != 0
    np.testing.assert_allclose(
        dw_packed, jnp.where(held, dw["w"], 0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("structure", [BLOCK, NM, ANY], ids=["block", "nm", "bitmap"])
def test_types_of_products_and_gradients(structure):
    half = jnp.bfloat16
    w = jnp.zeros((256, 128), half).at[::4, ::4].set(1)
    packed = {"w": jp.formats.pack(w, w != 0, structure)}
    fast, _, _ = jp.accelerate(both_ways, packed, {"w": None}, jnp.ones((8, 256), half))

    def gradient(values, x):
        return jax.grad(
            lambda v, x: fast(jp.formats.with_values(packed, v), x).sum(), (0, 1)
        )(values, x)

    x = jax.ShapeDtypeStruct((8, 256), half)
    values = jp.formats.values(packed)
    found = jax.eval_shape(gradient, values, x)
    assert found == jax.eval_shape(lambda: (values, jnp.zeros(x.shape, half)))
    widened = jax.eval_shape(fast, packed, jax.ShapeDtypeStruct((8, 256), jnp.float32))
    assert widened.dtype == jnp.float32


def test_a_leaf_used_twice_is_packed_once():
    params, masks = pruned(jp.Block(64, 64), 512, 512)
    x = jax.random.normal(KEY, (256, 512))
    fast, packed, report = jp.accelerate(both_ways, params, masks, x)
    (choice,) = report.choices
    assert choice.go and choice.rows == 512
    found = jax.jit(fast)(packed, x)
    np.testing.assert_allclose(found, both_ways(params, x), rtol=1e-4, atol=1e-4)


def test_a_transpose_costs_more_where_blocks_are_reordered():
    params, masks = pruned(jp.Block(128, 128), 512, 512)

    def speedup(fn, device):
        x = jnp.ones((4, 512))
        return jp.accelerate(fn, params, masks, x, device=device)[2].choices[0].speedup

    for device in ("cpu", "v5e"):
        forward = speedup(lambda p, x: x @ p["w"], device)
        assert 1 < speedup(lambda p, x: x @ p["w"] @ p["w"].T, device) < forward


def test_a_gradient_inside_the_function():
    params, masks = pruned(jp.Block(64, 64), 512, 256)

    def fn(p, x):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))(x)

    x = jax.random.normal(KEY, (256, 512))
    fast, packed, report = jp.accelerate(fn, params, masks, x)
    assert report.choices[0].go and report.choices[0].rows == 512
    for found, wanted in zip(jax.jit(fast)(packed, x), fn(params, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_transposed_leaf_in_a_scan_with_checkpoints():
    params, _ = pruned(jp.Block(32, 32), 3, 64, 64)
    packed = {"w": jp.formats.pack(params["w"], params["w"] != 0, BLOCK)}

    def fn(p, x):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(x @ w) @ w.T, None

        return jax.lax.scan(layer, x, p["w"])[0]

    x = jax.random.normal(KEY, (8, 64))
    fast = jp.accelerate(fn, packed, {"w": None}, x)[0]

    def loss(values, x):
        return fast(jp.formats.with_values(packed, values), x).sum()

    found = jax.jit(jax.grad(loss, 1))(jp.formats.values(packed), x)
    wanted = jax.grad(lambda x: fn(params, x).sum())(x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "shape", "axes"),
    [
        ("mk,kn->mn", (128, 256), -2),
        ("mk,nk->mn", (256, 128), -1),
        ("mk,khd->hmd", (128, 4, 64), 0),
        ("mhk,hkn->mn", (2, 64, 256), (0, 1)),
    ],
)
def test_memory_packs_nm_along_the_contracted_axis(spec, shape, axes):
    params, masks = jp.prune(
        {"w": dense(*shape)}, 0.75, structure=jp.NM(1, 4, axis=axes)
    )
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    x = jax.random.normal(KEY, (4, 2, 64) if spec.startswith("mh") else (4, 128))

    def fn(p, x):
        return jnp.einsum(spec, x.astype(jnp.bfloat16), p["w"])

    fast, packed, report = jp.accelerate(
        fn, params, masks, x, prefer="memory", slowdown=100.0
    )
    (choice,) = report.choices
    assert choice.format == "NM(1, 4)" and choice.nbytes == packed["w"].nbytes
    assert choice.nbytes < 0.35 * choice.dense_nbytes and choice.speedup < 1
    assert (jp.formats.unpack(packed["w"]) == params["w"]).all()
    found, wanted = jax.jit(fast)(packed, x), fn(params, x)
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_allclose(
        found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=0.05, atol=0.05
    )


def test_nm_for_few_rows_on_a_tpu():
    params, masks = pruned(NM, 512, 256)
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    for rows, go in ((8, True), (512, False)):
        x = jnp.ones((rows, 512), jnp.bfloat16)
        choice = jp.accelerate(lambda p, x: x @ p["w"], params, masks, x, device="v5e")[
            2
        ].choices[0]
        assert choice.go == go and choice.basis == "predicted, not timed", choice
        assert {c.format for c in choice.candidates} >= {"dense", "NM(2, 4)", "Bitmap"}


def test_a_bitmap_of_a_stack_of_heads():
    params = {"w": dense(3, 64, 4, 16)}
    masks = {"w": jax.random.bernoulli(KEY, 0.1, params["w"].shape)}
    params = jp.masks.apply(params, masks)

    def fn(p, x):
        def layer(x, w):
            return jnp.einsum("mk,khd->mhd", x, w).reshape(x.shape), None

        return jax.lax.scan(layer, x, p["w"])[0]

    x = jax.random.normal(KEY, (8, 64))
    fast, packed, report = jp.accelerate(
        fn, params, masks, x, prefer="memory", slowdown=1e3
    )
    assert report.choices[0].format == "Bitmap"
    np.testing.assert_allclose(jax.jit(fast)(packed, x), fn(params, x), atol=1e-5)


def test_shapes_of_parameters_give_a_plan():
    params, masks = jp.prune({"w": dense(512, 512)}, 0.9, structure=jp.Block(64, 64))
    masks["scattered"] = jnp.ones((512, 512), bool)
    params["scattered"], params["bias"], masks["bias"] = (
        dense(512, 512),
        jnp.ones(512),
        None,
    )

    def fn(p, x):
        return x @ p["w"] @ p["scattered"] + p["bias"]

    x = jax.random.normal(KEY, (256, 512))
    shapes = jax.eval_shape(lambda: params)
    _, plan, report = jp.accelerate(fn, shapes, masks, x)
    fast, packed, real = jp.accelerate(fn, params, masks, x)
    assert report == real and report.choices[1].go
    assert jax.eval_shape(lambda: packed) == plan
    assert jax.eval_shape(fast, plan, x).shape == (256, 512)


def test_packed_by_the_user_next_to_masks():
    params = {"a": dense(64, 64), "b": dense(64, 64), "c": dense(64, 64)}
    quarter = jp.prune(params["a"], 0.75, structure=jp.NM(1, 4))[0]
    packed = params | {"a": jp.formats.pack(quarter, quarter != 0, jp.NM(1, 4))}
    masks = {"a": None, "b": jnp.ones((64, 64), bool), "c": None}

    def fn(p, x):
        return x @ p["a"] @ p["b"] @ p["c"]

    x = jax.random.normal(KEY, (8, 64))
    fast, held, report = jp.accelerate(fn, packed, masks, x)
    assert [(c.path, c.format) for c in report.choices] == [
        ("a", "NM(1, 4)"), ("b", "dense")
    ]  # fmt: skip
    assert report.choices[0].sparsity == 0.75
    wanted = fn(params | {"a": quarter}, x)
    np.testing.assert_allclose(fast(held, x), wanted, rtol=1e-4, atol=1e-4)
    # And packed after the fact, in another format.
    held["c"] = jp.formats.pack(params["c"], params["c"] != 0, ANY)
    np.testing.assert_allclose(fast(held, x), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match="masks: a has one, but params holds it packed"
    ):
        jp.accelerate(fn, packed, masks | {"a": quarter != 0}, x)


def test_a_packed_leaf_that_is_written_out_says_so():
    w = dense(64, 64)
    packed = {"w": jp.formats.pack(w, w != 0, ANY)}
    fast, _, report = jp.accelerate(lambda p, i: p["w"][i], packed, {"w": None}, 3)
    (choice,) = report.choices
    assert choice.reason.startswith("packed already, but written out: used by ")
    np.testing.assert_array_equal(fast(packed, 3), w[3])


def test_packed_for_other_axes():
    w = dense(8, 8, 8)
    block = jp.Block(4, 4, axis=(0, 1), out_axis=2)
    packed = {"w": jp.formats.pack(w, w != 0, block)}

    def fn(p, x):
        return jnp.einsum("mk,khd->mhd", x, p["w"])

    x = jax.random.normal(KEY, (4, 8))
    fast, _, report = jp.accelerate(fn, packed, {"w": None}, x)
    assert "written out: contracted over other axes" in report.choices[0].reason
    np.testing.assert_allclose(fast(packed, x), fn({"w": w}, x), rtol=1e-5, atol=1e-5)


def test_products_that_are_never_done_or_done_again():
    params, masks = pruned(jp.Block(64, 64), 512, 512)

    def fn(p, x, length):
        return jax.lax.scan(lambda x, _: (x @ p["w"] @ p["w"], None), x, length=length)[
            0
        ]

    x = jnp.ones((16, 512))
    for length, rows in ((0, 0), (3, 96)):
        _, _, report = jp.accelerate(
            lambda p, x, n=length: fn(p, x, n), params, masks, x
        )
        assert report.choices[0].rows == rows and report.choices[0].go == (rows > 0)
    assert "not used in a product" in str(
        jp.accelerate(lambda p, x: fn(p, x, 0), params, masks, x)[2]
    )


def test_integers_with_a_scale():
    w = jnp.round(dense(64, 64) * 50).astype(jnp.int8)
    packed = {"w": jp.formats.pack(w, w != 0, ANY), "scale": jnp.ones(64) / 50}

    def fn(p, x):
        return (x @ p["w"].astype(x.dtype)) * p["scale"]

    x = jax.random.normal(KEY, (8, 64))
    fast, held, _ = jp.accelerate(fn, packed, {"w": None, "scale": None}, x)
    np.testing.assert_allclose(
        jax.jit(fast)(held, x), fn(packed | {"w": w}, x), atol=1e-4
    )


def test_groups_that_a_mask_allows():
    def names(mask, *orders):
        orders = orders or (((-2,), (-1,)),)
        return [p.name for p in _packing.allowed(np.asarray(mask), list(orders))]

    half = jp.prune(dense(64, 64), 0.5, structure=NM)[1]
    assert names(half) == ["Block(64, 64)", "Block(32, 32)", "NM(2, 4)", "Bitmap"]
    assert "NM(2, 4)" not in names(half.T)
    assert "NM(2, 4)" in names(half.T, ((-1,), (-2,)))
    assert "NM(2, 4)" in names(half.T, ((-2,), (-1,)), ((-1,), (-2,)))
    assert names(jnp.ones((64, 64)))[2:] == ["Bitmap"]
    assert names(jnp.zeros((64, 64)))[2:] == [
        "NM(1, 2)", "NM(1, 4)", "NM(1, 8)", "NM(1, 16)", "Bitmap"
    ]  # fmt: skip
    assert names(jnp.zeros((8, 8))) == ["NM(1, 2)", "NM(1, 4)", "NM(1, 8)", "Bitmap"]


def test_details_name_every_candidate():
    params, masks = pruned(BLOCK, 256, 256)
    x = jnp.ones((256, 256))
    report = jp.accelerate(lambda p, x: x @ p["w"], params, masks, x, device="v5e")[2]
    lines = report.details().splitlines()
    assert len(lines) == 1 + len(report.choices[0].candidates)
    assert [x for x in lines if "no kernel on v5e for blocks of 32" in x]
    for candidate in report.choices[0].candidates:
        assert (candidate.reason == "") == (
            candidate.format == report.choices[0].format
        )
