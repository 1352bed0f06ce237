"""CHTs: the link predictor against paths counted one by one, and sampled rewiring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(3)


def by_paths(mask):
    """CH2-L3n, path by path: u - v1 - u1 - v, judged by its inner nodes' links.

    The path runs over a common neighbour of u and u1, and of v1 and v. Each pair of the
    same side adds once, as in the authors' matrix form.
    """
    mask = np.asarray(mask, bool)
    inputs, outputs = mask.shape
    out = np.zeros(mask.shape)

    def pair(rows, i, j):
        common = int((rows[i] & rows[j]).sum())
        if not common:
            return 0.0
        outside = max(int(rows[j].sum()) - common, 1) - 1
        return (common + 1) / (outside + 1)

    for u in range(inputs):
        for v in range(outputs):
            if mask[u, v]:
                continue
            out[u, v] += sum(pair(mask, u, x) for x in range(inputs) if mask[x, v])
            out[u, v] += sum(pair(mask.T, v, y) for y in range(outputs) if mask[u, y])
    return out


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7])
def test_link_predictor(density):
    mask = jax.random.bernoulli(KEY, density, (12, 9))
    np.testing.assert_allclose(jp.training.ch2_l3n(mask), by_paths(mask), rtol=1e-6)


def test_link_predictor_does_not_care_which_side_is_which():
    mask = jax.random.bernoulli(KEY, 0.3, (3, 12, 9))
    np.testing.assert_allclose(
        jp.training.ch2_l3n(mask.mT), jp.training.ch2_l3n(mask).mT, rtol=1e-6
    )
    for i in range(3):
        np.testing.assert_allclose(
            jp.training.ch2_l3n(mask)[i], jp.training.ch2_l3n(mask[i]), rtol=1e-6
        )


def rewire(params, steps, **options):
    method = jp.chts(0.75, key=KEY, end=100, every=1, **options)
    tx = jp.masked(optax.sgd(0.0), method)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    history = []
    for _ in range(steps):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        history.append(
            (np.asarray(params["kernel"]), np.asarray(jp.get_masks(state)["kernel"]))
        )
    return history


def test_cold_removal_takes_the_smallest():
    params = {"kernel": jax.random.normal(KEY, (32, 16))}
    (w, first), (_, second), *_ = rewire(params, 2, temperature=(1e4, 1e4), drop=0.25)
    kept = 128
    removed = first & ~second
    # Whatever left was among the smallest quarter; some of that may have grown again.
    sizes = np.where(first, np.abs(w), np.inf)
    smallest = np.argsort(sizes.ravel())[: kept // 4]
    assert set(np.flatnonzero(removed)) <= set(smallest)
    assert removed.sum() > 0 and second.sum() == kept


def test_warm_removal_takes_others_too():
    params = {"kernel": jax.random.normal(KEY, (32, 16))}
    (w, first), (_, second), *_ = rewire(params, 2, temperature=(0.01, 0.01), drop=0.5)
    sizes = np.where(first, np.abs(w), np.inf)
    smallest = np.argsort(sizes.ravel())[:64]
    assert not set(np.flatnonzero(first & ~second)) <= set(smallest)


def test_growth_follows_the_predictor():
    """Over many draws, links with higher scores grow more often."""
    grown, scores = [], []
    for seed in range(3):
        params = {"kernel": jax.random.normal(jax.random.key(seed), (48, 32))}
        (_, first), (_, second), *_ = rewire(
            params, 2, temperature=(1e4, 1e4), drop=0.1
        )
        predicted = by_paths(first)
        grown.append(predicted[second & ~first].mean())
        scores.append(predicted[~first].mean())
    assert np.mean(grown) > 1.02 * np.mean(scores)


def test_growth_where_no_path_speaks():
    """Single links have no paths of three; still the count is exact."""
    params = {"kernel": jnp.eye(16) + 0.01}
    for _, mask in rewire(params, 3, drop=1.0):
        assert mask.sum() == 64


def test_chtss_prunes_by_relative_importance():
    params = {"kernel": jax.random.normal(KEY, (32, 16))}
    history = rewire(params, 102, initial=0.5, settle=50, drop=0.0)
    counts = [m.sum() for _, m in history]
    assert counts[0] == 256 and counts[50] == counts[101] == 128
    assert sorted(counts, reverse=True) == counts
    for (w, before), (_, after) in zip(history[20:40], history[21:41], strict=True):
        sizes = np.where(before, np.abs(w), 0)
        importance = sizes / (sizes.sum(1, keepdims=True) + 1e-5) + sizes / (
            sizes.sum(0, keepdims=True) + 1e-5
        )
        gone = before & ~after
        if gone.any():
            assert importance[gone].max() <= importance[after].min() * (1 + 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("removal", ["magnitude", "relative"])
def test_weights_of_two_bytes_are_rewired_as_in_float32(removal, dtype):
    """Scores of removal are float32, and what has not moved from 0 has one, too."""
    w = jax.random.normal(KEY, (32, 16)).astype(dtype).at[::3].set(0)
    options = {"removal": removal, "temperature": (9.0, 9.0)}
    half, whole = (
        rewire({"kernel": x}, 3, **options) for x in (w, w.astype(jnp.float32))
    )
    for (_, a), (_, b) in zip(half, whole, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_leave_their_neighbours_alone(bad):
    """Relative importance divides by sums over rows and columns."""
    w = jax.random.normal(KEY, (32, 16))
    spoilt = w.at[3].set(bad)
    options = {"initial": 0.5, "settle": 1, "drop": 0.0, "removal": "relative"}
    (_, _), (_, found), *_ = rewire({"kernel": spoilt}, 2, **options)
    (_, _), (_, wanted), *_ = rewire({"kernel": w.at[3].set(0)}, 2, **options)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"removal": "weight"}, "removal: got 'weight'"),
        ({"temperature": (0, 1)}, "temperature: got"),
        ({"temperature": 9.0}, "temperature: got 9.0"),
        ({"temperature": ("a", 9)}, "temperature: got"),
        ({"settle": 50}, "settle: got 50 without initial="),
        ({"initial": 0.5, "begin": 200}, "0 <= begin <= end"),
        ({"initial": 0.5, "settle": 200}, "settle: got 200"),
        ({"drop": 2}, "drop: got 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jp.chts(0.9, key=KEY, end=100, **options)


def test_vectors_are_refused():
    tx = jp.masked(optax.sgd(0.1), jp.chts(0.5, key=KEY, end=9), where="scale")
    with pytest.raises(
        ValueError, match=r"scale: got shape \(8,\); chts needs a matrix"
    ):
        tx.init({"scale": jnp.ones(8)})
