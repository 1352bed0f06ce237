"""The order of inputs before N:M pruning."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import posttrain
from jaxprune.calibration import Inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _kept(w, square, order, structure):
    """RIA's scores that the groups keep in this order."""
    size = np.abs(np.asarray(w, np.float64))
    scores = size / size.sum(0) + size / size.sum(1, keepdims=True)
    scores = scores * np.asarray(square)[:, None] ** 0.25
    inputs = Inputs(jnp.float32(1), square=jnp.asarray(square)[order])
    found = posttrain.ria().solve(jnp.asarray(w)[order], inputs, None, structure)
    return scores[order][np.asarray(found.mask)].sum()


@pytest.mark.parametrize(
    "structure", [jp.NM(2, 4), jp.NM(1, 4), jp.NM(3, 4, stride=2)], ids=repr
)
def test_more_is_kept(structure, layer):
    w, inputs = layer(32, 12)
    order = posttrain.channel_permutation(w, inputs, structure)
    assert sorted(order) == list(range(32))
    kept = _kept(w, inputs.square, order, structure)
    random = np.random.default_rng(0)
    others = [np.arange(32), *(random.permutation(32) for _ in range(5))]
    assert kept > max(_kept(w, inputs.square, o, structure) for o in others)


def test_the_assignment_is_the_best_of_all_on_one_place():
    # Two groups of two: whatever the deal, one of three pairings is best.
    w = jnp.asarray(np.random.default_rng(1).standard_normal((4, 5)), jnp.float32)
    inputs = Inputs(jnp.float32(1), square=jnp.ones(4))
    order = posttrain.channel_permutation(w, inputs, jp.NM(1, 2))
    kept = _kept(w, np.ones(4), order, jp.NM(1, 2))
    all_ = [
        _kept(w, np.ones(4), np.array(o), jp.NM(1, 2))
        for o in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2])
    ]
    assert kept >= sorted(all_)[1] * (1 - 1e-6)


def test_wrong_structures_and_stacks_are_refused(layer):
    w, inputs = layer(16, 4)
    with pytest.raises(TypeError, match=r"expected NM\(n, m\)"):
        posttrain.channel_permutation(w, inputs, jp.Unstructured())
    stack = Inputs(*(x if x is None else x[None] for x in inputs))
    with pytest.raises(ValueError, match=r"expected one matrix \[K, N\]"):
        posttrain.channel_permutation(w[None], stack, jp.NM(2, 4))
