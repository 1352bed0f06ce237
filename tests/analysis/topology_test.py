"""Tests of the measures of which links a layer has left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import analysis, penalties

degrees = jax.jit(analysis.degrees, static_argnames=("axis", "eps"))
degree_deviation = jax.jit(analysis.degree_deviation, static_argnames=("axis", "eps"))
vanished = jax.jit(analysis.vanished, static_argnames="eps")
four_group_share = jax.jit(analysis.four_group_share, static_argnames=("axis", "eps"))


def _kernel(shape=(12, 7), seed=0, density=0.5):
    rng = np.random.default_rng(seed)
    links = rng.random(shape) < density
    return jnp.asarray((rng.normal(size=shape) + 3) * links, jnp.float32)


def _forms():
    kernel = _kernel()
    return {
        "float32": kernel,
        "bfloat16": kernel.astype(jnp.bfloat16),
        "int8": jnp.where(kernel != 0, -128, 0).astype(jnp.int8),
        "mask": kernel != 0,
    }


@pytest.mark.parametrize("form", _forms())
def test_weights_and_masks_measure_alike(form):
    kernel = _forms()[form]
    links = np.asarray(_kernel()) != 0
    found = degrees(kernel)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, links.sum(0))
    percent = 100 * links.mean(0)
    np.testing.assert_allclose(degree_deviation(kernel), percent.std(), rtol=1e-6)
    groups = links.reshape(3, 4, 7)
    wanted = ((~groups).sum(1) >= 2).mean()
    np.testing.assert_allclose(four_group_share(kernel), wanted, rtol=1e-6)
    np.testing.assert_array_equal(
        vanished(kernel), [(~links.any(1)).sum(), (~links.any(0)).sum()]
    )


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 6), -2),
        ((5, 6), -1),
        ((5, 6), 0),
        ((2, 5, 6), -2),
        ((3, 3, 4, 6), (0, 1, 2)),
        ((3, 3, 4, 6), (-4, -3, -2)),
    ],
    ids=str,
)
def test_axes_of_a_unit(shape, axis):
    kernel = _kernel(shape)
    links = np.asarray(kernel) != 0
    found = degrees(kernel, axis=axis)
    np.testing.assert_array_equal(found, links.sum(axis))
    wanted = 100 * links.mean(axis).std(-1)
    deviation = degree_deviation(kernel, axis=axis)
    np.testing.assert_allclose(deviation, wanted, rtol=1e-5)


def test_eps_is_a_strict_threshold_and_nan_a_link():
    kernel = jnp.array([[0.5], [-0.5], [0.25], [jnp.nan]])
    assert degrees(kernel, eps=0.25) == 3
    assert degrees(kernel, eps=0.5) == 1
    assert degrees(kernel) == 4


def test_degrees_complement_missing_links():
    kernel = _kernel() * jnp.array([1e-5, 1, 1, 1e-5, 1, 1, 1])
    share = 1 - degrees(kernel, eps=1e-4) / kernel.shape[0]
    np.testing.assert_allclose(share, penalties.missing_links(kernel), atol=1e-7)


def test_deviation_of_equal_and_of_polarised_degrees():
    assert degree_deviation(jnp.eye(8)) == 0
    half = jnp.arange(8) < 4
    deviation = degree_deviation(jnp.ones((6, 1), bool) & half)
    np.testing.assert_allclose(deviation, 50, rtol=1e-6)
    quarter = jnp.arange(8) < 2
    deviation = degree_deviation(jnp.ones((6, 1), bool) & quarter)
    np.testing.assert_allclose(deviation, 100 * np.sqrt(3 / 16), rtol=1e-6)


def test_vanished_tells_rows_from_columns():
    kernel = jnp.ones((4, 6)).at[1].set(0).at[:, 2:5].set(0)
    gone = vanished(kernel)
    assert (gone.rows, gone.columns) == (1, 3)
    assert gone.rows.dtype == gone.columns.dtype == jnp.int32
    stack = vanished(jnp.stack([kernel, jnp.ones((4, 6))]))
    np.testing.assert_array_equal(stack.rows, [1, 0])
    np.testing.assert_array_equal(stack.columns, [3, 0])
    assert vanished(kernel / 8, eps=0.125).columns == 6


@pytest.mark.parametrize(
    ("column", "share"),
    [
        ([1, 1, 0, 0, 1, 0, 1, 0], 1.0),
        ([1, 1, 1, 0, 0, 0, 0, 1], 0.5),
        ([1, 1, 1, 0, 0, 1, 1, 1], 0.0),
        ([1, 0, 1, 0, 0, 0, 0], 1.0),
        ([1, 1, 1, 0, 0, 0, 0], 0.0),
    ],
    ids=["2:4", "half", "shifted", "tail-ignored", "tail-does-not-help"],
)
def test_groups_of_four_along_one_column(column, share):
    mask = jnp.array(column, bool)
    assert four_group_share(mask[:, None]) == share
    assert four_group_share(mask[None], axis=-1) == share
    assert four_group_share(mask, axis=0) == share
    assert four_group_share(mask[None, :, None, None], axis=1) == share


def test_share_of_a_random_half_is_eleven_sixteenths():
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (4000, 40))
    # 40,000 groups: the standard deviation is 0.0023.
    assert abs(four_group_share(mask) - 11 / 16) < 0.01


@pytest.mark.parametrize(
    "f",
    [
        analysis.degrees,
        analysis.degree_deviation,
        analysis.vanished,
        jax.vmap(analysis.four_group_share),
    ],
    ids=["degrees", "deviation", "vanished", "four"],
)
def test_jit_and_vmap_equal_one_matrix_at_a_time(f):
    stack = _kernel((3, 12, 7))
    wanted = jax.tree.map(lambda *xs: jnp.stack(xs), *[f(k[None]) for k in stack])
    for g in (jax.jit(f), jax.jit(jax.vmap(lambda k: f(k[None])))):
        got = jax.tree.map(lambda x: x.reshape(-1), g(stack))
        flat = jax.tree.map(lambda x: x.reshape(-1), wanted)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, flat
        )


@pytest.mark.parametrize("spec", [jax.P("x", None), jax.P(None, "x")], ids=str)
def test_measures_on_an_explicit_mesh(spec):
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    with jax.sharding.use_abstract_mesh(mesh):
        kernel = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
        for f in (analysis.degree_deviation, lambda k: analysis.vanished(k).rows):
            assert jax.eval_shape(f, kernel).shape == ()
        along = 0 if spec[0] is None else 1  # the axis that is not sharded
        share = jax.eval_shape(
            lambda k: analysis.four_group_share(k, axis=along), kernel
        )
    assert share.shape == ()


@pytest.mark.parametrize(
    "f",
    [
        analysis.degrees,
        analysis.degree_deviation,
        analysis.vanished,
        analysis.four_group_share,
    ],
)
@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_bad_eps_is_refused(f, eps):
    with pytest.raises(ValueError, match=f"eps is {eps}.*>= 0.*Use 0"):
        f(jnp.ones((4, 4)), eps=eps)


@pytest.mark.parametrize(
    "f", [analysis.degrees, analysis.degree_deviation, analysis.four_group_share]
)
def test_axis_out_of_range_is_refused(f):
    with pytest.raises(ValueError, match=r"axis is -2.*\(4,\).*from -1 to 0"):
        f(jnp.ones(4))
    with pytest.raises(ValueError, match=r"axis is 2.*from -2 to 1"):
        f(jnp.ones((4, 4)), axis=2)


def test_axis_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"axis is \(0, -2\).*different"):
        analysis.degrees(jnp.ones((4, 4)), axis=(0, -2))


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3), (0, 1)), ((0, 3), 0), ((3, 0), 0)], ids=str
)
def test_deviation_of_no_units_is_refused(shape, axis):
    with pytest.raises(ValueError, match="wanted at least one unit"):
        analysis.degree_deviation(jnp.ones(shape), axis=axis)


def test_vanished_refuses_a_vector():
    with pytest.raises(ValueError, match=r"kernel has shape \(4,\).*Reshape"):
        analysis.vanished(jnp.ones(4))


def test_axis_without_a_group_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 8\).*four weights along axis 0"):
        analysis.four_group_share(jnp.ones((3, 8)))
