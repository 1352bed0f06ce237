"""SNIP, GraSP and SynFlow against dense derivatives and the laws they obey."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def params():
    return {
        "up": {"kernel": make(6, 5, seed=1)},
        "down": {"kernel": make(5, 4, seed=2)},
    }


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def loss(params, batch):
    return jnp.mean((model(params, batch) - 1) ** 2)


BATCHES = make(3, 6, seed=3), make(8, 6, seed=4)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_snip_is_the_derivative_by_a_mask():
    def masked(masks):
        return sum(
            loss(jax.tree.map(jnp.multiply, params(), masks), b) for b in BATCHES
        )

    ones = jax.tree.map(jnp.ones_like, params())
    wanted = jax.tree.map(jnp.abs, jax.grad(masked)(ones))
    found = jax.jit(lambda p: jp.scores.snip(loss, p, *BATCHES))(params())
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-5, atol=1e-7)


def test_grasp_is_the_weight_times_hessian_times_gradient():
    vector, unravel = jax.flatten_util.ravel_pytree(params())

    def total(v):
        return sum(loss(unravel(v), b) for b in BATCHES)

    wanted = vector * (jax.hessian(total)(vector) @ jax.grad(total)(vector))
    found = jax.jit(lambda p: jp.scores.grasp(loss, p, *BATCHES))(params())
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(found)[0], wanted, rtol=1e-4, atol=1e-6
    )


def test_synaptic_flow_is_conserved():
    """What flows into a layer flows out of it: the sums of all layers are the same."""
    linear = lambda p, x: x @ p["up"]["kernel"] @ p["down"]["kernel"]  # noqa: E731
    found = jp.scores.synflow(linear, params(), jnp.ones((1, 6)))
    sums = [float(jnp.sum(x)) for x in jax.tree.leaves(found)]
    up, down = (np.abs(params()[k]["kernel"]) for k in ("up", "down"))
    np.testing.assert_allclose(
        sums, [(np.ones((1, 6)) @ up @ down).sum()] * 2, rtol=1e-5
    )
    into = found["up"]["kernel"].sum(0)
    np.testing.assert_allclose(into, found["down"]["kernel"].sum(1), rtol=1e-5)


def test_leaves_that_are_no_floats_pass():
    tree = params() | {"count": jnp.int32(3), "hole": None}
    for found in (
        jp.scores.snip(loss, tree, BATCHES[0]),
        jp.scores.grasp(loss, tree, BATCHES[0]),
        jp.scores.synflow(model, tree, BATCHES[0]),
    ):
        assert int(found["count"]) == 3 and found["hole"] is None


@pytest.mark.parametrize("rounds", [1, 7, 100])
def test_pruning_in_rounds_meets_the_count(rounds):
    score = lambda p: jp.scores.synflow(model, p, jnp.ones((1, 6)))  # noqa: E731
    pruned, masks = jp.prune_in_rounds(params(), 0.7, score=score, rounds=rounds)
    assert jp.masks.count(masks).kept == 50 - 35
    for w, m in zip(jax.tree.leaves(pruned), jax.tree.leaves(masks), strict=True):
        np.testing.assert_array_equal(w != 0, m)


def test_synflow_in_rounds_keeps_layers_alive_where_one_round_does_not():
    """Its very claim: no layer collapses before it must."""
    sizes = (64, 64, 64, 2, 64, 64)
    deep = {
        f"l{i}": {"kernel": make(a, b, seed=i)}
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    }

    def network(p, x):
        for i in range(len(sizes) - 1):
            x = x @ p[f"l{i}"]["kernel"]
        return x

    def score(p):
        return jp.scores.synflow(network, p, jnp.ones((1, 64)))

    def flows(pruned):
        # Signs apart, an output still hears an input.
        return (
            float(network(jax.tree.map(jnp.abs, pruned), jnp.ones((1, 64))).sum()) > 0
        )

    many, _ = jp.prune_in_rounds(deep, 0.998, score=score, rounds=100)
    few, _ = jp.prune_in_rounds(deep, 0.998, score=score, rounds=1)
    assert flows(many) and not flows(few)


def test_what_a_round_prunes_does_not_come_back():
    """GraSP's scores have both signs: a pruned weight, at 0, would beat the negative."""
    score = lambda p: jp.scores.grasp(loss, p, BATCHES[0])  # noqa: E731
    pruned, masks = jp.prune_in_rounds(params(), 0.5, score=score, rounds=10)
    assert jp.masks.count(masks).kept == 25
    assert sum(int((x != 0).sum()) for x in jax.tree.leaves(pruned)) == 25


def test_sums_over_batches_keep_their_precision():
    tree = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    found = jp.scores.snip(lambda p, b: jnp.sum(p["kernel"] * b), tree, *[1.0] * 300)
    np.testing.assert_array_equal(found["kernel"], 300)


def test_sparsities_by_path_are_refused_in_rounds():
    with pytest.raises(ValueError, match="allocation: got"):
        jp.prune_in_rounds(params(), 0.5, score=lambda p: p, allocation={"*": 0.5})


def test_at_least_one_round_is_asked_for():
    with pytest.raises(ValueError, match="rounds: got 0"):
        jp.prune_in_rounds(params(), 0.5, score=lambda p: p, rounds=0)
