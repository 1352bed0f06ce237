"""Packed leaves under an optimizer: masks of their values keep what is pruned at 0."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("structure", "stack"),
    [(jp.Block(8, 8), (3,)), (jp.NM(2, 4), ()), (jp.Unstructured(), (3,))],
    ids=["block", "nm", "bitmap"],
)
def test_value_masks_are_the_mask_where_values_stand(structure, stack):
    w = jax.random.normal(KEY, (*stack, 32, 24))
    mask = jp.prune(w, 0.5, structure=structure)[1]
    fewer = mask & jax.random.bernoulli(KEY, 0.5, mask.shape)
    packed = {"w": jp.formats.pack(w, mask, structure), "bias": jnp.ones(24)}
    found = jp.formats.value_masks(packed, {"w": fewer, "bias": None})
    assert found["bias"] is None and found["w"].dtype == bool
    assert found["w"].shape == packed["w"].values.shape
    ones = {**found, "w": found["w"].astype(jnp.int32)}
    again = jp.formats.with_values(packed, ones)["w"]
    np.testing.assert_array_equal(jp.formats.unpack(again), fewer)
    assert found["w"].sum() == fewer.sum()
    bits = jp.formats.value_masks(packed, {"w": jp.masks.pack(fewer), "bias": None})
    np.testing.assert_array_equal(bits["w"], found["w"])


def test_value_masks_of_words():
    w = jax.random.normal(KEY, (256, 128), jnp.bfloat16)
    mask = jp.prune(w, 0.5, structure=jp.NM(2, 4))[1] & (w > 0)
    packed = jp.formats.pack(w, mask, jp.NM(2, 4))
    assert packed.coding == "words"
    found = jp.formats.value_masks(packed, mask).astype(jnp.int32)
    again = jp.formats.with_values(packed, found)
    np.testing.assert_array_equal(jp.formats.unpack(again), mask)


def test_what_is_not_held_or_not_of_the_shape_is_refused():
    w = jnp.eye(16)
    packed = {"w": jp.formats.pack(w, w != 0, jp.Block(8, 8))}
    with pytest.raises(ValueError, match="masks: that of w keeps 128 weights that"):
        jp.formats.value_masks(packed, {"w": w == w})
    with pytest.raises(ValueError, match=r"masks: w has shape \(8, 8\)"):
        jp.formats.value_masks(packed, {"w": w[:8, :8] != 0})


def test_training_with_a_frozen_mask():
    """The same steps on packed values as on the dense leaf, and zeros that stay."""
    w = jax.random.normal(KEY, (64, 64))
    coarse = jp.prune(w, 0.5, structure=jp.Block(32, 32))[1]
    masks = {"w": coarse & jax.random.bernoulli(KEY, 0.5, w.shape), "bias": None}
    params = jp.masks.apply({"w": w, "bias": jnp.zeros(64)}, masks)
    packed = params | {"w": jp.formats.pack(params["w"], masks["w"], jp.Block(32, 32))}
    x, target = jax.random.normal(KEY, (2, 16, 64))

    def loss(p, x):
        return jnp.mean((x @ p["w"] + p["bias"] - target) ** 2)

    fast, packed, _ = jp.accelerate(loss, packed, {"w": None, "bias": None}, x)
    of_values = lambda v, x: fast(jp.formats.with_values(packed, v), x)  # noqa: E731

    values = jp.formats.values(packed)
    tx = jp.masked(optax.adam(0.05), jp.formats.value_masks(packed, masks))
    state = tx.init(values)

    dense_tx = jp.masked(optax.adam(0.05), masks)
    dense_state = dense_tx.init(params)

    @jax.jit
    def steps(values, state, params, dense_state):
        for _ in range(3):
            updates, state = tx.update(jax.grad(of_values)(values, x), state, values)
            values = optax.apply_updates(values, updates)
            updates, dense_state = dense_tx.update(
                jax.grad(loss)(params, x), dense_state, params
            )
            params = optax.apply_updates(params, updates)
        return values, params

    values, trained = steps(values, state, params, dense_state)
    found = jp.formats.unpack(jp.formats.with_values(packed, values)["w"])
    assert not (found == params["w"]).all()
    assert (found[~masks["w"]] == 0).all()
    np.testing.assert_allclose(found, trained["w"], atol=1e-4)
    np.testing.assert_allclose(values["bias"], trained["bias"], atol=1e-4)
    mu = jax.tree.leaves(state)
    assert max(m.size for m in mu) <= packed["w"].values.size
