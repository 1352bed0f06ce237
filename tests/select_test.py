"""Exact selection against a stable sort in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import _select, _wide

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Subnormal numbers are left out: XLA's CPU backend takes them for 0.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, math.nan]
FLOATS = st.one_of(
    st.sampled_from(SPECIAL), st.floats(-8, 8, width=16, allow_subnormal=False)
)


def _oracle(leaves: list[np.ndarray], k: int) -> list[np.ndarray]:
    """Keeps the first `k` after a stable sort, falling, NaN last."""
    flat = np.concatenate([np.ravel(x).astype(np.float64) for x in leaves])
    is_nan = np.isnan(flat)
    order = np.lexsort((np.where(is_nan, 0, -flat), is_nan))
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = np.split(mask, ends)
    return [m.reshape(x.shape) for m, x in zip(parts, leaves, strict=True)]


@functools.partial(jax.jit, static_argnums=2)
def _masks(leaves, kept, groups):
    cuts = _select.cuts([_select.scored(lambda x: x, x) for x in leaves], kept, groups)
    return [_select.keep(x, cut) for x, cut in zip(leaves, cuts, strict=True)]


def _check(leaves, kept: list[int], groups: tuple[int, ...]) -> None:
    found = _masks(leaves, [_wide.from_int(k) for k in kept], groups)
    found = [np.asarray(m) for m in found]
    values = [
        np.asarray(x.astype(jnp.float32) if x.itemsize < 4 else x) for x in leaves
    ]
    for group, k in enumerate(kept):
        members = [i for i, g in enumerate(groups) if g == group]
        expected = _oracle([values[i] for i in members], k)
        assert sum(found[i].sum() for i in members) == k
        for i, mask in zip(members, expected, strict=True):
            np.testing.assert_array_equal(found[i], mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
def test_one_small_leaf(shape, dtype):
    @given(hnp.arrays(np.float32, shape, elements=FLOATS), st.data())
    def check(values, data):
        k = data.draw(st.integers(0, values.size))
        _check([jnp.asarray(values, dtype)], [k], (0,))

    check()


@given(st.data())
@pytest.mark.parametrize(
    "dtypes",
    [("float32",) * 4, ("bfloat16",) * 4, ("bfloat16", "float32", "float16") * 2],
)
def test_groups_of_leaves(dtypes, data):
    shapes, groups = [(3, 4), (5,), (), (2, 2, 3)], (0, 1, 0, 0)
    leaves = [
        jnp.asarray(data.draw(hnp.arrays(np.float32, s, elements=FLOATS)), dtype)
        for s, dtype in zip(shapes, dtypes, strict=False)
    ]
    kept = [data.draw(st.integers(0, 25)), data.draw(st.integers(0, 5))]
    _check(leaves, kept, groups)


def test_float64():
    with jax.enable_x64(True):

        @settings(max_examples=20)
        @given(hnp.arrays(np.float64, (4, 6), elements=FLOATS), st.integers(0, 24))
        def check(values, k):
            _check([jnp.asarray(values)], [k], (0,))
            # Neighbours that float32 cannot tell apart.
            _check([jnp.asarray(1 + np.arange(24).reshape(4, 6) * 2.0**-50)], [k], (0,))

        check()


def _draw(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    if kind == "ties":
        x = np.round(x * 2) / 2
    elif kind == "zeros":
        x = np.where(rng.random(shape) < 0.9, np.float32(0), x)
    elif kind == "equal":
        x = np.full(shape, 0.25, np.float32)
    elif kind == "nan":
        x = np.where(rng.random(shape) < 0.3, np.float32(np.nan), x)
    elif kind == "infinite":
        x = np.where(rng.random(shape) < 0.2, np.float32(np.inf), x)
        x = np.where(rng.random(shape) < 0.2, -np.float32(np.inf), x)
    elif kind == "few":
        x = np.where(rng.random(shape) < 1e-4, x * 1e4, x * 1e-8)
    elif kind == "sorted":  # the sample sees other rows than the bulk
        x = np.sort(x, axis=None).reshape(shape)
    return x


KINDS = ["normal", "ties", "zeros", "equal", "nan", "infinite", "few", "sorted"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((256, 1024), "float32"),
        ((256, 1024), "bfloat16"),
        ((1 << 17,), "float32"),  # folds along its only axis
        ((3, 64, 577), "float32"),  # folds along the middle axis, odd rows
        ((5, 7, 1001), "float32"),  # cannot be folded
    ],
    ids=str,
)
def test_large_leaf(shape, dtype, kind):
    x = jnp.asarray(_draw(kind, shape), dtype)
    for k in (0, 1, x.size // 10, x.size // 2 + 1, x.size - 1, x.size):
        _check([x], [k], (0,))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_large_and_small_leaves(kind):
    shapes = [(256, 1024), (8,), (128, 640), (64, 1000)]
    leaves = [jnp.asarray(_draw(kind, s, i)) for i, s in enumerate(shapes)]
    for share in (0.0, 0.1, 0.77, 1.0):
        kept = [round(share * (256 * 1024 + 8 + 64_000)), round(share * 128 * 640)]
        _check(leaves, kept, (0, 0, 1, 0))


@pytest.mark.parametrize("shape", [(8, 5003), (3, 40, 700), (33, 2000)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_shapes_that_fold_on_one_device_only(shape, kind, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jnp.asarray(_draw(kind, shape))
    for k in (0, x.size // 3, x.size):
        _check([x], [k], (0,))


def test_empty_leaf():
    _check([jnp.zeros((0, 4)), jnp.ones((2, 3))], [0, 2], (0, 1))
    _check([jnp.zeros((0, 4)), jnp.ones((2, 3))], [4], (0, 0))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((256, 1024), P("x", None)),
        ((256, 1024), P(None, "x")),
        ((256, 1024), P(("x", "y"), None)),
        ((256, 512), P("x", "y")),
        ((8, 12), P("x", None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_sharded_leaves_get_the_same_masks(shape, spec, axis_type, kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    values = _draw(kind, shape)
    k = values.size // 10
    x = jax.device_put(values, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        (mask,) = _masks([x], [_wide.from_int(k)], (0,))
    np.testing.assert_array_equal(mask, _oracle([values], k)[0])
    if axis_type is AxisType.Explicit:
        assert jax.typeof(mask).sharding.spec == jax.typeof(x).sharding.spec


def test_nothing_of_the_size_of_the_scores_is_stored():
    x = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)

    def cuts(x, k):
        return _select.cuts([_select.scored(jnp.abs, x)], [k], (0,))

    compiled = jax.jit(cuts).lower(x, _wide.from_int(5)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < x.size * 4 / 4


def test_scores_are_made_from_several_operands():
    w, g = _draw("normal", (256, 1024)), _draw("normal", (256, 1024), 1)
    leaf = _select.scored(lambda w, g: jnp.abs(w * g), jnp.asarray(w), jnp.asarray(g))
    k = w.size // 3
    (cut,) = _select.cuts([leaf], [_wide.from_int(k)], (0,))
    np.testing.assert_array_equal(
        _select.keep(jnp.abs(w * g), cut), _oracle([np.abs(w * g)], k)[0]
    )


@pytest.mark.parametrize("kind", ["normal", "ties", "nan"])
def test_threshold_value_is_the_smallest_score_kept(kind):
    values = np.abs(_draw(kind, (64, 64)))
    leaf = _select.scored(lambda x: x, jnp.asarray(values))
    (cut,) = _select.cuts([leaf], [_wide.from_int(100)], (0,))
    kept = values[np.asarray(_select.keep(leaf.operands[0], cut))]
    lost = np.sort(values[values < kept.min()])[-1]
    # Between two scores the search may stop at any threshold that separates them.
    assert lost < float(_select.threshold_value(cut)) <= kept.min()


def test_threshold_value_where_everything_is_kept():
    leaf = _select.scored(lambda x: x, jnp.ones((3, 4)))
    (cut,) = _select.cuts([leaf], [_wide.from_int(12)], (0,))
    assert float(_select.threshold_value(cut)) == 0


@pytest.mark.parametrize("shape", [(), (5,), (64, 33), (256, 512)], ids=str)
def test_count(shape):
    x = _draw("nan", shape)
    assert int(_select.count(jnp.asarray(x), jnp.isnan)) == np.isnan(x).sum()
