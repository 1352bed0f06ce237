"""Calibration as a whole: batches, merging, memory, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import calibration, checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")
ALL = ("square", "mean", "variance", "gram")
KEY = jax.random.key(0)


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"]


PARAMS = {
    "up": jax.random.normal(KEY, (4, 6)),
    "down": jax.random.normal(KEY, (6, 3)),
    "bias": jnp.ones(3),
}
BATCHES = [
    3 + jax.random.normal(jax.random.key(i), (5 + i % 2, 4)) * (1 + i) for i in range(4)
]


def close(a, b, tol=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b
    )


def by_hand(rows):
    rows = np.concatenate([np.asarray(r, np.float64) for r in rows])
    mean = rows.mean(0)
    return calibration.Inputs(
        np.array([[len(rows)]], np.float32),
        (rows**2).mean(0)[None, None],
        mean[None, None],
        ((rows - mean) ** 2).mean(0)[None, None],
        (rows.T @ rows / len(rows))[None, None],
    )


def test_all_batches_are_one_set_of_rows():
    stats = calibration.calibrate(model, PARAMS, BATCHES, statistics=ALL)
    (up,), (down,) = stats["up"], stats["down"]
    close(up.inputs, by_hand(BATCHES))
    close(down.inputs, by_hand([jnp.tanh(x @ PARAMS["up"]) for x in BATCHES]))
    assert stats.paths == ("up", "down")
    assert stats.untraced == {"bias": ("add with an activation",)}


def test_no_batches():
    with pytest.raises(
        ValueError, match="batches: there is none; expected an iterable"
    ):
        calibration.calibrate(model, PARAMS, iter(()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=str)
def test_activations_that_are_not_finite(bad):
    batches = [BATCHES[0], BATCHES[2].at[1, 2].set(bad), BATCHES[0]]
    with pytest.raises(ValueError, match="in batch 2, what up.* multiplied with"):
        calibration.calibrate(model, PARAMS, batches)


def test_it_comes_back_from_a_checkpoint_and_goes_on(tmp_path):
    whole = calibration.calibrate(model, PARAMS, BATCHES, statistics=ALL)
    half = calibration.calibrate(model, PARAMS, BATCHES[:2], statistics=ALL)
    checkpoint.save(tmp_path / "stats", half)
    like = calibration.init(model, PARAMS, BATCHES[0], statistics=ALL)
    back = checkpoint.restore(tmp_path / "stats", like=like)
    found = calibration.calibrate(
        model, PARAMS, BATCHES[2:], statistics=ALL, initial=back
    )
    close(found, whole)
    close(half, back)  # what was gone on from is still there


def test_a_function_is_traced_once_for_each_shape():
    traced = []

    def fn(params, x):
        traced.append(x.shape)
        return model(params, x)

    calibration.calibrate(fn, PARAMS, BATCHES * 3)
    assert traced == [(5, 4), (6, 4)]


@pytest.mark.parametrize("devices", ["any", "one", 1, 8], ids=str)
def test_steps_are_compiled_once_for_each_shape(devices, caplog):
    batches = [jnp.ones((8, 4)) * i for i in range(4)]
    if devices == "one":
        batches = jax.device_put(batches, jax.devices()[1])
    elif devices != "any":
        mesh = jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,))
        sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
        batches = jax.device_put(batches, sharding)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        stats = calibration.calibrate(model, PARAMS, batches)
    close(stats["up"][0].inputs.square, jnp.full((1, 1, 4), (0 + 1 + 4 + 9) / 4))
    compiled = [r for r in caplog.messages if r.startswith("Compiling jit(_step)")]
    assert len(compiled) == 1


def test_batches_are_tuples_or_single_arguments():
    def fn(params, x, scale):
        return (x["x"] * scale) @ params["up"]

    batches = [({"x": BATCHES[0]}, 2.0), ({"x": BATCHES[0]}, 3.0)]
    stats = calibration.calibrate(fn, PARAMS, batches)
    square = jnp.mean(BATCHES[0] ** 2, 0) * (4 + 9) / 2
    close(stats["up"][0].inputs.square[0, 0], square)
    tree = calibration.calibrate(
        lambda p, b: b["x"] @ p["up"], PARAMS, [{"x": BATCHES[0]}]
    )
    close(tree["up"][0].inputs.square[0, 0], jnp.mean(BATCHES[0] ** 2, 0))


def test_merging_is_associative_and_commutative():
    a, b, c = (
        calibration.calibrate(model, PARAMS, [x], statistics=ALL) for x in BATCHES[:3]
    )
    merge = jax.jit(calibration.merge)
    whole = calibration.calibrate(model, PARAMS, BATCHES[:3], statistics=ALL)
    close(merge(merge(a, b), c), whole)
    close(merge(a, merge(b, c)), whole)
    close(merge(c, merge(b, a)), whole)
    none = calibration.init(model, PARAMS, BATCHES[0], statistics=ALL)
    close(merge(none, a), a)
    close(merge(a, none), a)
    close(merge(none, none), none)


def test_variance_does_not_cancel():
    far = [jnp.float32(1000) + x for x in BATCHES]
    stats = calibration.calibrate(
        lambda p, x: x @ p["up"], PARAMS, far, statistics=("variance",)
    )
    inputs = stats["up"][0].inputs
    wanted = np.concatenate([np.asarray(x, np.float64) for x in far]).var(0)
    np.testing.assert_allclose(inputs.variance[0, 0], wanted, rtol=1e-4)
    assert inputs.mean is not None  # without it, variances cannot be merged


def test_statistics_that_cannot_be_merged():
    a = calibration.init(model, PARAMS, BATCHES[0])
    grams = calibration.init(model, PARAMS, BATCHES[0], statistics=("gram",))
    with pytest.raises(
        ValueError, match="b: it holds gram, and .* square. Pass the same"
    ):
        calibration.merge(a, grams)
    other = calibration.init(lambda p, x: x @ p["up"], PARAMS, BATCHES[0])
    with pytest.raises(ValueError, match="b: its sites are others .* first at down"):
        calibration.merge(a, other)
    with pytest.raises(ValueError, match="initial: its sites are others"):
        calibration.calibrate(model, PARAMS, BATCHES, initial=other)


def test_batches_that_use_parameters_differently():
    def fn(params, x):
        return x @ params["up"] if len(x) > 5 else model(params, x)

    with pytest.raises(ValueError, match="batches: its sites are others"):
        calibration.calibrate(fn, PARAMS, BATCHES)


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        ("gram", TypeError, r"statistics: got the string 'gram'.*Pass \('gram',\)"),
        (
            ("norm",),
            ValueError,
            r"statistics: got \('norm',\); expected .* square, mean",
        ),
        ((), ValueError, "statistics: got"),
    ],
    ids=["string", "unknown", "none"],
)
def test_statistics_that_do_not_exist(statistics, error, message):
    with pytest.raises(error, match=message):
        calibration.calibrate(model, PARAMS, BATCHES, statistics=statistics)


def test_batch_axes_that_do_not_fit():
    with pytest.raises(
        ValueError, match="batch_axes: the pattern 'dwn' matches no leaf"
    ):
        calibration.plan(model, PARAMS, BATCHES[0], batch_axes={"dwn": 0})
    with pytest.raises(
        ValueError, match=r"batch_axes: down has the shape .* no axis 2"
    ):
        calibration.plan(model, PARAMS, BATCHES[0], batch_axes={"down": 2})


def test_empty_rows_that_match_nothing():
    with pytest.raises(
        ValueError, match="empty_rows: the pattern 'exp' matches no leaf"
    ):
        calibration.calibrate(model, PARAMS, BATCHES, empty_rows="exp")


def test_weights_of_tokens():
    x = jnp.stack(BATCHES[:4:2])  # [2, 5, 4]
    weights = jnp.arange(10.0).reshape(2, 5) % 3

    def fn(params, x, weights):
        return model(params, x)

    stats = calibration.calibrate(
        fn, PARAMS, [(x, weights)], statistics=ALL,
        token_weights=lambda x, weights: weights,
    )  # fmt: skip
    rows, w = x.reshape(10, 4), weights.reshape(10)
    # A weight of 2 counts a row twice.
    repeated = np.repeat(np.asarray(rows), np.asarray(w, int), axis=0)
    close(stats["up"][0].inputs, by_hand([repeated]))
    flat = calibration.calibrate(
        lambda p, x: model(p, x.reshape(10, 4)), PARAMS, [x], statistics=ALL,
        token_weights=lambda x: weights,
    )  # fmt: skip
    close(flat["down"][0].inputs, stats["down"][0].inputs)


def test_tokens_without_weight_may_be_anything():
    padded = jnp.concatenate([BATCHES[0], jnp.full((3, 4), jnp.nan)])
    stats = calibration.calibrate(
        model, PARAMS, [padded], statistics=ALL,
        token_weights=lambda x: ~jnp.isnan(x[:, 0]),
    )  # fmt: skip
    close(stats["up"][0].inputs, by_hand(BATCHES[:1]))


def test_weights_that_fit_no_rows():
    with pytest.raises(
        ValueError, match=r"token_weights: .* \(3,\), and the rows that up .* \(5,\)"
    ):
        calibration.calibrate(
            model, PARAMS, BATCHES, token_weights=lambda x: jnp.ones(3)
        )
    ragged = {"w": jnp.ones((2, 4, 4))}
    with pytest.raises(ValueError, match="token_weights: the rows of w are sorted"):
        calibration.calibrate(
            lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 3])), ragged,
            BATCHES, token_weights=lambda x: jnp.ones(len(x)),
        )  # fmt: skip


def test_plan_says_what_is_held():
    plan = calibration.plan(model, PARAMS, BATCHES[0], statistics=("gram", "square"))
    assert plan.nbytes == {"up": 4 * (1 + 4 + 16), "down": 4 * (1 + 6 + 36)}
    stats = calibration.init(model, PARAMS, BATCHES[0], statistics=("gram", "square"))
    assert plan.total == sum(x.nbytes for x in jax.tree.leaves(stats))
    twice = calibration.plan(
        lambda p, x: (x @ p["a"], x @ p["b"]),
        {n: jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16) for n in "ab"},
        jax.ShapeDtypeStruct((7, 4096), jnp.bfloat16),
        statistics=("gram",),
    )
    assert twice.total == twice.nbytes["a"] == 4 * (1 + 4096**2)


def test_where_chooses_leaves():
    stats = calibration.calibrate(model, PARAMS, BATCHES, where="down")
    assert stats.paths == ("down",) and len(stats.inputs) == 1
    assert stats.untraced == {}
    assert "down" in stats and "up" not in stats


def test_statistics_are_shared_between_all_readers_of_an_activation():
    def norm(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * scale

    params = {n: jax.random.normal(KEY, (4, 4)) for n in "qkvo"} | {"s": jnp.ones(4)}

    def fn(p, x):
        # Each normalises, and casts, on its own.
        q, k, v = (
            norm(x, p["s"]).astype(jnp.bfloat16) @ p[n].astype(jnp.bfloat16)
            for n in "qkv"
        )
        return (q * k + v) @ p["o"].astype(jnp.bfloat16)

    stats = calibration.calibrate(fn, params, BATCHES[:1], statistics=("gram",))
    assert len(stats.inputs) == 2
    assert len({stats[n][0].site.activation for n in "qkv"}) == 1


@pytest.mark.parametrize("k", [1024, 1100, 5000])
def test_large_gram_matrices_are_made_of_strips(k):
    x = np.random.default_rng(0).normal(size=(24, k)).astype(np.float32)
    weights = np.arange(24) % 3
    stats = calibration.calibrate(
        lambda p, x: x @ p["w"], {"w": jnp.zeros((k, 2))}, [jnp.asarray(x)],
        statistics=("gram",), token_weights=lambda x: jnp.asarray(weights),
    )  # fmt: skip
    gram = np.asarray(stats["w"][0].inputs.gram[0, 0])
    wide = x.astype(np.float64)
    wanted = (wide * weights[:, None]).T @ wide / weights.sum()
    np.testing.assert_allclose(gram, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(gram, gram.T)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_gram_matrices_move_only_sums_and_the_inputs_of_their_columns(kind):
    k, kind = 1024, jax.sharding.AxisType[kind]
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind))
    x = jax.random.normal(jax.random.key(0), (16, k))
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "model")))
    w = jax.device_put(jnp.zeros((k, 2)), jax.NamedSharding(mesh, jax.P("model")))

    def fn(p, x):
        out = (
            {"out_sharding": jax.NamedSharding(mesh, jax.P("data"))}
            if mesh.explicit_axes
            else {}
        )
        return jnp.einsum("mk,kn->mn", x, p["w"], **out)

    steps = {}
    stats = calibration._calibrate.collect(
        fn, {"w": w}, [placed], steps, statistics=("gram",)
    )
    np.testing.assert_allclose(stats["w"][0].inputs.gram[0, 0], x.T @ x / 16, atol=1e-4)
    (step,) = steps.values()
    program = step.step.lower(stats, step.closed.consts, [w, placed], (placed,))
    moved = re.findall(
        r"(all-to-all|collective-permute)\(", program.compile().as_text()
    )
    assert not moved
