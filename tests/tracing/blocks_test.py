"""A function cut into blocks is the function, and each block has its own leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune import calibration, tracing

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (5, 8))


def weight(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape) * 0.3


def run(fn, params, *args, **options):
    """Runs all blocks; they do what `fn` does. Their names, and states between them."""
    cut = tracing.blocks(fn, params, *args, **options)
    state, states = cut.begin(*args), []
    for block in cut.blocks:
        assert set(block.take(params)) == set(block.paths)
        state = jax.jit(block.fn)(block.take(params), state)
        states.append(state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        cut.finish(state), fn(params, *args),
    )  # fmt: skip
    return cut.blocks, states


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="ln")(x)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(h)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        for i in range(3):
            x = nn.remat(Layer)(name=f"layer_{i}")(x)
        return nn.Dense(11, name="head")(nn.LayerNorm(name="ln")(x))


def test_unrolled_layers_are_cut_at_the_residual_stream():
    model, tokens = Model(), jnp.arange(10).reshape(2, 5)
    params = model.init(KEY, tokens)
    found, states = run(jax.jit(model.apply), params, tokens)
    names = ["start", "layer_0", "layer_1", "layer_2", "end"]
    assert [b.name for b in found] == names
    assert found[0].paths == ("embed/embedding",)
    assert {p.split("/")[0] for p in found[2].paths} == {"layer_1"}
    assert found[4].paths == ("head/bias", "head/kernel", "ln/bias", "ln/scale")
    for state in states[:-1]:
        assert [x.shape for x in state.values()] == [(2, 5, 8)]


def test_a_block_can_be_calibrated_and_written_back():
    model, tokens = Model(), jnp.arange(10).reshape(2, 5)
    params = model.init(KEY, tokens)
    whole = calibration.calibrate(model.apply, params, [tokens], statistics=("gram",))
    cut = tracing.blocks(model.apply, params, tokens)
    state, path = cut.begin(tokens), "layer_1/down/kernel"
    for block in cut.blocks[:2]:
        state = block.fn(block.take(params), state)
    block = cut.blocks[2]
    stats = calibration.calibrate(
        block.fn, block.take(params), [(state,)], statistics=("gram",)
    )
    (here,), (there,) = stats[path], whole[path]
    np.testing.assert_allclose(here.inputs.gram, there.inputs.gram, atol=1e-6)
    new = block.put(params, {path: jnp.zeros((16, 8))})
    assert not new["params"]["layer_1"]["down"]["kernel"].any()
    assert new["params"]["layer_0"]["down"]["kernel"].any()
    with pytest.raises(ValueError, match="leaves: head/kernel is no leaf of the block"):
        block.put(params, {"head/kernel": jnp.zeros((8, 11))})


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_iterations_of_a_scan_share_a_function(reverse):
    params = {"layers": {"w": weight(3, 8, 8), "b": weight(3, 8)}, "shared": weight(8, 8),
              "in": weight(8, 8), "out": weight(8, 4)}  # fmt: skip

    def fn(p, x, scales):
        first = x @ p["in"]

        def step(x, layer):
            w, scale = layer
            x = jnp.tanh(x @ w["w"] * scale + w["b"] + first @ p["shared"])
            return x, x.sum()

        x, sums = lax.scan(step, first, (p["layers"], scales), reverse=reverse)
        return x @ p["out"], sums

    found, states = run(fn, params, X, jnp.arange(1.0, 4))
    order = (2, 1, 0) if reverse else (0, 1, 2)
    assert [b.name for b in found] == ["start", *(f"layers/{i}" for i in order), "end"]
    assert [b.index for b in found] == [None, *order, None]
    assert len({b.fn for b in found}) == 3
    structure = jax.tree.map(jnp.shape, states[0])
    assert all(jax.tree.map(jnp.shape, s) == structure for s in states[:-1])
    leaves = found[1].take(params)
    np.testing.assert_array_equal(leaves["layers/w"], params["layers"]["w"][order[0]])
    assert leaves["shared"].shape == (8, 8)
    new = found[1].put(params, {"layers/w": jnp.zeros((8, 8))})["layers"]["w"]
    assert [bool(w.any()) for w in new] == [i != order[0] for i in range(3)]


def test_a_block_of_a_scan_has_the_sites_of_its_layer():
    params = {"w": weight(3, 8, 8)}

    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    cut = tracing.blocks(fn, params, X)
    block = cut.blocks[2]
    state = cut.begin(X)
    for b in cut.blocks[:2]:
        state = b.fn(b.take(params), state)
    (site,) = tracing.sites(block.fn, block.take(params), state).sites
    assert site.path == "w" and site.matrix == (1, 1, 8, 8)


def test_parameters_cast_all_at_once_belong_to_their_blocks():
    params = {f"layer{i}": {"w": weight(8, 8, seed=i)} for i in range(3)}

    def fn(p, x):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)
        for i in range(3):
            x = jnp.tanh(x @ p[f"layer{i}"]["w"])
        return x

    found, _ = run(fn, params, X)
    layers = [f"layer{i}" for i in range(3)]
    assert [b.name for b in found] == ["start", *layers, "end"]
    assert [b.paths for b in found[1:-1]] == [(f"{n}/w",) for n in layers]


def test_two_scans_and_layers_between():
    params = {"a": weight(2, 8, 8), "mid": weight(8, 8), "b": weight(2, 8, 8)}

    def fn(p, x):
        def step(x, w):
            return jnp.tanh(x @ w), None

        x = lax.scan(step, x, p["a"])[0]
        return lax.scan(step, x @ p["mid"], p["b"])[0], p["mid"]

    found, _ = run(fn, params, X)
    names = ["start", "a/0", "a/1", "between", "b/0", "b/1", "end"]
    assert [b.name for b in found] == names
    assert found[3].paths == ("mid",)


def test_names_of_blocks_may_be_given():
    params = {"up": weight(8, 8), "down": weight(8, 8), "head": weight(8, 4)}

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["up"]) @ p["down"]) @ p["head"]

    found, _ = run(fn, params, X, block_of=lambda p: p if p != "head" else None)
    assert [b.name for b in found] == ["start", "up", "down", "end"]
    assert [b.name for b in run(fn, params, X)[0]] == ["end"]
