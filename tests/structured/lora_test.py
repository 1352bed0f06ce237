"""Factors of low rank, LoRAPrune, and CFSP's ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import calibration, structured

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)


def _random(factors, seed=1):
    """Other values in the place of zeros."""
    leaves, treedef = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten(new)


# ---- factors


def _scan(w, x):
    return jax.lax.scan(lambda c, layer: (c, x @ layer), 0, w)[1]


USES = {
    "kernel": (lambda w, x: x @ w, (4, 3), (5, 4)),
    "outputs first": (lambda w, x: x @ w.T, (3, 4), (5, 4)),
    "queries": (lambda w, x: jnp.einsum("td,hdk->thk", x, w), (2, 4, 3), (5, 4)),
    "outputs of heads": (
        lambda w, x: jnp.einsum("thk,hkd->td", x, w), (2, 3, 4), (5, 2, 3),
    ),
    "experts": (lambda w, x: jnp.einsum("etd,edf->etf", x, w), (2, 4, 3), (2, 5, 4)),
    "layers of a scan": (_scan, (2, 4, 3), (5, 4)),
    "one input": (lambda w, x: x @ w, (1, 3), (5, 1)),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_factors_are_those_of_the_matrix(use):
    fn, shape, size = USES[use]
    w, x = jax.random.normal(KEY, shape), jax.random.normal(jax.random.key(2), size)
    run = lambda p, x: fn(p["w"], x)  # noqa: E731
    first = structured.lora_init(run, {"w": w}, x, key=KEY, rank=2, alpha=3.0)
    np.testing.assert_array_equal(structured.lora_merge({"w": w}, first)["w"], w)
    factors = _random(first)
    a, b = factors["w"].a, factors["w"].b
    assert a.shape[-1] == b.shape[-2] == 2 and factors["w"].scale == 1.5
    wide = x.reshape(5, -1) if use == "outputs of heads" else x
    found = run(structured.lora_merge({"w": w}, factors), x)
    change = (1.5 * wide @ a @ b).reshape(found.shape)
    np.testing.assert_allclose(found, run({"w": w}, x) + change, rtol=1e-4, atol=1e-5)


def test_factors_of_a_convolution():
    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params, x = {"w": jnp.ones((2, 2, 3, 5))}, jax.random.normal(KEY, (1, 4, 4, 3))
    factors = _random(structured.lora_init(fn, params, x, key=KEY, rank=1))
    assert factors["w"].a.shape == (12, 1) and factors["w"].b.shape == (1, 5)
    # One channel more in the middle: the window makes it, and it is spread over outputs.
    change = fn(structured.lora_merge(params, factors), x) - fn(params, x)
    flat = change.reshape(-1, 5)
    np.testing.assert_allclose(
        flat, flat[:, :1] * factors["w"].b / factors["w"].b[:, :1], rtol=1e-3, atol=1e-3
    )
    assert jnp.abs(change).max() > 1


def test_ranks_and_leaves_are_chosen_by_pattern():
    def fn(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"] + p["bias"]

    def draw(**options):
        return structured.lora_init(fn, params, jnp.ones((5, 2)), key=KEY, **options)

    up = jnp.ones((2, 8), jnp.bfloat16)
    params = {"up": up, "down": jnp.ones((8, 3)), "bias": jnp.ones(3)}
    found = draw(rank={"*": 4, "up": 1})
    assert {p: (f.a.shape[-1], f.scale) for p, f in found.items()} == {
        "down": (4, 4.0), "up": (1, 16.0),
    }  # fmt: skip
    assert list(draw(rank={"up": 1})) == ["up"] == list(draw(where="up"))
    merged = structured.lora_merge(params, _random(found))
    assert merged["up"].dtype == jnp.bfloat16 and merged["bias"] is params["bias"]
    with pytest.raises(ValueError, match="rank: got 0 for"):
        draw(rank=0)
    with pytest.raises(ValueError, match="rank: the pattern 'left' matches no leaf"):
        draw(rank={"left": 2})
    with pytest.raises(
        ValueError, match="match none of the leaves that where= selects"
    ):
        draw(rank={"bias": 2})
    with pytest.raises(
        ValueError, match="where: bias, .* is no matrix .*where='!bias'"
    ):
        draw(where="*")
    with pytest.raises(ValueError, match="no leaf down, which has factors"):
        structured.lora_merge({"up": params["up"]}, found)
    with pytest.raises(
        ValueError, match=r"down has the shape \(4, 3\), .*plan.rewrite"
    ):
        structured.lora_merge({**params, "down": jnp.ones((4, 3))}, found)


# ---- LoRAPrune


def _mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"].T


X = jax.random.normal(jax.random.key(3), (16, 4))
MLP = {
    "up": jax.random.normal(KEY, (4, 6)), "bias": jnp.ones(6),
    "down": jax.random.normal(jax.random.key(1), (3, 6)),
}  # fmt: skip
GRAPH = structured.trace(_mlp, MLP, X)
NAME = GRAPH.groups[0].name


def _factors():
    return _random(structured.lora_init(_mlp, MLP, X, key=KEY, rank=2))


def _grads(factors, seed=5):
    return jax.tree.map(lambda x: 0.1 * x, _random(factors, seed))


def test_scores_by_hand():
    """Of each leaf with factors of norm 1, added up, and averaged over steps."""
    method = structured.loraprune(GRAPH.as_groups(), jp.schedules.constant(0.5))
    factors = _factors()
    state, wanted = method.init(), np.zeros(6)
    for seed in (5, 6):
        grads = _grads(factors, seed)
        state = jax.jit(method.update)(state, MLP, factors, grads)
        new = np.zeros(6)
        for path, w, rest in (("up", MLP["up"], 0), ("down", MLP["down"].T, 1)):
            f, g = factors[path], grads[path]
            slope = f.a @ g.b + g.a @ f.b - g.a @ g.b
            each = np.abs(slope * (w + f.scale * f.a @ f.b)).sum(rest)
            new += each / np.linalg.norm(each)
        wanted = 0.9 * wanted + 0.1 * new
    np.testing.assert_allclose(state.scores[NAME], wanted, rtol=1e-4)
    assert int(state.step) == 2 and int(state.kept[NAME].sum()) == 3
    assert wanted[state.kept[NAME]].min() > wanted[~state.kept[NAME]].max()


def test_what_is_not_finite_is_left_out():
    method = structured.loraprune(GRAPH.as_groups(), jp.schedules.constant(0.0))
    factors = _factors()
    state = method.update(method.init(), MLP, factors, _grads(factors))
    bad = jax.tree.map(lambda x: x * jnp.nan, factors)
    again = method.update(state, MLP, factors, bad)
    np.testing.assert_array_equal(again.scores[NAME], state.scores[NAME])
    assert again.kept[NAME].all() and int(again.step) == 2


def test_what_is_gone_does_not_come_back():
    shares = jnp.array([0.5, 0.5, 0.5, 0.2, 0.7, 1.0])
    method = structured.loraprune(GRAPH.as_groups(), lambda t: shares[t], decay=0.0)
    factors, state, before = _factors(), method.init(), np.ones(6, bool)
    alone = set()
    for seed in range(6):
        state = method.update(state, MLP, factors, _grads(factors, seed))
        kept = np.asarray(state.kept[NAME])
        assert not (kept & ~before).any()
        assert kept.sum() == (3, 3, 3, 3, 2, 1)[seed]
        alone.add(tuple(np.argsort(-np.asarray(state.scores[NAME]))[:3]))
        before = kept
    assert len(alone) > 1  # the scores alone would have chosen others


def test_view_plan_and_small_model_agree():
    method = structured.loraprune(GRAPH.as_groups(), jp.schedules.constant(0.5))
    factors = _factors()
    state = method.update(method.init(), MLP, factors, _grads(factors))
    merged = structured.lora_merge(MLP, factors)
    plan = structured.planned(GRAPH, state.kept)
    seen = method.view(state, MLP, factors)
    jax.tree.map(np.testing.assert_array_equal, seen, plan.mask(merged))
    assert (seen["bias"] == 0).sum() == 3
    small = plan.rewrite(_mlp)(plan.shrink(merged), X)
    np.testing.assert_allclose(small, _mlp(seen, X), rtol=1e-4, atol=1e-5)


def _attend(p, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k) / 2)
    x = x + jnp.einsum("bhqs,bshk,hkd->bqd", weights, v, p["o"])
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"]


def _transformer(params, x):
    for p in params["layers"]:
        x = _attend(p, x)
    return x @ params["head"]


def _weights():
    keys = iter(jax.random.split(jax.random.key(7), 20))

    def new(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

    def layer():
        one = {n: new(8, 4, 4) for n in "qkv"}
        return {**one, "o": new(4, 4, 8) / 2, "up": new(8, 16), "down": new(16, 8)}

    return {"layers": [layer(), layer()], "head": new(8, 3)}


def test_a_transformer_loses_half_while_its_adapters_train():
    params, x = _weights(), jax.random.normal(jax.random.key(1), (16, 5, 8))
    graph, y = structured.trace(_transformer, params, x), _transformer(params, x)
    groups = graph.as_groups(kinds=("head", "neuron"))
    schedule = jp.schedules.cubic(0.5, begin=5, end=25, every=5)
    method = structured.loraprune(groups, schedule)
    factors = structured.lora_init(_transformer, params, x, key=KEY, rank=4)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-2))

    def loss(params):
        return jnp.mean((_transformer(params, x) - y) ** 2)

    @jax.jit
    def step(factors, opt_state, state):
        grads = jax.grad(lambda f: loss(method.view(state, params, f)))(factors)
        state = method.update(state, params, factors, grads)
        updates, opt_state = tx.update(grads, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, state

    opt_state, state, left = tx.init(factors), method.init(), []
    for _ in range(45):
        factors, opt_state, state = step(factors, opt_state, state)
        left.append({n: int(k.sum()) for n, k in state.kept.items()})
    for name, size in groups.sizes.items():
        counts = [n[name] for n in left]
        assert counts == sorted(counts, reverse=True)
        assert counts[4] == size and counts[-1] == size // 2
        assert size == 4 or len(set(counts)) > 3  # neurons go bit by bit

    merged = structured.lora_merge(params, factors)
    plan = structured.planned(graph, state.kept)
    assert plan.verify(_transformer, merged, x).equal
    small = plan.rewrite(_transformer)(plan.shrink(merged), x)
    after = jnp.mean((small - y) ** 2)
    np.testing.assert_allclose(after, loss(plan.mask(merged)), rtol=1e-3)
    # The scores choose better than their reverse, and training mends most of it.
    other = structured.planned(graph, {n: ~k for n, k in state.kept.items()})
    assert after < 0.2 * loss(plan.mask(params)) < 0.2 * loss(other.mask(params))


def test_messages():
    groups = GRAPH.as_groups()
    with pytest.raises(
        TypeError, match="groups: got a Graph; expected jaxprune.Groups"
    ):
        structured.loraprune(GRAPH, jp.schedules.constant(0.5))
    with pytest.raises(TypeError, match="sparsity: got 0.5; expected a function"):
        structured.loraprune(groups, 0.5)
    with pytest.raises(ValueError, match="decay: got 1"):
        structured.loraprune(groups, jp.schedules.constant(0.5), decay=1)
    method = structured.loraprune(groups, jp.schedules.constant(0.5))
    with pytest.raises(ValueError, match="has no leaf with an adapter.*kinds="):
        method.update(method.init(), MLP, {}, {})


# ---- CFSP's ranks


LAYER = {"up": jnp.ones((4, 6)), "bias": jnp.ones(6)}
BLOCKS = {"layers": [LAYER] * 4, "head": jnp.ones((6, 2))}
NAMES = tuple(f"layers/{i}" for i in range(4))


def _similar(*cosines):
    return calibration.Similarity(NAMES, jnp.asarray(cosines), jnp.float32(1))


def _ranks(*cosines, **options):
    found = structured.block_ranks(BLOCKS, _similar(*cosines), **options)
    assert set(found) == {f"{n}/{leaf}" for n in NAMES for leaf in ("up", "bias")}
    return [found[f"{n}/up"] for n in NAMES]


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_ranks_follow_importance_at_the_same_total(rank):
    ranks = _ranks(0.7, 0.99, 0.9, 0.8, rank=rank)
    assert sum(ranks) == 4 * rank and min(ranks) >= 1
    assert ranks[0] >= ranks[3] >= ranks[2] >= ranks[1]
    assert rank == 1 or ranks[0] > ranks[1]
    assert _ranks(0.7, 0.99, 0.9, 0.8, rank=rank, sharpness=0.0) == [rank] * 4


def test_ranks_are_shared_out_as_what_is_kept():
    similarity = _similar(0.85, 0.95, 0.9, 0.88)

    def fn(p, x):
        for layer in p["layers"]:
            x = x + jax.nn.relu(x @ layer["up"] + layer["bias"]) @ layer["up"].T
        return x @ p["head"]

    params = {**BLOCKS, "head": jnp.ones((4, 2))}
    graph = structured.trace(fn, params, jnp.ones((3, 4)))
    ratios = structured.block_ratios(graph, similarity, ratio=0.5)
    kept = 1 - np.array(list(ratios.values()))
    ranks = np.array(_ranks(0.85, 0.95, 0.9, 0.88, rank=100))
    np.testing.assert_allclose(ranks, 200 * kept, atol=1)
    few = structured.block_ranks(params, similarity, rank=2)
    factors = structured.lora_init(fn, params, jnp.ones((3, 4)), key=KEY, rank=few)
    assert [factors[f"{n}/up"].a.shape[-1] for n in NAMES] == [
        few[f"{n}/up"] for n in NAMES
    ]
    assert set(factors) == {f"{n}/up" for n in NAMES}


def test_messages_of_ranks():
    with pytest.raises(ValueError, match="rank: got 0"):
        _ranks(1, 1, 1, 1, rank=0)
    with pytest.raises(ValueError, match="sharpness: got -1"):
        _ranks(1, 1, 1, 1, sharpness=-1)
    with pytest.raises(ValueError, match="no leaf of its own has layers/0.*one rank"):
        structured.block_ranks({"layers": jnp.ones((4, 3, 3))}, _similar(1, 1, 1, 1))


def test_as_many_experts_stay_as_a_token_is_sent_to():
    def fn(p, x):
        weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        hidden = jnp.einsum("td,tkdf->tkf", x, p["up"][chosen])
        return jnp.einsum("tk,tkf->tf", weights, hidden)

    keys = jax.random.split(jax.random.key(0), 3)
    p = {
        "router": jax.random.normal(keys[0], (4, 4)),
        "up": jax.random.normal(keys[1], (4, 4, 3)),
    }
    x = jax.random.normal(keys[2], (6, 4))
    graph = structured.trace(fn, p, x)
    groups = graph.as_groups(kinds="expert")
    assert [g.minimum for g in groups.groups] == [2]
    factors = structured.lora_init(fn, p, x, key=KEY, where="router")
    method = structured.loraprune(groups, jp.schedules.constant(0.75))
    state = method.update(method.init(), p, factors, factors)
    assert [int(x.sum()) for x in state.kept.values()] == [2]
    structured.planned(graph, state.kept)


def test_ranks_of_paths_that_look_like_patterns():
    def fn(p, x):
        return x @ p["layers"]["0[a]"]["w"] @ p["layers"]["1[a]"]["w"]

    p = {"layers": {name: {"w": jnp.ones((4, 4))} for name in ("0[a]", "1[a]")}}
    similar = jp.calibration.Similarity(
        ("layers/0[a]", "layers/1[a]"), jnp.array([0.8, 0.9]), jnp.float32(1)
    )
    ranks = structured.block_ranks(p, similar)
    factors = structured.lora_init(fn, p, jnp.ones((2, 4)), rank=ranks, key=KEY)
    assert [f.a.shape[-1] for f in factors.values()] == list(ranks.values())
    assert len(factors) == 2
