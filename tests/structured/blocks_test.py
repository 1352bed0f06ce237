"""What blocks do to what goes through them: CFSP, Adapt-Pruner, and blocks that go."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import calibration, structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 6, 8))
NAMES = ("layers/0", "layers/1", "layers/2", "layers/3")


def layer(x, w):
    return x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]


def fn(p, x):
    x = x @ p["embed"]
    for w in p["layers"]:
        x = layer(x, w)
    return (x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * p["norm"]) @ p["head"]


def params(layers=4, width=8, hidden=16):
    keys = iter(jax.random.split(KEY, 40))

    def new(*shape):
        return jax.random.normal(next(keys), shape) / 3

    def one():
        return {
            "gate": new(width, hidden), "up": new(width, hidden), "down": new(hidden, width)
        }  # fmt: skip

    layers = [one() for _ in range(layers)]
    ends = {"embed": new(8, width), "norm": new(width), "head": new(width, 3)}
    return {**ends, "layers": layers}


P = params()
GRAPH = structured.trace(fn, P, X)
GROUPS = [f"layers/{i}/down:0" for i in range(4)]


def found(*cosines):
    return calibration.Similarity(NAMES, jnp.asarray(cosines), jnp.float32(1))


# ---- fine scores


def test_relative_activation_by_hand():
    stats = jp.calibrate(fn, P, [X])
    scores = structured.relative_activation(GRAPH, P, stats, power=0.5)
    w, x = P["layers"][0], X @ P["embed"]
    h = (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])).reshape(-1, 16)
    norm = jnp.sqrt((h**2).mean(0))
    down = abs(w["down"]) * norm[:, None]
    share = (down / down.sum(0)).mean(1)
    for made in (w["gate"], w["up"]):
        share += (abs(made) / abs(made).sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(scores[GROUPS[0]], share * norm**0.5, rtol=1e-4)
    np.testing.assert_allclose(share.sum(), 3.0, rtol=1e-5)


def test_shares_do_not_see_the_scale_of_a_matrix():
    stats = jp.calibrate(fn, P, [X])
    scores = structured.relative_activation(GRAPH, P, stats, power=0.0)
    scaled = {**P, "layers": [{**w, "down": 7 * w["down"]} for w in P["layers"]]}
    again = structured.relative_activation(GRAPH, scaled, stats, power=0.0)
    for name in GROUPS:
        np.testing.assert_allclose(scores[name], again[name], rtol=1e-5)


# ---- ratios by block


def test_the_budget_is_met_and_an_identity_keeps_least():
    for ratio in (0.1, 0.3, 0.6):
        ratios = structured.block_ratios(GRAPH, found(0.4, 1.0, 0.7, 0.5), ratio=ratio)
        kept = 1 - np.array([ratios[n] for n in GROUPS])
        np.testing.assert_allclose(kept.mean(), 1 - ratio, rtol=1e-6)
        assert np.argmin(kept) == 1 and np.argmax(kept) == 0
        assert (kept > 0).all() and (kept <= 1).all()
    even = structured.block_ratios(
        GRAPH, found(0.4, 1.0, 0.7, 0.5), ratio=0.3, sharpness=0.0
    )
    np.testing.assert_allclose(list(even.values()), 0.3)
    assert list(even) == GROUPS


def test_block_ratios_make_a_plan():
    seen = calibration.similarity(fn, P, [X])
    assert seen.names == NAMES
    ratios = structured.block_ratios(GRAPH, seen, ratio=0.25)
    scores = structured.relative_activation(GRAPH, P, jp.calibrate(fn, P, [X]))
    plan = structured.plan(
        GRAPH, scores, ratio=0.0, kinds=("neuron",), overrides=ratios
    )
    for name in GROUPS:
        assert len(plan.groups[name].kept) == round(16 * (1 - ratios[name]))
    assert len({len(plan.groups[n].kept) for n in GROUPS}) > 1
    assert plan.verify(fn, P, X).equal


def test_adapt_pruner_takes_a_step():
    first = structured.adapt_ratios(
        GRAPH, found(0.2, 1.0, 0.4, 0.4), step=0.1, amplitude=0.05
    )
    values = np.array([first[n] for n in GROUPS])
    np.testing.assert_allclose(values.mean(), 0.1, rtol=1e-6)
    np.testing.assert_allclose(values, [0.1 - 0.03, 0.15, 0.09, 0.09], rtol=1e-5)
    again = structured.adapt_ratios(
        GRAPH, found(0.5, 0.5, 0.5, 0.5), step=0.1, previous=first
    )
    np.testing.assert_allclose([again[n] for n in GROUPS], values + 0.1, rtol=1e-6)
    clipped = structured.adapt_ratios(
        GRAPH, found(0.0, 1.0, 0.0, 0.0), step=0.5, amplitude=1.0
    )
    assert clipped[GROUPS[1]] == 0.99 and min(clipped.values()) >= 0


def test_pruning_and_training_in_turn():
    """The loop of Adapt-Pruner: each round traces what the last one left."""
    run, small, ratios, y = fn, P, None, jnp.ones((4, 6, 3))
    for _ in range(2):
        graph = structured.trace(run, small, X)

        def loss(p, x, run=run):
            return jnp.mean((run(p, x) - y) ** 2)

        seen = calibration.similarity(run, small, [X])
        previous = ratios or {}
        ratios = structured.adapt_ratios(GRAPH, seen, step=0.25, previous=previous)
        share = {n: 1 - (1 - r) / (1 - previous.get(n, 0.0)) for n, r in ratios.items()}
        grads = calibration.gradients(loss, small, [X])
        scores = structured.taylor(graph, small, grads, form="first")
        plan = structured.plan(graph, scores, ratio=0.0, overrides=share)
        run, small = plan.rewrite(run), plan.shrink(small)
        before = loss(small, X, run)
        step = jax.grad(loss)(small, X, run)
        small = optax.apply_updates(small, jax.tree.map(lambda g: -0.1 * g, step))
        assert loss(small, X, run) < before
    for i, name in enumerate(GROUPS):
        kept = small["layers"][i]["down"].shape[0]
        assert abs(kept - 16 * (1 - ratios[name])) <= 1.5
    assert sum(w["down"].shape[0] for w in small["layers"]) == pytest.approx(32, abs=3)


# ---- blocks that go


def test_the_least_influential_blocks():
    seen = found(0.9, 0.2, 0.9, 0.5)
    assert structured.redundant_blocks(seen, 3) == ("layers/2", "layers/0", "layers/3")
    assert structured.redundant_blocks(seen, 0) == ()


def test_removed_blocks_are_as_if_they_had_never_been():
    gone = ["layers/1", "layers/3"]
    small_fn, small = structured.remove_blocks(fn, P, X, blocks=gone)
    assert small["layers"][1] == dict.fromkeys(("gate", "up", "down"))
    fewer = {**P, "layers": [P["layers"][0], P["layers"][2]]}
    other = jax.random.normal(jax.random.key(5), (2, 3, 8))
    np.testing.assert_allclose(
        jax.jit(small_fn)(small, other), fn(fewer, other), rtol=1e-5, atol=1e-6
    )

    def loss(p, x):
        return jnp.mean(small_fn(p, x) ** 2)

    grads = jax.grad(loss)(small, X)
    wanted = jax.grad(lambda p: jnp.mean(fn(p, X) ** 2))(fewer)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # Nothing of them is computed: half of the flops of the layers are gone.
    flops = jax.jit(small_fn).lower(small, X).cost_analysis()["flops"]
    dense = jax.jit(fn).lower(P, X).cost_analysis()["flops"]
    few = jax.jit(fn).lower(fewer, X).cost_analysis()["flops"]
    assert few <= flops < 1.05 * few < dense
    # And what is left can be pruned on.
    graph = structured.trace(small_fn, small, X)
    assert [g.size for g in graph.groups if g.kind == "neuron"] == [16, 16]


def test_what_stands_behind_the_last_block_stays():
    def plain(p, x):  # nothing says that the norm is not of the last layer
        x = layer(x, p["layers"][0])
        return (x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))) @ p["head"]

    p = {"layers": P["layers"][:1], "head": P["head"]}
    small_fn, small = structured.remove_blocks(plain, p, X, blocks=["layers/0"])
    norm = X / jnp.sqrt(jnp.mean(X**2, -1, keepdims=True))
    np.testing.assert_allclose(small_fn(small, X), norm @ P["head"], rtol=1e-4)


@pytest.mark.parametrize("norm", ["in front", "behind"])
def test_blocks_of_a_module_go(norm):
    front = (lambda: nn.LayerNorm()) if norm == "in front" else lambda: lambda x: x
    behind = (lambda: nn.LayerNorm()) if norm == "behind" else lambda: lambda x: x

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            attention = nn.MultiHeadDotProductAttention(num_heads=2)
            x = behind()(x + attention(front()(x), mask=mask))
            return behind()(x + nn.Dense(8)(nn.gelu(nn.Dense(16)(front()(x)))))

    class Model(nn.Module):
        blocks: tuple[int, ...] = (0, 1, 2)

        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(20, 8, name="embed")(ids)
            mask = (ids > 1)[:, None, None, :]  # made where it is first used
            for i in self.blocks:
                x = Block(name=f"block_{i}")(x, mask)
            if norm == "in front":
                x = nn.LayerNorm(name="norm")(x)
            return nn.Dense(20, name="head")(x)

    ids = jnp.arange(10).reshape(2, 5)
    model = Model()
    p = model.init(KEY, ids)
    seen = calibration.similarity(model.apply, p, [ids])
    assert seen.names == ("block_0", "block_1", "block_2")
    for i in range(3):
        small_fn, small = structured.remove_blocks(
            model.apply, p, ids, blocks=[f"block_{i}"]
        )
        assert small["params"][f"block_{i}"]["Dense_0"]["kernel"] is None
        fewer = Model(tuple(j for j in range(3) if j != i))
        np.testing.assert_allclose(small_fn(small, ids), fewer.apply(p, ids), rtol=1e-4)


def test_layers_of_a_scan_go_as_a_group():
    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, p)[0]

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *P["layers"])
    seen = calibration.similarity(scanned, stacked, [X])
    gone = {int(name.split("/")[-1]) for name in structured.redundant_blocks(seen, 2)}
    graph = structured.trace(scanned, stacked, X)
    (group,) = (g for g in graph.groups if g.kind == "layer")
    plan = structured.planned(graph, {group.name: sorted(set(range(4)) - gone)})
    x = X
    for i in sorted(set(range(4)) - gone):
        x = layer(x, P["layers"][i])
    np.testing.assert_allclose(
        plan.rewrite(scanned)(plan.shrink(stacked), X), x, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="is a layer of a scan.*planned"):
        structured.remove_blocks(scanned, stacked, X, blocks=[seen.names[0]])


# ---- bad input


def test_messages():
    with pytest.raises(ValueError, match="blocks: there is none called 'layers/9'"):
        structured.remove_blocks(fn, P, X, blocks=["layers/9"])
    with pytest.raises(ValueError, match="nothing passes head .* it reads .* writes"):
        structured.remove_blocks(fn, P, X, blocks=["head"])
    with pytest.raises(ValueError, match=r"count: got 5; expected .* 0 to 4"):
        structured.redundant_blocks(found(1, 1, 1, 1), 5)
    with pytest.raises(ValueError, match="ratio: got 1.0"):
        structured.block_ratios(GRAPH, found(1, 1, 1, 1), ratio=1.0)
    with pytest.raises(ValueError, match="sharpness: got -1"):
        structured.block_ratios(GRAPH, found(1, 1, 1, 1), ratio=0.5, sharpness=-1)
    with pytest.raises(ValueError, match="step: got 2"):
        structured.adapt_ratios(GRAPH, found(1, 1, 1, 1), step=2)
    with pytest.raises(ValueError, match="amplitude: got -1"):
        structured.adapt_ratios(GRAPH, found(1, 1, 1, 1), step=0.1, amplitude=-1)
    with pytest.raises(ValueError, match="no group of the kinds .* lies in one"):
        structured.block_ratios(GRAPH, found(1, 1, 1, 1), ratio=0.5, kinds=("head",))
    with pytest.raises(ValueError, match="no product with statistics"):
        stats = jp.calibrate(fn, P, [X])
        structured.relative_activation(GRAPH, P, stats, kinds=("head",))
