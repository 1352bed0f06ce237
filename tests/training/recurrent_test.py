"""Recurrent cells: masks are applied once a sequence, not once a step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import jaxprs_in_params

import jaxprune as jp

UNITS = 8


def lstm():
    cell = nn.RNN(nn.OptimizedLSTMCell(UNITS))
    x = jax.random.normal(jax.random.key(0), (2, 12, 4))
    return cell, x, cell.init(jax.random.key(1), x)


def bodies(jaxpr):
    """The jaxprs of all scans inside."""
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            if eqn.primitive.name == "scan":
                yield inner
            yield from bodies(inner)


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            yield from primitives(inner)


def test_a_masked_lstm_is_one_with_zeros():
    cell, x, params = lstm()
    tx = jp.masked(optax.adam(0.1), jp.ste(0.75))
    state = tx.init(params)
    zeroed = jp.masks.apply(params, jp.get_masks(state))
    np.testing.assert_array_equal(
        cell.apply(jp.sparse_params(params, state), x), cell.apply(zeroed, x)
    )
    assert jp.get_info(state)["density"] == 0.25


def test_masks_are_applied_outside_of_the_scan():
    cell, x, params = lstm()
    tx = jp.masked(optax.adam(0.1), jp.ste(0.75))
    state = tx.init(params)

    def loss(params):
        return jnp.sum(cell.apply(jp.sparse_params(params, state), x) ** 2)

    plain = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(cell.apply(p, x) ** 2)))(params)
    masked = jax.make_jaxpr(jax.grad(loss))(params)
    for a, b in zip(bodies(plain.jaxpr), bodies(masked.jaxpr), strict=True):
        assert sorted(primitives(a)) == sorted(primitives(b))
    assert list(bodies(masked.jaxpr))
