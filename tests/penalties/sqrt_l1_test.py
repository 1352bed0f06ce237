"""Tests of the square root of each row's l1 norm and of its proximal operator."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxprune import penalties

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROX = jax.jit(penalties.prox_sqrt_l1)
SQRT_L1 = jax.jit(penalties.sqrt_l1, static_argnames="delta")


def _objective(x, a, strength):
    """Per row, in float64."""
    x, a = np.asarray(x, np.float64), np.asarray(a, np.float64)
    distance = ((x - a) ** 2).sum(-1) / 2
    return distance + strength * np.sqrt(np.abs(x).sum(-1))


def _soft(a, t):
    return np.sign(a) * np.maximum(np.abs(a) - t, 0)


def _exact(a, strength):
    """The minimum of every row, by sorting: all local minima are looked at.

    `strength` is a number, or one for each row.

    With the m largest entries kept, u = sqrt(S) solves u^3 - l u + m s / 2 = 0, where l
    is their l1 norm; its largest root is the one where the objective has a minimum.
    """
    a = np.asarray(a, np.float64)
    each = np.expand_dims(strength, -1)
    sizes = -np.sort(-np.abs(a), axis=-1)
    m = np.arange(1, a.shape[-1] + 1)
    l1 = np.cumsum(sizes, axis=-1)
    with np.errstate(all="ignore"):
        cosine = -m * each / 4 * np.sqrt(27 / l1**3)
        root = 2 * np.sqrt(l1 / 3) * np.cos(np.arccos(cosine) / 3)
        t = each / (2 * root)
    below = np.concatenate([sizes[..., 1:], np.zeros_like(sizes[..., :1])], axis=-1)
    # Some slack: an entry that equals t is kept at 0 or not kept, which is the same.
    valid = (t <= sizes * (1 + 1e-12)) & (t >= below * (1 - 1e-12))
    best = np.zeros_like(a)
    for k in range(a.shape[-1]):
        x = np.where(valid[..., k, None], _soft(a, t[..., k, None]), 0)
        better = _objective(x, a, strength) < _objective(best, a, strength)
        best = np.where(better[..., None], x, best)
    return best


def _check(a, strength, x):
    """Objective and entries of `x` against the exact minimum, each within 1e-6.

    Float32 rounds each entry of `x` and a sum over a row to some 1e-7, and the
    objective near its minimum only to second order. Where two minima are equally good
    to 1e-6 either may be taken, so entries are compared only where there is no tie.
    """
    exact = _exact(a, strength)
    wanted, got = _objective(exact, a, strength), _objective(x, a, strength)
    np.testing.assert_array_less(got, wanted * (1 + 1e-6) + 1e-30)
    peak = np.abs(np.asarray(a, np.float64)).max(-1, keepdims=True)
    far = (np.abs(x - exact) > 1e-6 * peak).any(-1)
    tie = np.abs(got - wanted) <= 1e-6 * wanted
    assert not (far & ~tie).any()
    # Ties are an exception, and cannot hide a wrong threshold.
    assert far.mean() <= 0.02


def _rows(kind, rows, n, seed=0):
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(rows, n))
    a = {
        "normal": normal,
        "cauchy": rng.standard_cauchy(size=(rows, n)),
        "lognormal": normal * np.exp(2 * rng.normal(size=(rows, n))),
        "outliers": np.where(rng.random((rows, n)) < 2 / n, 10, 0.05) * np.sign(normal),
        "equal": np.sign(normal) * np.exp(rng.normal(size=(rows, 1))),
        "layers": np.sign(normal) * 10.0 ** -rng.integers(0, 4, size=(rows, n)),
    }[kind]
    return a.astype(np.float32)


def test_penalty_by_hand():
    parts = [jnp.array([[3.0], [0.0]]), jnp.array([[-6.0, 0.0], [4.0, -12.0]])]
    np.testing.assert_allclose(SQRT_L1(parts), 3 + 4, rtol=1e-6)


def test_penalty_of_parts_is_that_of_the_concatenation():
    a = jnp.asarray(_rows("normal", 5, 12))
    parts = jnp.split(a, [3, 4], axis=1)
    np.testing.assert_allclose(SQRT_L1(parts), SQRT_L1([a]), rtol=1e-6)
    numpy = np.sqrt(np.abs(np.asarray(a, np.float64)).sum(1)).sum()
    np.testing.assert_allclose(SQRT_L1([a]), numpy, rtol=1e-6)


def test_penalty_of_a_row_of_zeros_is_the_root_of_delta():
    zeros = [jnp.zeros((2, 3))]
    assert SQRT_L1(zeros, delta=0.25) == 1
    gradient = jax.grad(SQRT_L1)(zeros)
    np.testing.assert_array_equal(gradient[0], 0)


def test_gradient_of_the_penalty():
    a = jnp.asarray(_rows("normal", 4, 9))
    (gradient,) = jax.grad(lambda p: SQRT_L1(p, delta=0.5))([a])
    l1 = np.abs(a).sum(1, keepdims=True)
    np.testing.assert_allclose(gradient, np.sign(a) / 2 / np.sqrt(l1 + 0.5), rtol=1e-6)


def test_penalty_accumulates_in_float32():
    a = jnp.ones((1, 4096), jnp.bfloat16)  # a bfloat16 sum would stop at 256
    penalty = SQRT_L1([a])
    assert penalty.dtype == jnp.float32
    np.testing.assert_allclose(penalty, 64, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.01, 0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_prox_beats_a_dense_grid(n, strength):
    a = np.random.default_rng(n).normal(size=(20, n)).astype(np.float32) * 2
    a[0] = np.abs(a[0])
    (x,) = PROX([jnp.asarray(a)], strength)
    # In units of a, from 0 to a: the minimum lies in this box.
    steps = np.linspace(0, 1, {1: 10001, 2: 201, 3: 41}[n])
    grid = np.array(list(itertools.product(steps, repeat=n)))  # [points, n]
    for row, found in zip(a, np.asarray(x), strict=True):
        best = _objective(grid * row, row, strength).min()
        assert _objective(found, row, strength) <= best * (1 + 1e-6)


@pytest.mark.parametrize(
    "kind", ["normal", "cauchy", "lognormal", "outliers", "equal", "layers"]
)
@pytest.mark.parametrize(("rows", "n"), [(200, 1), (200, 7), (60, 300)])
def test_prox_equals_the_exact_minimum(kind, rows, n):
    a = _rows(kind, rows, n)
    scale = np.median(np.abs(a).max(-1)) * np.sqrt(np.median(np.abs(a).sum(-1)))
    sparsity = []
    for factor in [1e-7, 1e-4, 1e-2, 0.1, 0.3, 0.6, 1.0, 3.0]:
        strength = float(np.float32(factor * scale))
        (x,) = PROX([jnp.asarray(a)], strength)
        _check(a, strength, np.asarray(x))
        sparsity.append((np.asarray(x) == 0).mean())
    assert sparsity[0] < 0.5 < sparsity[-1]  # the factors cover both ends


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
    hnp.arrays(
        np.float32,
        (8, 6),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False).map(
            lambda v: v if abs(v) > 1e-6 else 0.0
        ),
    ),
    st.floats(2.0**-20, 2.0**10, width=32),
)
def test_prox_is_never_beaten(a, strength):
    (x,) = PROX([jnp.asarray(a)], strength)
    wanted = _objective(_exact(a, strength), a, strength)
    got = _objective(x, a, strength)
    assert (got <= wanted * (1 + 1e-6) + 1e-30).all()
    assert (np.abs(x) <= np.abs(a)).all()
    assert (np.asarray(x) * a >= 0).all()


def _largest_root(a, strength):
    """Only the stationary point with the largest l1 norm, or 0."""
    total = np.abs(a).sum(-1, keepdims=True)
    for _ in range(2000):
        t = strength / 2 / np.sqrt(np.maximum(total, 1e-300))
        total = np.maximum(np.abs(a) - t, 0).sum(-1, keepdims=True)
    x = _soft(a, t)
    better = _objective(x, a, strength) < _objective(0 * a, a, strength)
    return np.where(better[:, None], x, 0)


def test_prox_finds_the_better_of_two_minima():
    # One large and many small entries: around strength 1.29 the minimum that keeps all
    # of them and the one that keeps only the large are equally good.
    row = np.concatenate([[10.0], np.full(1000, 0.1)]).astype(np.float32)[None]
    strengths = np.linspace(0.5, 2.0, 31)
    kept, loss = [], []
    for strength in strengths:
        (x,) = PROX([jnp.asarray(row)], strength)
        exact = _exact(row, strength)
        best = _objective(exact, row, strength)
        np.testing.assert_array_less(
            _objective(x, row, strength), best * (1 + 1e-6) + 1e-30
        )
        kept.append(int((np.asarray(x) != 0).sum()))
        loss.append(_objective(_largest_root(row, strength), row, strength) / best - 1)
    assert set(kept) == {1, 1001}
    # And the shorter way would not do.
    assert max(loss)[0] > 0.01


def _near_ties(count, width):
    """Rows of one large and many small entries, with strengths near that of a tie.

    With m entries of l1 norm l kept, the minimum is at u = sqrt(S), the largest root of
    u^3 - l u + m s / 2 = 0. Zeros fill the rows up; they change nothing.
    """

    def value(strength, m, l1, rest):
        root = 2 * np.sqrt(l1 / 3)
        with np.errstate(invalid="ignore"):
            root *= np.cos(np.arccos(-m * strength / 4 * np.sqrt(27 / l1**3)) / 3)
        t = strength / (2 * root)
        return (m * t**2 + rest) / 2 + strength * root, t

    rng = np.random.default_rng(0)
    rows, strengths = [], []
    while len(rows) < count:
        n = int(10 ** rng.uniform(0.5, np.log10(width - 1)))
        large, small = 10 ** rng.uniform(0, 1.5), 10 ** rng.uniform(-2.5, -0.3)
        tries = np.geomspace(1e-3, 1e2, 2000)
        both, low = value(tries, n + 1, large + n * small, 0)
        one, high = value(tries, 1, large, n * small**2)
        valid = (low < small) & (high > small)
        cross = np.nonzero(valid[1:] & valid[:-1] & (np.diff(both < one) != 0))[0]
        if cross.size:
            row = np.zeros(width)
            row[: n + 1] = [large] + n * [small]
            rows.append(row)
            strengths.append(tries[cross[0]])
    return np.array(rows, np.float32), np.array(strengths)


def test_prox_takes_the_better_of_nearly_equal_minima():
    a, ties = _near_ties(80, 400)
    prox = jax.jit(jax.vmap(lambda a, s: penalties.prox_sqrt_l1([a[None]], s)[0][0]))
    kept = []
    for factor in [0.9, 0.97, 0.997, 1.0, 1.003, 1.03, 1.1]:
        strength = (ties * factor).astype(np.float32).astype(np.float64)
        x = prox(jnp.asarray(a), jnp.asarray(strength, jnp.float32))
        best = _objective(_exact(a, strength), a, strength)
        # So near a tie either minimum will do.
        slack = 1e-3 if abs(factor - 1) < 0.01 else 1e-6
        np.testing.assert_array_less(_objective(x, a, strength), best * (1 + slack))
        kept.append((np.asarray(x) != 0).sum(1))
    assert ((kept[0] > 1) & (kept[-1] <= 1)).mean() > 0.9  # they are near ties


def test_prox_takes_the_exact_step_of_a_weak_penalty():
    # t = 4e-7 / 2 / sqrt(1): far below what rounding leaves of the objective.
    a = jnp.array([[1.0, 3e-7, 1e-7]])
    (x,) = PROX([a], 4e-7)
    np.testing.assert_allclose(x[0, 1:], [1e-7, 0], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_prox_scales_with_the_weights(scale):
    a = _rows("lognormal", 20, 30)
    (x,) = PROX([jnp.asarray(a)], 1.0)
    (y,) = PROX([jnp.asarray(a * np.float32(scale))], scale**1.5)
    atol = 1e-5 * np.abs(a).max()  # 1e-7 of `scale` itself moves t
    np.testing.assert_allclose(np.asarray(y) / scale, x, atol=atol)


def test_prox_sums_over_all_parts():
    a = _rows("normal", 6, 12)
    (whole,) = PROX([jnp.asarray(a)], 1.0)
    parts = jnp.split(jnp.asarray(a), [3, 4], axis=1)
    found = PROX(parts, 1.0)
    assert isinstance(found, tuple)
    assert [part.shape for part in found] == [(6, 3), (6, 1), (6, 8)]
    joined = np.concatenate(found, axis=1)
    np.testing.assert_allclose(joined, whole, atol=1e-6)  # order of the sums
    (alone,) = PROX(parts[2:], 1.0)
    assert np.abs(alone - whole[:, 4:]).max() > 0.1


def test_prox_gives_exact_zeros_for_whole_rows_and_for_entries():
    a = jnp.array([[0.5, -0.25], [5.0, -0.5]])
    (x,) = PROX([a], 4.0)
    assert not np.asarray(x[0]).view(np.uint32).any()  # the sign bit too
    assert not np.asarray(x[1, 1]).view(np.uint32).any()
    np.testing.assert_allclose(x[1, 0], 4, rtol=1e-6)  # t = 4 / (2 sqrt(4)) = 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_prox_of_strength_zero_is_the_identity_bit_for_bit(dtype, transform):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    rows = [[1.0, -2.0, -0.0], [jnp.nan, 1.0, tiny], [0.0, -0.0, jnp.inf]]
    a = jnp.array(rows, dtype)
    (x,) = transform(penalties.prox_sqrt_l1)([a], 0.0)
    assert x.dtype == dtype
    np.testing.assert_array_equal(*(np.asarray(y).view(np.uint8) for y in (x, a)))


def test_rows_without_a_minimum_come_back_and_do_not_touch_the_others():
    rows = [[jnp.nan, 1.0], [2.0, jnp.inf], [0.0, -0.0], [5.0, -0.5]]
    first, second = jnp.array(rows)[:, :1], jnp.array(rows)[:, 1:]
    x, y = PROX([first, second], 4.0)
    np.testing.assert_array_equal(x[:3], first[:3])
    np.testing.assert_array_equal(y[:3], second[:3])
    np.testing.assert_allclose([x[3, 0], y[3, 0]], [4, 0], rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 1e-30, 0.5, 1e30])
def test_prox_computes_no_nan_from_finite_rows(strength):
    a = jnp.array([[0.0, 0.0], [1.0, 0.0], [1e-9, 1e9]])
    with jax.debug_nans(True):
        (x,) = penalties.prox_sqrt_l1([a], strength)
    assert np.isfinite(x).all()


@pytest.mark.parametrize(
    ("dtype", "ulp"),
    [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)],
    ids=["bf16", "f16"],
)
def test_half_precision_differs_by_its_rounding_only(dtype, ulp):
    a = jnp.asarray(_rows("normal", 20, 50), dtype)
    (half,) = PROX([a], 2.0)
    (single,) = PROX([a.astype(jnp.float32)], 2.0)
    assert half.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(half, np.float32), single, rtol=ulp, atol=1e-7
    )


def test_parts_may_have_unlike_dtypes():
    a = jnp.asarray(_rows("normal", 4, 3))
    x, y = PROX([a, a.astype(jnp.bfloat16)], 0.1)
    assert (x.dtype, y.dtype) == (jnp.float32, jnp.bfloat16)


def test_stack_and_vmap_equal_one_matrix_at_a_time():
    stack = jnp.asarray(_rows("lognormal", 12, 9)).reshape(3, 4, 9)
    strengths = jnp.array([0.1, 1.0, 4.0])
    wanted = [PROX([a], 1.0)[0] for a in stack]
    np.testing.assert_allclose(PROX([stack], 1.0)[0], jnp.stack(wanted), rtol=1e-5)
    wanted = [PROX([a], s)[0] for a, s in zip(stack, strengths, strict=True)]
    mapped = jax.vmap(lambda a, s: PROX([a], s)[0])(stack, strengths)
    np.testing.assert_allclose(mapped, jnp.stack(wanted), rtol=1e-5)
    assert penalties.sqrt_l1([stack]).shape == (3,)


@pytest.mark.parametrize("spec", [jax.P("x", None), jax.P(None, "x")], ids=str)
def test_prox_keeps_the_sharding_of_the_parts(spec):
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, spec)
    with jax.sharding.use_abstract_mesh(mesh):
        part = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
        shrunk = jax.eval_shape(PROX, [part, part], jax.ShapeDtypeStruct((), "float32"))
    assert [x.sharding.spec for x in shrunk] == [spec, spec]


@pytest.mark.parametrize(
    "f",
    [penalties.sqrt_l1, lambda p: penalties.prox_sqrt_l1(p, 1.0)],
    ids=["l1", "prox"],
)
@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (
            jnp.ones((2, 3)),
            TypeError,
            r"parts is one array of shape \(2, 3\).*\[kernel\]",
        ),
        ([], ValueError, "parts is empty.*query, key, value"),
        ([jnp.ones(3)], ValueError, r"parts\[0\] has shape \(3,\).*two axes"),
        (
            [jnp.ones((2, 3)), jnp.ones((3, 3))],
            ValueError,
            r"parts\[1\] has shape \(3, 3\) beside parts\[0\].*\(2, 3\).*Reshape",
        ),
        ([jnp.ones((2, 3), int)], TypeError, r"parts\[0\] has dtype int32.*Cast"),
    ],
    ids=["bare-array", "empty", "one-axis", "unlike-rows", "integers"],
)
def test_bad_parts_are_refused(f, parts, error, message):
    with pytest.raises(error, match=message):
        f(parts)


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_bad_strength_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength is {strength}.*Use 0"):
        penalties.prox_sqrt_l1([jnp.ones((2, 3))], strength)


@pytest.mark.parametrize("delta", [0.0, -1.0, float("nan")])
def test_bad_delta_is_refused(delta):
    with pytest.raises(ValueError, match=f"delta is {delta}.*above zero.*1e-8"):
        penalties.sqrt_l1([jnp.ones((2, 3))], delta=delta)
