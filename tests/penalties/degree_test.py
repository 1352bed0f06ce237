"""Tests of the l1 penalty weighted by missing links."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import penalties

pytestmark = pytest.mark.usefixtures("quick_compilation")

missing_links = jax.jit(penalties.missing_links, static_argnames="eps")
degree_weights = jax.jit(penalties.degree_weights, static_argnames=("eps", "reading"))
degree_l1 = jax.jit(penalties.degree_l1, static_argnames=("eps", "reading"))
prox_degree_l1 = jax.jit(penalties.prox_degree_l1)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def _kernel(seed=0, shape=(12, 5), dtype=jnp.float32, density=0.6):
    """Random weights, some exactly zero, and the first column without zeros."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) + np.sign(rng.normal(size=shape))
    links = rng.random(shape) < density
    links[..., 0] = True
    return jnp.asarray(values * links, dtype)


def _bits(x):
    return np.asarray(x).view(np.uint8)


def _dtype_id(dtype):
    return jnp.dtype(dtype).name


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
def test_missing_links_counts_along_the_column(dtype):
    kernel = jnp.array([[0.0, 1.0, -1.0], [0.0, 0.0, 2.0], [5e-5, 3.0, -4.0]], dtype)
    share = missing_links(kernel)
    assert share.dtype == jnp.float32
    np.testing.assert_allclose(share, [1, 1 / 3, 0], rtol=1e-7)


def test_missing_links_compares_strictly():
    kernel = jnp.array([[0.5], [0.25], [-0.5], [-0.25]])
    assert missing_links(kernel, eps=0.5) == 0.5


def test_missing_links_does_not_round_eps_to_the_dtype_of_the_kernel():
    weight = jnp.array([[1e-4]], jnp.bfloat16)  # 1.0014e-4, also for eps in bfloat16
    assert missing_links(weight, eps=1.003e-4) == 1


def test_missing_links_treats_nan_as_a_link():
    assert missing_links(jnp.array([[jnp.nan], [0.0]])) == 0.5


@pytest.mark.parametrize(
    ("reading", "wanted"),
    [("missing", [1, 0.75, 0]), ("inverse", [4, 4, 1]), ("uniform", [1, 1, 1])],
)
def test_weights_of_columns_with_none_one_and_all_links(reading, wanted):
    kernel = jnp.array([[0.0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 1, 1]])
    weights = degree_weights(kernel, reading=reading)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, np.asarray(wanted, np.float32))


@pytest.mark.parametrize("reading", ["missing", "inverse"])
def test_weights_rise_as_links_are_lost(reading):
    kernel = jnp.tril(jnp.ones((8, 8)))  # column i has 8 - i links
    weights = degree_weights(kernel, reading=reading)
    assert (jnp.diff(weights)[:-1] > 0).all()


@pytest.mark.parametrize("reading", ["missing", "inverse", "uniform"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
def test_penalty_equals_the_sum_over_the_rows_of_the_paper(reading, dtype):
    kernel = _kernel(dtype=dtype)
    l_in = np.asarray(kernel, np.float64).T  # the paper's layout: [units, fan_in]
    wanted = 0.0
    for row in l_in:
        d, n = row.size, int((np.abs(row) < 1e-4).sum())
        weight = {"missing": n / d, "inverse": d / max(d - n, 1), "uniform": 1}
        wanted += weight[reading] * np.abs(row).sum()
    penalty = degree_l1(kernel, reading=reading)
    assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(penalty, wanted, rtol=1e-6)  # float32 sums of 60


def test_penalty_accumulates_in_float32():
    kernel = jnp.ones((4096, 1), jnp.bfloat16)  # a bfloat16 sum would stop at 256
    assert degree_l1(kernel, reading="uniform") == 4096


def test_gradient_is_weight_times_sign():
    kernel = _kernel()
    gradient = jax.grad(degree_l1)(kernel)
    weights = degree_weights(kernel)
    np.testing.assert_allclose(gradient, weights * jnp.sign(kernel), rtol=1e-6)
    assert (weights[1:] > 0).all()


def test_no_gradient_through_missing_links_and_weights():
    kernel = _kernel()
    for f in (missing_links, degree_weights):
        gradient = jax.grad(lambda k, f=f: f(k).sum())(kernel)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
def test_prox_minimises_its_objective(dtype):
    kernel = _kernel(dtype=dtype, shape=(6, 4))
    weights = jnp.array([0.0, 0.3, 1.0, 4.0])
    shrunk = prox_degree_l1(kernel, 0.4, weights=weights)
    assert shrunk.dtype == dtype
    w, x = np.asarray(kernel, np.float64), np.asarray(shrunk, np.float64)
    cost = 0.4 * np.asarray(weights, np.float64)

    def objective(x):
        return (x - w) ** 2 / 2 + cost * np.abs(x)

    grid = np.linspace(-6, 6, 4801)[:, None, None]
    best = np.take_along_axis(grid, objective(grid).argmin(0)[None], 0)[0]
    # Half a step of the grid, and an ulp of a number below 4 in each dtype.
    np.testing.assert_allclose(x, best, atol=1.3e-3 + 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
def test_prox_gives_exact_positive_zeros(dtype):
    kernel = jnp.array([[-0.5, 0.5, -0.25, 0.0]], dtype).T
    shrunk = prox_degree_l1(kernel, 0.5, weights=jnp.ones(1))
    assert not _bits(shrunk).any()  # the sign bit too


@pytest.mark.parametrize("dtype", DTYPES, ids=_dtype_id)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_prox_of_strength_zero_is_the_identity_bit_for_bit(dtype, transform):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    specials = [0.0, -0.0, jnp.nan, -jnp.nan, jnp.inf, -jnp.inf, tiny, 1.0]
    kernel = jnp.stack([jnp.array(specials, dtype), _kernel(shape=(8,)).astype(dtype)])
    weights = jnp.full(8, 3.0)
    prox = transform(lambda k, s: penalties.prox_degree_l1(k, s, weights=weights))
    np.testing.assert_array_equal(_bits(prox(kernel, 0.0)), _bits(kernel))


def test_prox_leaves_columns_of_weight_zero_and_nan_alone():
    kernel = jnp.array([[1.0, jnp.nan], [-0.0, 1.0]])
    shrunk = prox_degree_l1(kernel, 0.5, weights=jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(_bits(shrunk[:, 0]), _bits(kernel[:, 0]))
    np.testing.assert_array_equal(shrunk[:, 1], [jnp.nan, 0.5])


def test_repeated_prox_makes_the_poor_poorer():
    rich, poor = jnp.full(8, 0.5), jnp.array([0.5] * 4 + [0.0] * 4)
    kernel = start = jnp.stack([rich, poor], axis=1)
    for _ in range(20):
        weights = degree_weights(kernel)
        kernel = prox_degree_l1(kernel, 0.1, weights=weights)
    np.testing.assert_array_equal(kernel[:, 0], start[:, 0])
    np.testing.assert_array_equal(kernel[:, 1], 0)


def test_stack_jit_and_vmap_equal_one_matrix_at_a_time():
    stack = _kernel(shape=(3, 12, 5))

    def everything(kernel):
        weights = penalties.degree_weights(kernel, reading="inverse")
        return (
            penalties.missing_links(kernel),
            penalties.degree_l1(kernel),
            penalties.prox_degree_l1(kernel, 0.2, weights=weights),
        )

    wanted = [np.stack(xs) for xs in zip(*map(everything, stack), strict=True)]
    for f in (everything, jax.jit(everything), jax.jit(jax.vmap(everything))):
        for got, want in zip(f(stack), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6)  # order of the sums


@pytest.mark.parametrize("spec", [jax.P("x", None), jax.P(None, "x")], ids=str)
def test_prox_keeps_the_sharding_of_the_kernel(spec):
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def f(kernel):
        weights = penalties.degree_weights(kernel)
        shrunk = penalties.prox_degree_l1(kernel, 0.1, weights=weights)
        return shrunk, penalties.degree_l1(kernel)

    with jax.sharding.use_abstract_mesh(mesh):
        kernel = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
        shrunk, penalty = jax.eval_shape(jax.jit(f), kernel)
    assert shrunk.sharding.spec == spec
    assert penalty.shape == ()


@pytest.mark.parametrize("f", [penalties.missing_links, penalties.degree_l1])
@pytest.mark.parametrize(
    ("kernel", "options", "error", "message"),
    [
        (jnp.ones(3), {}, ValueError, r"kernel has shape \(3,\).*two axes.*biases"),
        (jnp.ones((0, 3)), {}, ValueError, r"kernel has shape \(0, 3\).*one row"),
        (jnp.ones((2, 3), int), {}, TypeError, "kernel has dtype int32.*Cast"),
        (jnp.ones((2, 3)), {"eps": 0.0}, ValueError, "eps is 0.0.*above zero.*1e-4"),
        (jnp.ones((2, 3)), {"eps": np.nan}, ValueError, "eps is nan.*finite"),
    ],
    ids=["one-axis", "no-rows", "integers", "eps-zero", "eps-nan"],
)
def test_bad_kernel_or_eps_is_refused(f, kernel, options, error, message):
    with pytest.raises(error, match=message):
        f(kernel, **options)


@pytest.mark.parametrize("f", [penalties.degree_weights, penalties.degree_l1])
def test_unknown_reading_is_refused(f):
    with pytest.raises(ValueError, match="reading is 'rich'.*'missing', 'inverse'"):
        f(jnp.ones((2, 3)), reading="rich")


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (-1.0, "strength is -1.0.*>= 0.*Use 0"),
        (float("nan"), "strength is nan.*finite"),
        (float("inf"), "strength is inf.*finite"),
        (jnp.ones(3), r"strength has shape \(3,\).*scalar.*vmap"),
    ],
    ids=["negative", "nan", "infinite", "vector"],
)
def test_bad_strength_is_refused(strength, message):
    with pytest.raises(ValueError, match=message):
        penalties.prox_degree_l1(jnp.ones((2, 3)), strength, weights=jnp.ones(3))


@pytest.mark.parametrize("strength", [-1.0, np.nan], ids=["negative", "nan"])
def test_strength_in_an_array_out_of_range_shrinks_nothing(strength):
    kernel = _kernel()
    weights = jnp.ones(5)
    same = penalties.prox_degree_l1(kernel, jnp.array(strength), weights=weights)
    np.testing.assert_array_equal(same, kernel)


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"weights has shape \(2,\).*wanted \(3,\)"):
        penalties.prox_degree_l1(jnp.ones((2, 3)), 0.1, weights=jnp.ones(2))
