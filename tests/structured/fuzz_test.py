"""Random small models: shrunk equals masked, or the groups say why it may not.

`STRUCTURED_FUZZ=1000` runs as many; a handful are run by default.
"""

import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 2, 3
COUNT = int(os.environ.get("STRUCTURED_FUZZ", "16"))
FUNCTIONS = [
    jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jax.nn.gelu, jax.nn.silu, jnp.square, jnp.abs,
    jax.nn.softplus, jnp.cos, jax.nn.elu, jax.nn.relu6, jax.nn.leaky_relu,
]  # fmt: skip


class Builder:
    """A model of steps `(params, h [B, T, width]) -> h`, drawn one after the other."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.params, self.steps = {}, []
        self.width = self.draw.choice([4, 6])
        self.x = jnp.asarray(self.numbers.normal(size=(B, T, self.width)), jnp.float32)
        for _ in range(self.draw.randint(3, 9)):
            step = self.draw.choice(STEPS)(self, self.width)
            if step is not None:
                self.add(*step)
            if self.width > 40:
                self.add(*dense(self, self.width))
        self.width, last = 3, self.weight(self.width, 3)
        self.steps.append(lambda p, h: h @ p[last])

    def weight(self, *shape):
        name = f"w{len(self.params):02d}"
        values = 0.5 * self.numbers.normal(size=shape)
        self.params[name] = jnp.asarray(values, jnp.float32)
        return name

    def add(self, width, step):
        self.width = width
        self.steps.append(step)

    def __call__(self, params, h):
        for step in self.steps:
            h = step(params, h)
        return h


def dense(b, c):
    n = b.draw.choice([4, 6, 8, 12])
    w = b.weight(c, n)
    return n, lambda p, h: h @ p[w]


def bias(b, c):
    w = b.weight(c)
    return c, lambda p, h: h + p[w]


def activation(b, c):
    f = b.draw.choice(FUNCTIONS)
    return c, lambda p, h: f(h)


def rms_norm(b, c):
    w = b.weight(c)
    return (
        c,
        lambda p, h: h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-3) * p[w],
    )


def centred(h, axis):
    return (h - h.mean(axis, keepdims=True)) / jnp.sqrt(
        h.var(axis, keepdims=True) + 1e-2
    )


def layer_norm(b, c):
    w, v = b.weight(c), b.weight(c)
    return c, lambda p, h: centred(h, -1) * p[w] + p[v]


def group_norm(b, c):
    if c % 2:
        return None
    return c, lambda p, h: centred(h.reshape(B, T, 2, c // 2), (1, 3)).reshape(B, T, c)


def residual(b, c):
    n, f = b.draw.choice([4, 8]), b.draw.choice(FUNCTIONS[:3])
    up, down = b.weight(c, n), b.weight(n, c)
    return c, lambda p, h: h + f(h @ p[up]) @ p[down]


def gated_halves(b, c):
    if c % 2:
        return None
    return c // 2, lambda p, h: jax.nn.glu(h)


def concatenated(b, c):
    n = b.draw.choice([2, 4])
    w = b.weight(c, n)
    return c + n, lambda p, h: jnp.concatenate([h, jnp.tanh(h @ p[w])], -1)


def mixed_groups(b, c):
    if c % 2:
        return None
    w = b.weight(2, 2)

    def step(p, h):
        parts = h.reshape(B, T, 2, c // 2)
        return jnp.einsum("btgi,gk->btki", parts, p[w]).reshape(B, T, c)

    return c, step


def shuffled(b, c):
    if c % 2:
        return None
    return c, lambda p, h: h.reshape(B, T, 2, c // 2).swapaxes(2, 3).reshape(B, T, c)


def attention(b, c):
    d = b.draw.choice([2, 4])
    q, k, v = (b.weight(c, 2 * d) for _ in range(3))
    o = b.weight(2 * d, c)

    def step(p, h):
        heads = ((h @ p[n]).reshape(B, T, 2, d) for n in (q, k, v))
        return h + jax.nn.dot_product_attention(*heads).reshape(B, T, 2 * d) @ p[o]

    return c, step


def grouped_attention(b, c):
    q, k, v, o = b.weight(c, 8), b.weight(c, 4), b.weight(c, 4), b.weight(8, c)

    def step(p, h):
        queries = (h @ p[q]).reshape(B, T, 2, 2, 2)
        keys, values = ((h @ p[n]).reshape(B, T, 2, 2) for n in (k, v))
        s = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", queries, keys), -1)
        return jnp.einsum("bkgts,bskd->btkgd", s, values).reshape(B, T, 8) @ p[o]

    return c, step


def sliced(b, c):
    start, stop = sorted(b.draw.sample(range(c + 1), 2))
    if stop - start < 2:
        return None
    return stop - start, lambda p, h: h[..., start:stop]


def strided(b, c):
    if c % 2 or c < 4:
        return None
    start = b.draw.choice([0, 1])
    return c // 2, lambda p, h: h[..., start::2]


def padded(b, c):
    return c + 3, lambda p, h: jnp.pad(h, ((0, 0), (0, 0), (1, 2)))


def gathered(b, c):
    index = b.numbers.integers(0, c, size=b.draw.choice([3, c]))
    return len(index), lambda p, h: h[..., index]


def scanned(b, c):
    n = b.draw.choice([4, 6])
    up, down = b.weight(3, c, n), b.weight(3, n, c)

    def step(p, h):
        def layer(x, w):
            return x + jnp.tanh(x @ w[0]) @ w[1], None

        return lax.scan(layer, h, (p[up], p[down]))[0]

    return c, step


def looped(b, c):
    w = b.weight(c, c)
    return c, lambda p, h: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p[w] + x), h)


def convolved(b, c):
    n, groups = b.draw.choice([(4, 1), (6, 1), (c, c)])
    w = b.weight(3, c // groups, n)

    def step(p, h):
        return lax.conv_general_dilated(
            h, p[w], (1,), "SAME", feature_group_count=groups,
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    return n, step


def experts(b, c):
    r, up, down = b.weight(c, 4), b.weight(4, c, 4), b.weight(4, 4, c)
    chooses = b.draw.choice([True, False])

    def step(p, h):
        gates = jax.nn.softmax(h @ p[r], -1)
        if chooses:
            w, i = lax.top_k(h @ p[r], 2)
            gates = (jax.nn.one_hot(i, 4) * jax.nn.softmax(w)[..., None]).sum(-2)
        inner = jnp.tanh(jnp.einsum("btc,xcn->btxn", h, p[up]))
        return jnp.einsum("btxn,xnc,btx->btc", inner, p[down], gates)

    return c, step


def largest_of_pairs(b, c):
    if c % 2:
        return None
    return c // 2, lambda p, h: h.reshape(B, T, c // 2, 2).max(-1)


def constant(b, c):
    k = jnp.asarray(b.numbers.normal(size=c), jnp.float32)
    return c, lambda p, h: h * k + k[::-1]


def position(b, c):
    w = b.weight(T, c)
    return c, lambda p, h: h + p[w]


def low_rank(b, c):
    w, left, right = b.weight(c, 6), b.weight(c, 3), b.weight(3, 6)
    return 6, lambda p, h: h @ (p[w] + p[left] @ p[right])


def outer(b, c):
    if c > 6:
        return None
    return c * c, lambda p, h: jnp.einsum("bti,btj->btij", h, h).reshape(B, T, c * c)


def recomputed(b, c):
    w = b.weight(c, c)
    return c, lambda p, h: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(p[w], h)


def _plain(f):
    return lambda b, c: (c, lambda p, h: f(h))


STEPS = [
    *[dense] * 4, *[activation] * 2, bias, rms_norm, layer_norm, group_norm, residual,
    gated_halves, concatenated, mixed_groups, shuffled, attention, grouped_attention, sliced,
    strided, padded, gathered, scanned, looped, convolved, experts, largest_of_pairs,
    constant, position, low_rank, outer, recomputed,
    lambda b, c: (2 * c, lambda p, h: jnp.tile(h, (1, 1, 2))),
    *map(_plain, [
        lambda h: h - h.mean(-1, keepdims=True),
        lambda h: jax.nn.softmax(h, -1),
        lambda h: h[..., ::-1],
        lambda h: jnp.roll(h, 1, -1),
        lambda h: jnp.sort(h, -1),
        lambda h: jnp.cumsum(h, 1),
        # Of centred values the sum is rounding, whose sign means nothing.
        lambda h: lax.cond(h.sum() > 0.123, jnp.tanh, lambda x: 0.5 * x, h),
        lambda h: jnp.stack([h, jnp.tanh(h), 2 * h]).mean(0),
        lambda h: h.at[:, 1].set(0.5),
        jax.jit(lambda h: jnp.tanh(h) * (1 + jnp.mean(h))),
        lambda h: jnp.where(jax.random.bernoulli(jax.random.key(3), 0.8, h.shape), h, 0),
        lambda h: jnp.clip(h, -1, 1),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(COUNT))
def test_shrunk_equals_masked_or_says_why_not(seed, half):
    fn = Builder(seed)
    graph = structured.trace(fn, fn.params, fn.x)
    assert not graph.unknown
    exact = {g.name for g in graph.groups if not g.notes}
    for names in [exact, {g.name for g in graph.groups}]:
        if not names:
            continue
        plan = half(graph, names, seed)
        assert plan.after.parameters < plan.before.parameters
        found = plan.verify(fn, fn.params, fn.x, tolerance=1e-4)
        assert found.equal or names != exact, found
        assert found.equal or not any("no reason" in r for r in found.reasons), found
