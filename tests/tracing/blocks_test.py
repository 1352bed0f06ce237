"""Blocks run one after the other are the function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxprune import _tree, tracing
from jaxprune.tracing import Leaf

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(found, params, args):
    """Outputs of the blocks, one after the other."""
    paths, leaves, _ = _tree.flatten(params)
    weights = dict(zip(paths, leaves, strict=True))
    values = dict(zip(found.inputs, jax.tree.leaves(args), strict=True))

    for block in found.blocks:
        own = tracing.take(block, weights)
        out = jax.jit(block.fn)(own, *tracing.reads(block, values))
        values |= zip(block.writes, out, strict=True)
    return [tracing.value_of(s, values) for s in found.outputs]


def check(fn, params, *args, **options):
    found = tracing.blocks(fn, params, *args, **options)
    wanted = jax.tree.leaves(jax.jit(fn)(params, *args))
    got = run(found, params, args)
    assert len(got) == len(wanted)
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    return found.blocks


def make(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(h)))
        return x, x.mean()


class Model(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(20, 8, name="embed")
        x = embed(tokens)
        if self.scanned:
            layers = nn.scan(
                nn.remat(Layer),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, means = layers(name="layers")(x, None)
        else:
            means = []
            for i in range(3):
                x, mean = Layer(name=f"layers_{i}")(x)
                means.append(mean)
        return embed.attend(nn.LayerNorm(name="norm")(x)), means


@pytest.mark.parametrize("scanned", [False, True])
def test_linen(scanned):
    model = Model(scanned)
    tokens = jnp.arange(10).reshape(2, 5)
    params = model.init(jax.random.key(0), tokens)
    blocks = check(model.apply, params, tokens)
    layers = [b for b in blocks if b.name.startswith("layers")]
    names = [f"layers/{i}" if scanned else f"layers_{i}" for i in range(3)]
    assert [b.name for b in layers] == names
    assert len({x for b in layers for x in b.leaves}) == 3 * 6
    # The mean of what a layer gives is made behind it, and is not there in the first one.
    assert layers[1].fn is layers[2].fn
    if scanned:
        assert layers[0].leaves[0].layer == 0 and layers[2].leaves[0].layer == 2
        assert len({b.fn for b in layers}) == 1


def test_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return x + self.down(jax.nn.relu(self.up(x)))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Block(rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    blocks = check(lambda s, x: nnx.merge(graph, s)(x), state, make(4, 8))
    assert [b.name for b in blocks] == ["layers/0", "layers/1", "layers/2"]
    assert blocks[0].leaves[0] == Leaf("layers/0/down/bias", None)


def test_what_depends_on_leaves_only_is_made_where_it_is_needed():
    def fn(params, x):
        cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16) * 2, params)
        for w in cast["layers"]:
            x = jnp.tanh(x @ w)
        return x @ cast["head"]

    params = {"layers": [make(8, 8, seed=i) for i in range(3)], "head": make(8, 2)}
    found = tracing.blocks(fn, params, jnp.ones((2, 8), jnp.bfloat16))
    assert [len(b.leaves) for b in found.blocks] == [1, 1, 1, 1]
    assert all(len(b.reads) == len(b.writes) == 1 for b in found.blocks)


def test_reversed_scan_with_its_own_inputs_and_casts():
    def fn(params, x, noise):
        def step(carry, layer):
            w, z, i = layer
            y = jnp.tanh(carry @ w + z) * (i + 1)
            return y, y[0]

        stack = params["w"].astype(jnp.float32), noise, jnp.arange(4)
        x, ys = lax.scan(step, x, stack, reverse=True)
        return x + ys.sum(), ys

    params = {"w": make(4, 8, 8).astype(jnp.bfloat16)}
    blocks = check(fn, params, make(3, 8), make(4, 3, 8, seed=2))
    layers = [b.leaves[0].layer for b in blocks if b.leaves]
    assert layers == [3, 2, 1, 0]


def test_looped_weights_stand_in_every_iteration_of_a_block():
    def fn(params, x):
        def step(carry, w):
            return jnp.tanh(carry @ w @ params["shared"]), None

        return lax.scan(step, x, params["w"])[0]

    params = {"w": make(3, 8, 8), "shared": make(8, 8, seed=1)}
    blocks = check(fn, params, make(2, 8))
    shared = [b for b in blocks if Leaf("shared", None) in b.leaves]
    assert len(shared) == 3


def test_a_scan_alone_is_its_layers():
    def fn(params, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, params["w"])

    blocks = check(fn, {"w": make(3, 4, 4)}, make(2, 4))
    assert [b.name for b in blocks] == ["w/0", "w/1", "w/2"]
    blocks = check(
        lambda p, x: fn(p["layers"], x), {"layers": {"w": make(3, 4, 4)}}, make(2, 4)
    )
    assert [b.name for b in blocks] == ["layers/0", "layers/1", "layers/2"]


@pytest.mark.parametrize("of", ["argument", "leaf", "both"])
def test_functions_without_a_product(of):
    outputs = {
        "argument": lambda p, x: x,
        "leaf": lambda p, x: p["w"],
        "both": lambda p, x: (p["w"], x + 1),
    }
    check(outputs[of], {"w": make(2, 2)}, make(1, 2))


def test_one_block():
    params = {"a": make(4, 4), "b": make(4, 4, seed=1)}
    blocks = check(
        lambda p, x: x @ p["a"] @ p["b"], params, make(2, 4), block_of=lambda path: None
    )
    assert len(blocks) == 1 and len(blocks[0].leaves) == 2


def test_constants_are_part_of_what_a_block_does():
    tables = [make(4, seed=i) for i in range(3)]

    def fn(params, x):
        for w, table in zip(params["layers"], tables, strict=True):
            x = (x @ w) * table
        return x

    blocks = check(fn, {"layers": [make(4, 4, seed=i) for i in range(3)]}, make(2, 4))
    assert len({b.fn for b in blocks if b.leaves}) == 3


def test_layers_that_were_computed():
    def fn(params, x):
        return lax.scan(lambda c, w: (c @ w, None), x, jnp.tanh(params["w"]))[0]

    with pytest.raises(ValueError, match=r"computed from w by tanh.*block_of=lambda"):
        tracing.blocks(fn, {"w": make(3, 4, 4)}, make(2, 4))


def test_names_of_blocks():
    names = {
        "encoder/layers/3/mlp/up/kernel": "encoder/layers/3",
        "layer_12/attn/query/kernel": "layer_12",
        "head/kernel": "head",
        "kernel": "kernel",
    }
    assert {path: tracing.block_of(path) for path in names} == names
