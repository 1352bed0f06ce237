"""Notes: a group without one is exact, and each case here with one truly differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

P = {"a": jax.random.normal(jax.random.key(0), (4, 8))}
X = jax.random.normal(jax.random.key(1), (5, 4))
ORDER = np.array([3, 1, 0, 2, 7, 6, 5, 4])


def variance(h):
    return h.var(-1)


def second_moment_of_a_shift(h):
    return jnp.square(h - h[:, :1].mean()).sum(-1)


def log_sum_exp(h):
    return jax.nn.logsumexp(h, -1)


def unbiased(h):
    return h.std(-1, ddof=1)


def product_of_ones(h):
    return jnp.prod(1 + h, -1)


def inside_a_checkpoint(h):
    return jax.checkpoint(lambda h: jnp.cos(h).sum(-1))(h)


def both_ways_of_a_branch(h):
    return lax.cond(h.sum() > 0, jnp.tanh, jnp.sin, h).sum(-1)


def outer_products(h):
    return jnp.einsum("bi,bj->bij", h, h).sum((1, 2))


EXACT = [
    variance, second_moment_of_a_shift, log_sum_exp, unbiased, product_of_ones,
    inside_a_checkpoint, both_ways_of_a_branch, outer_products,
]  # fmt: skip


@pytest.mark.parametrize("f", EXACT, ids=lambda f: f.__name__)
def test_what_removed_units_would_add_is_added(f, half):
    def fn(p, x):
        return f(x @ p["a"])

    graph = structured.trace(fn, P, X)
    assert graph.groups and not any(g.notes for g in graph.groups)
    plan = half(graph)
    assert plan.verify(fn, P, X).equal
    loss = jax.grad(lambda p: plan.rewrite(fn)(p, X).sum())(plan.shrink(P))
    masked = jax.grad(lambda p: fn(plan.mask(p), X).sum())(P)
    np.testing.assert_allclose(
        loss["a"], plan.shrink(masked)["a"], rtol=1e-4, atol=1e-5
    )


def test_what_is_padded_counts_whatever_else_is_removed():
    def fn(p, x):
        return jax.nn.softmax(jnp.pad(x @ p["a"], [(0, 0), (1, 2)]), -1) @ p["wide"]

    p = {**P, "wide": jnp.cos(jnp.arange(33.0)).reshape(11, 3)}
    graph = structured.trace(fn, p, X)
    edge = next(g for g in graph.groups if g.size == 2)
    assert not edge.notes
    assert structured.planned(graph, {edge.name: [0]}).verify(fn, p, X).equal


def outer_sums(h):
    return jnp.tanh(h[:, :, None] + h[:, None, :]).sum((1, 2))


def permuted_and_added(h):
    return (h + h[:, ORDER]).sum(-1)


def mixed_by_activations(h):
    return jnp.einsum("bi,bij->bj", h, jnp.einsum("bi,bj->bij", h, h) + 1).sum(-1)


def outer_quotients(h):
    return (h[:, :, None] / (2 + jnp.cos(h))[:, None, :]).sum((1, 2))


def merged_before_the_sum(h):
    pairs = h.reshape(5, 4, 2)
    return jnp.square(pairs - pairs.mean(1, keepdims=True)).reshape(5, 8).std(-1)


def largest_of_running_sums(h):
    def step(carry, x):
        carry = carry + jnp.cos(x)
        return carry, carry

    return lax.scan(step, jnp.zeros_like(h), jnp.stack([h, h]))[1].max((0, 2))


def chosen(h):
    return lax.top_k(h, 2)[0].sum(-1)


def scaled_rows(h):
    return jax.nn.sigmoid(h).at[jnp.zeros(1, int)].multiply(h[:1]).sum(-1)


def rows_of_ones(h):
    return jnp.pad(h, [(1, 0), (0, 0)], constant_values=1.0).sum(-1)


def poles(h):
    return jnp.exp(-lax.lgamma(h)).sum(-1) + lax.digamma(h).max(-1)


NOTED = [
    outer_sums, permuted_and_added, mixed_by_activations, outer_quotients,
    merged_before_the_sum, largest_of_running_sums, chosen,
    scaled_rows, rows_of_ones, poles,
]  # fmt: skip


@pytest.mark.parametrize("f", NOTED, ids=lambda f: f.__name__)
def test_what_differs_has_a_note(f, half):
    def fn(p, x):
        return f(x @ p["a"])

    graph = structured.trace(fn, P, X)
    noted = [g.name for g in graph.groups if g.notes]
    plans = [half(graph, [name], seed) for name in noted for seed in (0, 1)]
    reports = [plan.verify(fn, P, X) for plan in plans]
    assert any(not r.equal for r in reports)
    assert all(r.equal or r.reasons for r in reports)
    others = [g.name for g in graph.groups if not g.notes]
    assert half(graph, others).verify(fn, P, X).equal
