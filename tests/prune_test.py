"""Pruning in one shot: every choice of score, structure, allocation and container."""

import functools
import math
import re
from fractions import Fraction

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _prune

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (16, 24)), "bias": jnp.ones(24)},
        "c": {"kernel": 3 * jax.random.normal(keys[1], (24, 8))},
        "table": {"embedding": jax.random.normal(keys[2], (5, 16))},
    }


WEIGHTS = {"a": 16 * 24, "c": 24 * 8}


def _keep(size, sparsity):
    return size - math.floor(Fraction(str(sparsity)) * size + Fraction(1, 2))


def _top(scores, k):
    flat = np.asarray(scores).ravel()
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, stable=True)[:k]] = True
    return mask.reshape(np.shape(scores))


def _check(params, pruned, masks, expected):
    for name, mask in expected.items():
        np.testing.assert_array_equal(masks[name]["kernel"], mask)
        kernel = np.where(mask, params[name]["kernel"], 0)
        np.testing.assert_array_equal(pruned[name]["kernel"], kernel)
    assert masks["a"]["bias"] is None and masks["table"]["embedding"] is None
    assert pruned["a"]["bias"] is params["a"]["bias"]


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.9, 0.999, Fraction(1, 3)], ids=str)
def test_uniform(sparsity):
    params = _params()
    pruned, masks = jp.prune(params, sparsity)
    expected = {
        p: _top(np.abs(params[p]["kernel"]), _keep(n, sparsity))
        for p, n in WEIGHTS.items()
    }
    _check(params, pruned, masks, expected)


def test_global():
    params = _params()
    # 0.55 of 384 and of 192 are rounded in the same direction; together exactly.
    pruned, masks = jp.prune(params, 0.55, allocation="global")
    both = np.concatenate([np.abs(params[p]["kernel"]).ravel() for p in WEIGHTS])
    mask = np.split(_top(both, _keep(both.size, 0.55)), [WEIGHTS["a"]])
    expected = {
        p: m.reshape(params[p]["kernel"].shape)
        for p, m in zip(WEIGHTS, mask, strict=True)
    }
    _check(params, pruned, masks, expected)


def test_global_counts_are_of_the_whole():
    params = {str(i): {"kernel": jnp.ones((1, 3))} for i in range(10)}
    _, masks = jp.prune(params, 0.5, allocation="global")  # 1.5 of each three
    assert jp.masks.count(masks) == (15, 30)


def test_erk():
    params = _params()
    pruned, masks = jp.prune(params, 0.7, allocation="erk")
    shapes = {p: params[p]["kernel"].shape for p in WEIGHTS}
    shares = jp.allocation.erk(shapes, 0.7)
    sizes = [(1 - shares[p]) * n for p, n in WEIGHTS.items()]
    counts = jp.allocation.round_to_total(sizes, _keep(sum(WEIGHTS.values()), 0.7))
    expected = {
        p: _top(np.abs(params[p]["kernel"]), k)
        for p, k in zip(WEIGHTS, counts, strict=True)
    }
    _check(params, pruned, masks, expected)


@pytest.mark.parametrize(
    "allocation",
    [
        {"*": 0.5, "c/*": 0.25},
        lambda shapes, s: {p: s / s.bit_length() for p in shapes},
    ],
    ids=["mapping", "function"],
)
def test_sparsity_by_leaf(allocation):
    params = _params()
    if callable(allocation):
        allocation = lambda shapes, s: {p: s / (1 + ("c/" in p)) for p in shapes}  # noqa: E731
        pruned, masks = jp.prune(params, 0.5, allocation=allocation)
    else:
        pruned, masks = jp.prune(params, allocation=allocation)
    expected = {
        p: _top(np.abs(params[p]["kernel"]), _keep(WEIGHTS[p], s))
        for p, s in (("a", 0.5), ("c", 0.25))
    }
    _check(params, pruned, masks, expected)


STRUCTURES = [jp.Unstructured(), jp.NM(1, 4), jp.Block(4, 4), jp.Channel()]


@pytest.mark.parametrize(
    ("structure", "allocation"),
    [
        pytest.param(s, a, id=f"{type(s).__name__}-{a}")
        for s in STRUCTURES
        for a in ("uniform", "global", "erk")
        if not (isinstance(s, jp.Channel) and a == "global")
    ],
)
def test_every_structure_with_every_allocation(structure, allocation):
    params = _params()
    pruned, masks = jp.prune(params, 0.5, structure=structure, allocation=allocation)
    kept, total = jp.masks.count(masks)
    assert total == sum(WEIGHTS.values())
    if isinstance(structure, jp.Channel):  # channels of two lengths: count those
        kept = sum(int(masks[p]["kernel"].any(0).sum()) for p in WEIGHTS)
        total = sum(masks[p]["kernel"].shape[1] for p in WEIGHTS)
    slack = {"Unstructured": 0, "NM": 3, "Block": 16, "Channel": 1}
    assert abs(kept - total / 2) <= slack[type(structure).__name__]
    again, masks_again = jp.prune(
        pruned, 0.5, structure=structure, allocation=allocation
    )
    assert jp.masks.flipped(masks, masks_again) == 0
    jax.tree.map(np.testing.assert_array_equal, pruned, again)


def test_channels_of_different_sizes_are_not_compared():
    with pytest.raises(
        ValueError, match="allocation: 'global' compares units .* 16 .* 24"
    ):
        jp.prune(_params(), 0.5, structure=jp.Channel(), allocation="global")
    params = {"a": jnp.ones((4, 8)), "c": jnp.ones((4, 16)).at[:, 3].set(2)}
    _, masks = jp.prune(params, 0.75, structure=jp.Channel(), allocation="global")
    assert jp.masks.sparsity(masks) == 0.75
    assert masks["c"][:, 3].all()


@pytest.mark.parametrize(
    "score",
    [
        jp.scores.magnitude,
        jnp.square,
        jax.jit(lambda w: -w),
        functools.partial(jnp.add, 1.0),
        jax.tree_util.Partial(jnp.add, 1.0),
        lambda w: jnp.where(w > 0, jnp.tanh(w), jax.nn.relu(-w) / 3),
        lambda w: jnp.abs(w) / jnp.linalg.norm(w, axis=0),
        lambda w: jnp.cumsum(w, axis=0),
        lambda w: w[::-1],
        lambda w: jnp.abs(w) * np.arange(256)[:, None],
        lambda w: jax.random.uniform(jax.random.key(0), w.shape),
        lambda w: jax.lax.broadcasted_iota(jnp.float32, w.shape, 0) - w,
    ],
)
@pytest.mark.parametrize("shape", [(256, 6), (256, 512)], ids=["small", "large"])
def test_score_functions(score, shape):
    w = jax.random.normal(jax.random.key(1), shape)
    _, masks = jp.prune({"kernel": w}, 0.8, score=score)
    expected = _top(jax.jit(score)(w), _keep(w.size, 0.8))
    np.testing.assert_array_equal(masks["kernel"], expected)


def test_score_trees():
    params = _params()
    scores = jp.scores.random(params, key=jax.random.key(7))
    scores["table"] = None  # what is not pruned needs no score
    pruned, masks = jp.prune(params, 0.5, score=scores)
    expected = {p: _top(scores[p]["kernel"], n // 2) for p, n in WEIGHTS.items()}
    _check(params, pruned, masks, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_low_precision(dtype):
    w = jnp.asarray(jax.random.normal(jax.random.key(1), (64, 32)), dtype)
    pruned, masks = jp.prune({"kernel": w}, 0.9)
    assert pruned["kernel"].dtype == dtype
    scores = np.abs(np.asarray(w.astype(jnp.float32)))
    np.testing.assert_array_equal(masks["kernel"], _top(scores, _keep(w.size, 0.9)))


def test_float64():
    with jax.enable_x64(True):
        w = 1 + np.random.default_rng(0).permutation(64).reshape(8, 8) * 2.0**-50
        _, masks = jp.prune({"kernel": jnp.asarray(w)}, 0.75)
        np.testing.assert_array_equal(masks["kernel"], _top(w, 16))


def test_nonfinite_weights_lose_and_become_zero():
    w = jnp.array([[jnp.nan, 1.0, -jnp.inf], [jnp.nan, 2.0, 0.0]])
    pruned, masks = jp.prune({"kernel": w}, 0.5)
    assert masks["kernel"].tolist() == [[False, True, True], [False, True, False]]
    assert pruned["kernel"].tolist() == [[0, 1, -math.inf], [0, 2, 0]]


def test_numpy():
    params = jax.tree.map(np.asarray, _params())
    pruned, masks = jp.prune(params, 0.5)
    expected = {
        p: _top(np.abs(params[p]["kernel"]), n // 2) for p, n in WEIGHTS.items()
    }
    _check(params, pruned, masks, expected)


def test_inside_jit_and_grad():
    params = _params()
    expected = jp.prune(params, 0.5)
    jitted = jax.jit(lambda p: jp.prune(p, 0.5))(params)
    jax.tree.map(np.testing.assert_array_equal, jitted, expected)

    def loss(p):  # the scores are no part of what is traced
        return jp.prune(p, 0.5, score=jp.scores.magnitude(params))[0]["c"][
            "kernel"
        ].sum()

    grads = jax.grad(loss)(params)
    np.testing.assert_array_equal(grads["c"]["kernel"], expected[1]["c"]["kernel"])


def test_linen():
    params = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 4)))
    pruned, masks = jp.prune(params, 0.5)
    assert (pruned["params"]["kernel"] != 0).sum() == 16
    assert masks["params"]["bias"] is None


@pytest.mark.parametrize("whole", [False, True], ids=["state", "module"])
def test_nnx(whole):
    model = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    params = model if whole else nnx.state(model, nnx.Param)
    pruned, masks = jp.prune(params, 0.5)
    kernel = pruned.kernel if whole else pruned["kernel"]
    assert (kernel[...] != 0).sum() == 16 and type(kernel) is nnx.Param
    assert jp.masks.count(masks) == (16, 32)
    again = jp.masks.apply(params, masks)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    if not whole:
        scores = nnx.to_pure_dict(jp.scores.magnitude(params))
        _, same = jp.prune(params, 0.5, score=scores)
        assert jp.masks.flipped(masks, same) == 0


def test_equinox():
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    pruned, masks = jp.prune(model, 0.5)
    assert pruned(jnp.ones(4)).shape == (2,)
    assert jp.masks.count(masks) == (24, 48)
    # A tree of scores that can be called is a tree.
    scores = jp.scores.random(model, key=jax.random.key(0))
    _, masks = jp.prune(model, 0.5, score=scores)
    expected = _top(scores.layers[0].weight, 16)
    np.testing.assert_array_equal(masks.layers[0].weight, expected)


def test_holes():
    params = {"w": jnp.ones((2, 2)), "n": None, "m": optax.MaskedNode()}
    pruned, masks = jp.prune(params, 0.5)
    assert pruned["n"] is None and pruned["m"] == optax.MaskedNode()
    assert masks["n"] is None and masks["m"] == optax.MaskedNode()
    assert masks["w"].tolist() == [[True, True], [False, False]]


def test_one_array_and_tuples():
    assert jp.prune(jnp.array([[1.0, 2.0]]), 0.5)[0].tolist() == [[0, 2]]
    pruned, _ = jp.prune((jnp.array([[1.0, 2.0]]), [jnp.array([[3.0, 1.0]])]), 0.5)
    assert jax.tree.map(lambda x: x.tolist(), pruned) == ([[0, 2]], [[[3, 0]]])


@pytest.mark.parametrize("context", [False, True], ids=["plain", "set_mesh"])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_sharding_stays(allocation, axis_type, context):
    params = _params()
    _, expected = jp.prune(params, 0.5, allocation=allocation)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("x", None))
    for name in WEIGHTS:
        params[name]["kernel"] = jax.device_put(params[name]["kernel"], sharding)
    if context:
        with jax.set_mesh(mesh):
            pruned, masks = jp.prune(params, 0.5, allocation=allocation)
    else:
        pruned, masks = jp.prune(params, 0.5, allocation=allocation)
    for name in WEIGHTS:
        for tree in (pruned, masks):
            assert tree[name]["kernel"].sharding.is_equivalent_to(sharding, 2)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_masks_are_no_more_bound_to_a_device_than_weights():
    _, masks = jp.prune(_params(), 0.5)
    assert not masks["a"]["kernel"].committed
    mixed = _params()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("x", None))
    mixed["a"]["kernel"] = jax.device_put(mixed["a"]["kernel"], sharding)
    _, found = jp.prune(mixed, 0.5, allocation="global")
    _, expected = jp.prune(_params(), 0.5, allocation="global")
    assert jp.masks.flipped(jax.device_get(found), jax.device_get(expected)) == 0


def test_a_second_call_does_not_compile_again():
    params = _params()
    _prune._compile_once.cache_clear()
    for sparsity in (0.1, 0.5, 0.9):
        jp.prune(params, sparsity)
    hits, misses = _prune._compile_once.cache_info()[:2]
    assert hits == 2 * misses  # a program for each shape
    jp.prune(params, 0.5, score=lambda w, x=params: w)  # no closure
    size = _prune._compile_once.cache_info().currsize
    jp.prune(params, 0.5, score=lambda w: w + params["a"]["bias"][0])
    jp.prune(params, structure=jp.NM(1, 2, axis={"*": 0}))
    assert _prune._compile_once.cache_info().currsize == size


def test_leaves_alike_share_a_program(caplog):
    random = np.random.default_rng(0)
    params = {
        f"{name}{i}": jnp.asarray(random.normal(size=shape).astype(np.float32))
        for i in range(5)
        for name, shape in {"up": (12, 20), "down": (20, 12)}.items()
    }
    _prune._compile_once.cache_clear()
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        _, masks = jp.prune(params, 0.3)
    compiled = [r for r in caplog.messages if r.startswith("Compiling jit(run)")]
    assert len(compiled) == 2
    for name, w in params.items():
        _, alone = jp.prune({"w": w}, 0.3)
        np.testing.assert_array_equal(masks[name], alone["w"])


def test_leaves_may_lie_on_different_meshes():
    w = jax.random.normal(jax.random.key(0), (16, 16))
    meshes = [
        jax.make_mesh((4,), ("x",), devices=jax.devices()[i : i + 4]) for i in (0, 4)
    ]
    params = {
        str(i): jax.device_put(w, NamedSharding(mesh, P("x", None)))
        for i, mesh in enumerate(meshes)
    }
    pruned, masks = jp.prune(params, 0.5)
    for name, x in params.items():
        assert masks[name].sharding == pruned[name].sharding == x.sharding
    np.testing.assert_array_equal(masks["0"], masks["1"])


def _running(w):
    """Each row's size and what the rows before it leave behind."""

    def add(carry, row):
        carry = carry / 2 + jnp.abs(row)
        return carry, carry

    return jax.lax.scan(add, jnp.zeros(w.shape[1]), w)[1]


@pytest.mark.parametrize(
    "score",
    [
        lambda w: jnp.abs(w) * math.sqrt(w.shape[0]),
        lambda w: jnp.abs(w) / w.size,
        lambda w: jnp.abs(w) * jnp.full(w.shape, 2.0),
        lambda w: jnp.abs(w) / jnp.linalg.norm(w),
        _running,
    ],
    ids=["fan-in", "size", "array", "norm", "scan"],
)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_scores_that_are_not_elementwise(score, allocation):
    """On leaves that are sampled and folded while the threshold is searched."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "up": jax.random.normal(keys[0], (512, 128)),
        "down": jax.random.normal(keys[1], (128, 512)),
    }
    _, found = jp.prune(params, 0.9, score=score, allocation=allocation)
    _, expected = jp.prune(
        params, 0.9, score=jax.tree.map(score, params), allocation=allocation
    )
    assert jp.masks.count(found).kept == 13108 if allocation == "uniform" else 13107
    assert jp.masks.flipped(found, expected) == 0


PARAMS = {"a": {"kernel": jnp.ones((4, 4))}, "bias": jnp.ones(4)}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, ValueError, "sparsity: got None; expected a number in [0, 1) with"),
        ({"sparsity": 90}, ValueError, "sparsity: got 90; expected a share of weights to "
         "prune in [0, 1). For 90 % write 0.9."),
        ({"sparsity": 1.0}, ValueError, "sparsity: got 1.0; expected a share"),
        ({"sparsity": math.nan}, ValueError, "sparsity: got nan; expected a share"),
        ({"sparsity": "high"}, TypeError, "sparsity: got 'high'; expected a Python number"),
        ({"sparsity": 0.5, "allocation": "even"}, ValueError, "allocation: got 'even'"),
        ({"sparsity": 0.5, "where": "b/*"}, ValueError, "where: the pattern 'b/*' matches"),
        ({"sparsity": 0.5, "where": 1}, TypeError, "where: got 1; expected None"),
        ({"sparsity": 0.9, "structure": jp.NM(2, 4)}, ValueError, "a/kernel: sparsity 0.9 "
         "contradicts NM(n=2, m=4, axis=-2, stride=1), which prunes 0.5"),
        ({"sparsity": 0.5, "score": {"a": 1}}, ValueError, "score: its structure is not "
         "that of params, which has the leaves a/kernel, bias. Give a function"),
        ({"sparsity": 0.5, "score": {"a": {"kernel": None}, "bias": None}}, ValueError,
         "score: got None for a/kernel; expected a floating-point score for each weight of "
         "[4, 4]. Give a function of one array, or a tree of arrays."),
        ({"sparsity": 0.5, "score": {"a": {"kernel": jnp.ones(4)}, "bias": None}},
         ValueError, "score: got float32[4] for a/kernel"),
        ({"sparsity": 0.5, "score": jax.tree.map(lambda x: x > 0, PARAMS)}, ValueError,
         "score: got bool[4, 4] for a/kernel"),
        ({"sparsity": 0.5, "score": lambda w: w.sum()}, ValueError, "score: got float32[]"),
        ({"sparsity": 0.5, "score": lambda w: w > 0}, ValueError, "score: got bool[4, 4]"),
        ({"sparsity": 0.5, "structure": "nm"}, TypeError, "structure: got 'nm'; expected"),
        ({"sparsity": 0.5, "structure": jp.Channel}, TypeError, "structure: got <class"),
        ({"sparsity": 0.5, "score": lambda w: None}, ValueError, "score: got None for"),
    ],
)  # fmt: skip
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        jp.prune(PARAMS, **options)


def test_nothing_to_prune():
    with pytest.raises(
        ValueError, match="selects no leaf to prune. The floating-point"
    ):
        jp.prune({"bias": jnp.ones(3)}, 0.5)
    with pytest.raises(ValueError, match=r"The floating-point leaves are: \(none\)"):
        jp.prune({"step": 3}, 0.5)


def test_scores_of_rounds_must_be_finite():
    params = {"kernel": jnp.arange(1.0, 33.0).reshape(8, 4)}
    score = lambda p: jax.tree.map(lambda x: x / jnp.min(x), p)  # noqa: E731
    with pytest.raises(
        ValueError, match="score: in round 2 32 of the 32 scores of kernel"
    ):
        jp.prune_in_rounds(params, 0.9, score=score, rounds=4)
    with pytest.raises(TypeError, match="score: got dict; expected a function"):
        jp.prune_in_rounds(params, 0.9, score=params, rounds=4)


@pytest.mark.parametrize("sparsity", [True, {"kernel": 0.5}])
def test_what_is_no_sparsity(sparsity):
    with pytest.raises(TypeError, match="sparsity: got .*; expected a Python number"):
        jp.prune({"kernel": jnp.ones((4, 4))}, sparsity)


@pytest.mark.parametrize("spec", [("a", None, "b"), ("b", "a", None), (None, "a", "b")])
@pytest.mark.parametrize(
    "structure",
    [
        jp.NM(2, 4, axis=(-3, -2)),
        jp.NM(2, 4, axis=(-3, -2), stride=2),
        jp.NM(2, 4, axis=-3),
        jp.NM(8, 16, axis=(-3, -2)),
        jp.Block(4, 8, axis=(-3, -2)),
        jp.Block(4, 8, axis=-3, out_axis=(-2, -1)),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.axis}-{getattr(s, 'stride', '')}",
)
def test_groups_that_straddle_shards(structure, spec):
    """Heads and their width are flattened to K; where shards cut groups, K moves."""
    w = jax.random.normal(jax.random.key(0), (2, 8, 16, 32))
    _, expected = jp.prune({"w": w}, 0.5, structure=structure)
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    sharding = jax.NamedSharding(mesh, jax.P(None, *spec))
    pruned, masks = jp.prune(
        {"w": jax.device_put(w, sharding)}, 0.5, structure=structure
    )
    np.testing.assert_array_equal(masks["w"], expected["w"])
    assert masks["w"].sharding == pruned["w"].sharding == sharding


@pytest.mark.parametrize("spec", [None, (None, "a", None), ("a", "b", None)])
@pytest.mark.parametrize(
    "structure",
    [jp.NM(2, 4, axis=(-3, -2)), jp.NM(2, 4, axis=-3), jp.Block(4, 8, axis=(-3, -2))],
    ids=["flattened", "plain", "blocks"],
)
@pytest.mark.parametrize("shape", [(0, 4, 8), (8, 4, 0), (8, 0, 8)])
def test_an_empty_leaf(shape, structure, spec):
    """It has no group, and goes through with the rest; also on an explicit mesh."""
    params = {"empty": jnp.zeros(shape), "w": jnp.ones((8, 4, 8))}
    _, expected = jp.prune(params, 0.5, structure=structure)
    if spec is not None:
        mesh = jax.make_mesh((2, 4), ("a", "b"))
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P(*spec)))
        assert params["w"].sharding.mesh.explicit_axes
    _, masks = jp.prune(params, 0.5, structure=structure)
    assert masks["empty"].shape == shape
    np.testing.assert_array_equal(masks["w"], expected["w"])
