"""N:M and empty blocks are those of the structures that pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _weight(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 16)])
@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
def test_groups_are_found_along_their_axis(n, m, axis, stack):
    w, _ = jp.prune({"w": _weight(*stack, 64, 64)}, structure=jp.NM(n, m, axis=axis))
    found = jp.analysis.patterns(np.asarray(w["w"])).groups
    assert jp.NM(n, m, axis=axis) in found
    others = [x for x in found if x.axis != axis]
    assert all(x.n / x.m > n / m for x in others)


def test_a_larger_group_must_ask_for_more():
    w = np.tile(np.array([[1.0], [0.0]]), (16, 32))
    assert jp.analysis.patterns(w).groups == (jp.NM(1, 2),)


def test_groups_that_do_not_divide_are_not_looked_for():
    w = np.ones((6, 7))
    w[::2] = 0
    assert jp.analysis.patterns(w).groups == (jp.NM(1, 2),)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_empty_blocks_are_counted(size):
    w, _ = jp.prune({"w": _weight(128, 64)}, 0.5, structure=jp.Block(size, size))
    found = jp.analysis.patterns(np.asarray(w["w"])).empty_blocks
    assert list(found) == [16, 32, 64]
    assert all(found[x] == 0.5 for x in found if x <= size)
    assert all(found[x] < 0.5 for x in found if x > size)


def test_blocks_reach_over_the_edge():
    w = np.ones((40, 33))
    w[32:] = w[:, 32:] = 0
    assert jp.analysis.patterns(w, blocks=(32,)).empty_blocks == {32: 0.75}


@pytest.mark.parametrize(
    ("w", "sparsity"),
    [
        (np.zeros((0, 4)), 1.0),
        (np.zeros(3), 1.0),
        (np.float32(2), 0.0),
        (np.ones((16, 16)), 0.0),
        (np.asarray(jnp.ones((4, 4), jnp.bfloat16)), 0.0),
    ],
)
def test_what_has_no_pattern(w, sparsity):
    assert jp.analysis.patterns(w) == (sparsity, (), {})
