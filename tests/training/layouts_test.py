"""Convolutions, stacked layers and heads: what must live and die together does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
SHAPES = {
    "conv": (3, 3, 8, 16),
    "stack": (2, 3, 3, 8, 16),
    "heads": (32, 4, 8),
    "flat": (32, 32),
}


def units(structure, mask):
    """Sums of the mask over what is kept or pruned as one."""
    found = structure.scored("", lambda m: m.astype(jnp.float32), jnp.asarray(mask))
    return np.asarray(found.score(*found.operands))


# Input channels of a convolution are contracted: N:M groups run along axis -2, too.
CASES = [
    pytest.param("conv", jp.NM(2, 4), id="conv-nm"),
    pytest.param("conv", jp.Channel(), id="conv-filters"),
    pytest.param("conv", jp.Block(4, 4), id="conv-blocks"),
    pytest.param("conv", jp.Unstructured(), id="conv"),
    pytest.param("stack", jp.Channel(stack_axes=0), id="stack-filters"),
    pytest.param("stack", jp.NM(2, 4), id="stack-nm"),
    pytest.param("heads", jp.Channel(axis=1), id="heads"),
    pytest.param("flat", jp.Block(32, 8), id="flat-heads"),
]
STEPS = {"end": 4, "every": 1}
METHODS = {
    "rigl": lambda s: jp.rigl(0.5, key=KEY, structure=s, allocation="uniform", **STEPS),
    "granet": lambda s: jp.granet(0.5, structure=s, allocation="uniform", **STEPS),
    "sr_ste": lambda s: jp.sr_ste(0.5, structure=s),
}


@pytest.mark.parametrize(("name", "structure"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_structures_in_all_layouts(name, structure, method):
    params = {name: {"kernel": jax.random.normal(KEY, SHAPES[name])}}
    tx = jp.masked(optax.adam(0.1), METHODS[method](structure))

    @jax.jit
    def step(params, state, i):
        grads = jax.tree.map(lambda p: jnp.sin(7 * p + i), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    found = []
    for i in range(6):
        params, state = step(params, state, i)
        found.append(np.asarray(jp.get_masks(state)[name]["kernel"]))
    mask = found[-1]
    assert mask.sum() == mask.size // 2
    if method != "sr_ste":  # whose masks move only if the order of the weights does
        assert any((a != b).any() for a, b in zip(found, found[1:], strict=False))
    if isinstance(structure, jp.NM):
        groups = np.moveaxis(mask, -2, -1)
        assert (groups.reshape(*groups.shape[:-1], -1, 4).sum(-1) == 2).all()
        return
    sums = units(structure, mask)
    assert set(np.unique(sums)) == {0, mask.size // sums.size}
