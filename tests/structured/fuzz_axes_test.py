"""Random chains of whatever moves, joins, cuts and mixes axes: shrunk equals masked.

As `fuzz_test.py`, with more shapes and fewer layers; and with other units in each member of
an ensemble. `STRUCTURED_FUZZ=1000` runs as many; a handful are run by default.
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

COUNT = int(os.environ.get("STRUCTURED_FUZZ", "8"))
LARGEST, MEMBERS = 600, 3
FUNCTIONS = [
    jnp.tanh, jax.nn.relu, jax.nn.sigmoid, jnp.cos, jnp.square, jax.nn.gelu, jnp.exp,
    lambda h: jnp.where(h > 0.1, h, -0.3),
]  # fmt: skip


class Chain:
    """Steps `(params, h) -> h` on an array of any rank, drawn one after the other."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.params, self.steps = {}, []
        self.shape = 3, self.draw.choice([2, 4]), self.draw.choice([4, 6])
        self.x = self.array(*self.shape)
        for _ in range(self.draw.randint(6, 14)):
            axis = self.draw.randrange(len(self.shape))
            step = self.draw.choice(STEPS)(self, axis, self.shape[axis])
            if step is not None:
                self.add(step)
        last = self.weight(self.shape[-1], 3)
        self.steps.append(lambda p, h: h @ p[last])

    def array(self, *shape):
        return jnp.asarray(0.5 * self.numbers.normal(size=shape))

    def weight(self, *shape):
        name = f"w{len(self.params):02d}"
        self.params[name] = self.array(*shape)
        return name

    def add(self, step):
        given = jax.ShapeDtypeStruct(self.shape, self.x.dtype)
        out = jax.eval_shape(step, self.params, given)
        if 1 <= out.ndim <= 5 and 0 < out.size <= LARGEST:
            self.shape = out.shape
            self.steps.append(step)

    def function(self):
        return self.draw.choice(FUNCTIONS)

    def __call__(self, params, h):
        for step in self.steps:
            h = step(params, h)
        return h


def _dense(h, w, axis):
    return jnp.moveaxis(jnp.tensordot(h, w, (axis, 0)), -1, axis)


def dense(c, axis, n):
    w = c.weight(n, c.draw.choice([4, 6, 8]))
    return lambda p, h: _dense(h, p[w], axis)


def pointwise(c, axis, n):
    f = c.function()
    return lambda p, h: f(h)


def scaled(c, axis, n):
    w, f = c.weight(n), c.draw.choice([jnp.add, jnp.multiply, jnp.maximum])
    return lambda p, h: jnp.moveaxis(f(jnp.moveaxis(h, axis, -1), p[w]), -1, axis)


def cut_in_two(c, axis, n):
    found = [k for k in range(2, n) if n % k == 0]
    if not found:
        return None
    k, shape = c.draw.choice(found), c.shape
    return lambda p, h: h.reshape(*shape[:axis], k, n // k, *shape[axis + 1 :])


def merged(c, axis, n):
    shape = c.shape
    if axis + 1 == len(shape):
        return None
    return lambda p, h: h.reshape(
        *shape[:axis], n * shape[axis + 1], *shape[axis + 2 :]
    )


def transposed(c, axis, n):
    order = c.draw.sample(range(len(c.shape)), len(c.shape))
    return lambda p, h: h.transpose(order)


def sliced(c, axis, n):
    start = c.draw.randrange(n)
    stop = c.draw.randrange(start, n) + 1
    return lambda p, h: lax.slice_in_dim(h, start, stop, 1, axis)


def strided(c, axis, n):
    start = c.draw.randrange(2)
    if n % 2:
        return None
    return lambda p, h: lax.slice_in_dim(h, start, None, 2, axis)


def joined(c, axis, n):
    w, f = c.weight(n, c.draw.choice([2, n])), c.function()
    return lambda p, h: jnp.concatenate([h, f(_dense(h, p[w], axis))], axis)


def exchanged(c, axis, n):
    if n == 1:
        return None
    at, f, g = c.draw.randrange(1, n), c.function(), c.function()

    def step(p, h):
        first, second = jnp.split(h, [at], axis)
        return jnp.concatenate([f(second), g(first)], axis)

    return step


def normalised(c, axis, n):
    f = c.draw.choice([
        lambda h: jax.nn.softmax(h, axis),
        lambda h: h - h.mean(axis, keepdims=True),
        lambda h: h / jnp.sqrt(jnp.var(h, axis, keepdims=True) + 0.1),
    ])  # fmt: skip
    return lambda p, h: f(h)


def reduced(c, axis, n):
    f = c.draw.choice([jnp.sum, jnp.max, jnp.mean, jnp.prod])
    return (lambda p, h: f(h, axis)) if len(c.shape) > 2 else None


def padded(c, axis, n):
    edge, value = (c.draw.randrange(3), c.draw.randrange(3)), c.draw.choice([0.0, 1.0])
    edges = [edge if i == axis else (0, 0) for i in range(len(c.shape))]
    return lambda p, h: jnp.pad(h, edges, constant_values=value)


def copied(c, axis, n):
    f = c.draw.choice([
        lambda h: jnp.repeat(h, 2, axis), lambda h: jnp.roll(h, 1, axis),
        lambda h: jnp.stack([h, jnp.tanh(h)], axis), lambda h: jnp.cumsum(h, axis),
    ])  # fmt: skip
    return lambda p, h: f(h)


def batched(c, axis, n):
    other = c.draw.randrange(len(c.shape))
    if other == axis:
        return None
    w = c.weight(c.shape[other], n, 3)

    def step(p, h):
        h = jnp.moveaxis(h, (other, axis), (-2, -1))
        return jnp.einsum("...ab,abc->...bc", h, p[w])

    return step


def scanned(c, axis, n):
    f = c.function()

    def step(p, h):
        rest = jnp.zeros(h.shape[:axis] + h.shape[axis + 1 :], h.dtype)
        found = lax.scan(
            lambda s, x: (f(s) / 2 + x, s + x), rest, jnp.moveaxis(h, axis, 0)
        )
        return jnp.moveaxis(found[1], 0, axis)

    return step


def taken(c, axis, n):
    order = [c.draw.randrange(n) for _ in range(c.draw.choice([2, n, n + 1]))]
    return lambda p, h: jnp.take(h, jnp.array(order), axis)


STEPS = [
    dense, dense, dense, pointwise, pointwise, scaled, cut_in_two, merged, transposed, sliced,
    strided, joined, exchanged, normalised, normalised, reduced, padded, copied, batched,
    scanned, taken,
]  # fmt: skip


def _agree(plan, fn, params, x):
    report = plan.verify(fn, params, x, tolerance=1e-9)
    assert report.equal or "this should not be" not in str(report), report
    return report.equal


@pytest.mark.parametrize("seed", range(COUNT))
def test_shrunk_equals_masked_or_says_why_not(seed, half):
    with jax.enable_x64(True):
        chain = Chain(seed)
        graph = structured.trace(chain, chain.params, chain.x)
        names = [g.name for g in graph.groups]
        for chosen in [names, *([n] for n in names[:2])] if names else []:
            plan = half(graph, chosen, seed)
            same = _agree(plan, chain, chain.params, chain.x)
            if same and chosen is names:
                _compare_gradients(plan, chain)


def _compare_gradients(plan, chain):
    def loss(fn, p):
        return jnp.sin(fn(p, chain.x)).sum()

    found = jax.grad(lambda p: loss(plan.rewrite(chain), p))(plan.shrink(chain.params))
    masked = jax.grad(lambda p: loss(chain, p))(plan.mask(chain.params))
    wanted = jax.tree.leaves(plan.shrink(masked))
    if all(np.isfinite(x).all() for x in wanted):  # not those of a product with zeros
        largest = max(float(abs(x).max()) for x in wanted)
        for a, b in zip(jax.tree.leaves(found), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8 * largest + 1e-14)


@pytest.mark.parametrize("seed", range(COUNT))
def test_members_of_an_ensemble_keep_other_units(seed):
    with jax.enable_x64(True):
        chain = Chain(seed)
        params = jax.tree.map(
            lambda x: chain.array(MEMBERS, *x.shape), dict(chain.params)
        )

        def fn(p, x):
            return jax.vmap(lambda p: chain(p, x))(p).mean(0)

        graph = structured.trace(fn, params, chain.x)
        kept = {}
        for g in graph.groups:
            sizes = [graph[name].size for name in graph.within(g.name)]
            if sizes:
                count = max(g.minimum, g.size // 2)
                rows = [chain.numbers.permutation(g.size)[:count]
                        for _ in range(int(np.prod(sizes)))]  # fmt: skip
                kept[g.name] = np.stack(rows).reshape(*sizes, count)
        for chosen in (
            [kept, *({n: x} for n, x in list(kept.items())[:1])] if kept else []
        ):
            _agree(structured.planned(graph, chosen), fn, params, chain.x)
