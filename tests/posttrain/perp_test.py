"""PERP: few parameters, exact zeros, and a merge that changes nothing."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune import posttrain

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
DENSE = ["Dense_0", "Dense_1", "Dense_2"]
KINDS = ["bias", "norm", "mask_lora", "scale_lora"]
BOTH = [*((kind, jnp.float32) for kind in KINDS), ("mask_lora", jnp.bfloat16)]


class _Net(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(32, param_dtype=self.dtype)(x)
            x = nn.gelu(nn.LayerNorm(param_dtype=self.dtype)(x))
        return nn.Dense(4, param_dtype=self.dtype)(x)


def _data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 16)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(16, 4)) / 2) + np.sin(x[:, :4])
    return jnp.asarray(x), jnp.asarray(y, jnp.float32)


def _prune(params):
    """2:4 by magnitude."""
    masks = jax.tree.map(
        lambda w: jp.NM(2, 4).best("", jnp.abs(w)) if w.ndim > 1 else None, params
    )
    return jp.masks.apply(params, masks), masks


@functools.cache
def _case(dtype=jnp.float32):
    x, _ = _data()
    params = jax.jit(_Net(dtype).init)(KEY, x)
    return _prune(params)


def _moved(few):
    """Other values in every parameter."""
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), few
    )


def _init(kind, params, masks):
    return posttrain.perp_init(params, masks, kind=kind, rank=4, key=KEY)


@pytest.mark.parametrize(("kind", "dtype"), BOTH)
def test_model_is_the_same_at_first(kind, dtype):
    params, masks = _case(dtype)
    same = posttrain.perp_params(_init(kind, params, masks), params, masks)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_ranks_of_scale_lora_go_their_own_ways():
    x, y = _data()
    params, masks = _case()
    few = _init("scale_lora", params, masks)

    def loss(few):
        out = _Net().apply(posttrain.perp_params(few, params, masks), x)
        return jnp.mean((out - y) ** 2)

    trained = _train(loss, few, 20, 1e-2)["Dense_1/kernel"]
    product = np.asarray(trained.a @ trained.b)
    assert np.linalg.matrix_rank(product, tol=1e-3) == 4


@pytest.mark.parametrize(("kind", "dtype"), BOTH)
def test_merging_changes_no_output_and_no_zero(kind, dtype):
    x, _ = _data()
    params, masks = _case(dtype)
    few = _moved(_init(kind, params, masks))

    @jax.jit
    def run(few, x):
        return _Net(dtype).apply(posttrain.perp_params(few, params, masks), x)

    merged = jax.jit(posttrain.perp_params)(few, params, masks)
    plain = jax.jit(_Net(dtype).apply)(merged, x)
    np.testing.assert_array_equal(run(few, x), plain)
    assert (plain != _Net(dtype).apply(params, x)).any()
    dtypes = [jax.tree.map(lambda x: x.dtype, tree) for tree in (merged, params)]
    assert dtypes[0] == dtypes[1]
    _zeros_stay(merged, masks)


def _zeros_stay(params, masks):
    def check(w, m):
        if m is not None:
            assert (np.asarray(w, np.float32)[~np.asarray(m)] == 0).all()

    jax.tree.map(check, params, masks, is_leaf=lambda x: x is None)


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("bias", {f"{p}/bias" for p in [*DENSE, "LayerNorm_0", "LayerNorm_1"]}),
        ("norm", {f"LayerNorm_{i}/{p}" for i in (0, 1) for p in ("scale", "bias")}),
        ("mask_lora", {f"{p}/kernel" for p in DENSE}),
        ("scale_lora", {f"{p}/kernel" for p in DENSE}),
        (("bias", "scale_lora"), None),
    ],
)  # fmt: skip
def test_gradients_flow_to_these_alone(kind, paths):
    x, y = _data()
    params, masks = _case()
    few = _moved(_init(kind, params, masks))
    if paths is not None:
        assert set(few) == paths

    def loss(few, params):
        out = _Net().apply(posttrain.perp_params(few, params, masks), x)
        return jnp.mean((out - y) ** 2)

    grads = jax.jit(jax.grad(loss))(few, params)
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(grads))
    assert sum(g.size for g in jax.tree.leaves(grads)) < sum(
        p.size for p in jax.tree.leaves(params)
    )


def test_statistics_of_norms_and_pruned_biases_are_no_parameters():
    params = {
        "bn": dict.fromkeys(["scale", "bias", "mean", "var"], jnp.ones(4)),
        "layer_norm": {"weight": jnp.ones(4)},
        "mlp": {"weight": jnp.ones((4, 4)), "b": jnp.ones((4, 4))},
    }  # fmt: skip
    masks = jax.tree.map(lambda x: None, params)
    masks["mlp"]["b"] = jnp.eye(4, dtype=bool)
    norm = posttrain.perp_init(params, masks, kind="norm")
    assert set(norm) == {"bn/scale", "bn/bias", "layer_norm/weight"}
    assert set(posttrain.perp_init(params, masks, kind="bias")) == {"bn/bias"}


def test_any_leaf_may_be_added_and_obeys_its_mask():
    params, masks = _case()
    whole = {"Dense_0/kernel": jnp.ones((16, 32)), "Dense_1/bias": jnp.full(32, 3.0)}
    new = posttrain.perp_params(whole, params, masks)["params"]
    np.testing.assert_array_equal(
        new["Dense_0"]["kernel"], masks["params"]["Dense_0"]["kernel"]
    )
    assert (new["Dense_1"]["bias"] == 3).all()
    assert new["Dense_1"]["kernel"] is params["params"]["Dense_1"]["kernel"]


def test_stacked_leaves_have_factors_for_each_layer():
    w = jax.random.normal(KEY, (3, 8, 8))
    params, masks = _prune({"w": w})
    few = _moved(posttrain.perp_init(params, masks, kind="mask_lora", rank=2, key=KEY))
    assert few["w"].a.shape == (3, 8, 2)
    new = posttrain.perp_params(few, params, masks)["w"]
    expected = params["w"][1] + 16 * few["w"].a[1] @ few["w"].b[1]
    np.testing.assert_allclose(new[1], jnp.where(masks["w"][1], expected, 0), rtol=1e-4)


def test_packed_masks_are_as_good():
    params, masks = _case()
    few = _moved(_init("mask_lora", params, masks))
    plain = posttrain.perp_params(few, params, masks)
    packed = posttrain.perp_params(few, params, jp.masks.pack(masks))
    jax.tree.map(np.testing.assert_array_equal, plain, packed)


def _train(loss, start, steps, rate):
    tx = optax.adam(optax.linear_schedule(rate, 0, steps))

    @jax.jit
    def run(start):
        def step(state, _):
            p, s = state
            updates, s = tx.update(jax.grad(loss)(p), s)
            return (optax.apply_updates(p, updates), s), None

        return jax.lax.scan(step, (start, tx.init(start)), length=steps)[0][0]

    return run(start)


def test_most_of_the_loss_comes_back_at_2_4():
    x, y = _data()

    @jax.jit
    def loss(params):
        return jnp.mean((_Net().apply(params, x) - y) ** 2)

    dense = _train(loss, jax.jit(_Net().init)(KEY, x), 300, 1e-2)
    params, masks = _prune(dense)
    few = posttrain.perp_init(params, masks, rank=4, alpha=8.0, key=KEY)
    count = sum(p.size for p in jax.tree.leaves(few))
    assert count < 0.7 * sum(p.size for p in jax.tree.leaves(params))
    few = _train(
        lambda f: loss(posttrain.perp_params(f, params, masks)), few, 200, 1e-2
    )
    merged = posttrain.perp_params(few, params, masks)
    _zeros_stay(merged, masks)
    lost, left = loss(params) - loss(dense), loss(merged) - loss(dense)
    assert lost > 10 * loss(dense)
    assert left < 0.1 * lost


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p, m: posttrain.perp_init(p, m, kind="lora"),
            "perp_init: got kind=('lora',); expected one or several of",
        ),
        (lambda p, m: posttrain.perp_init(p, m, kind=()), "perp_init: got kind=()"),
        (
            lambda p, m: posttrain.perp_init(
                p, m, kind=("mask_lora", "scale_lora"), key=KEY
            ),
            "perp_init: got both mask_lora and scale_lora",
        ),
        (lambda p, m: posttrain.perp_init(p, m), "but got key=None"),
        (lambda p, m: posttrain.perp_init(p, m, rank=0, key=KEY), "got rank=0"),
        (
            lambda p, m: posttrain.perp_init(
                {"w": jnp.ones((2, 2))}, {"w": None}, kind="norm"
            ),
            "perp_init: kind='norm' selects nothing of w",
        ),
        (
            lambda p, m: posttrain.perp_init(
                {"w": jnp.ones(2)}, {"w": jnp.ones(2, bool)}, kind="scale_lora", key=KEY
            ),
            "perp_init: w has the shape (2,); expected a matrix [K, N]",
        ),
        (
            lambda p, m: posttrain.perp_params({"nothing": jnp.ones(2)}, p, m),
            "perp_params: params has no leaf nothing",
        ),
        (
            lambda p, m: posttrain.perp_params({"Dense_0/bias": jnp.ones(2)}, p, m),
            "perp_params: the parameters for Dense_0/bias make the shape (2,), but the leaf",
        ),
        (
            lambda p, m: posttrain.perp_params(
                _init("scale_lora", p, m), p, jax.tree.map(lambda x: None, p)
            ),
            "perp_params: masks has none for Dense_0/kernel, which has a LoRA",
        ),
        (
            lambda p, m: posttrain.perp_init(p, {"w": None}),
            "masks: their structure is not",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*_case())


def test_nnx_state_keeps_its_containers():
    model = nnx.Sequential(
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params, masks = jp.prune(params, structure=jp.NM(2, 4))
    few = _moved(posttrain.perp_init(params, masks, rank=2, key=KEY))
    names = ("0/bias", "0/kernel", "1/bias", "1/scale")
    assert sorted(few) == [f"layers/{p}" for p in names]
    new = posttrain.perp_params(few, params, masks)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    x = jax.random.normal(KEY, (4, 8))
    merged = nnx.merge(graph, new, rest)
    assert (merged(x) != nnx.merge(graph, params, rest)(x)).any()
    kept = jax.tree.leaves(masks)[0]
    np.testing.assert_array_equal(merged.layers[0].kernel[...] == 0, ~kept)
