"""Two-word counts against Python integers, also far beyond what fits in memory."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp
from jaxprune import _wide

U64 = st.integers(0, 2**64 - 1)
EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**44 - 1, 19_327_352_832]


def _ints(wide: _wide.Wide) -> list[int]:
    pairs = zip(np.ravel(wide.hi).tolist(), np.ravel(wide.lo).tolist(), strict=True)
    return [(hi << 32) + lo for hi, lo in pairs]


@given(U64)
def test_round_trip(value):
    assert int(_wide.from_int(value)) == value


@pytest.mark.parametrize("value", [-1, 2**64])
def test_values_that_do_not_fit_are_refused(value):
    with pytest.raises(ValueError, match=r"value: got .* expected an integer in \[0"):
        _wide.from_int(value)


@given(U64, U64)
def test_arithmetic_and_comparison(a, b):
    x, y = _wide.from_int(a), _wide.from_int(b)
    assert int(_wide.add(x, y)) == (a + b) % 2**64
    assert int(_wide.subtract(x, y)) == (a - b) % 2**64
    assert int(_wide.saturating_subtract(x, y)) == max(a - b, 0)
    assert int(_wide.minimum(x, y)) == min(a, b)
    assert bool(_wide.less(x, y)) == (a < b)
    assert bool(_wide.equal(x, y)) == (a == b)
    assert bool(_wide.equal(x, x))
    assert int(_wide.where(jnp.bool_(a < b), x, y)) == min(a, b)


@given(U64, st.integers(0, 31))
def test_shift(a, bits):
    assert int(_wide.shift_left(_wide.from_int(a), bits)) == (a << bits) % 2**64


@given(U64)
def test_to_float_is_the_nearest(a):
    assert np.float32(a) == pytest.approx(
        float(_wide.from_int(a).to_float()), rel=2**-23
    )


@given(st.lists(U64, max_size=4))
def test_vectors(values):
    assert _ints(_wide.from_ints(values)) == values
    if values:
        assert _ints(_wide.stack([_wide.from_int(v) for v in values])) == values


@given(st.lists(U64, min_size=4, max_size=4), hnp.arrays(bool, (3, 4)))
def test_sums(values, members):
    expected = [
        sum(v for v, m in zip(values, row, strict=True) if m) for row in members
    ]
    got = _wide.sums(members, _wide.from_ints(values))
    assert _ints(got) == [e % 2**64 for e in expected]
    pairs = jax.tree.map(lambda x: x.reshape(4, 1), _wide.from_ints(values))
    assert _wide.sums(members, pairs).lo.shape == (3, 1)


@given(
    st.lists(st.integers(0, 2**27 - 1), min_size=1, max_size=24).map(np.uint32),
    st.sampled_from([(-1,), (1, -1), (-1, 1), (1, -1, 1)]),
    st.sampled_from([2**32, 2**43]),
)
def test_total(counts, shape, bound):
    got = _wide.total(jnp.asarray(counts).reshape(shape), bound)
    assert int(got) == int(counts.astype(object).sum())


@pytest.mark.parametrize(
    "shape", [(2, 2**21), (2**21, 2), (2**12, 2**9), (5, 7, 2**14)], ids=str
)
@pytest.mark.parametrize("each", [0, 1, 2000])
def test_total_on_long_axes_in_two_words(shape, each):
    # `bound` alone chooses the two-word sum, so that small arrays exercise it too.
    counts = jnp.full(shape, each, jnp.uint32)
    assert int(_wide.total(counts, 2**40)) == each * counts.size


@pytest.mark.parametrize("bound", [2**31, 2**40])
def test_total_keeps_leading_axes(bound):
    counts = jnp.arange(24, dtype=jnp.uint32).reshape(2, 3, 4)
    expected = np.arange(24).reshape(2, 12).sum(1).tolist()
    assert _ints(_wide.total(counts, bound, lead=1)) == expected


def test_total_of_a_large_leaf_leaves_one_short_axis_behind():
    assert _wide._at_once((80, 8192, 28672), (0, 1, 2), 1) == (2, 1)
    assert _wide._at_once((2, 80, 1024, 28672), (1, 2, 3), 32) == (3, 2)


def test_total_of_no_axes():
    """Nothing to sum, whatever the bound says."""
    assert int(_wide.total(jnp.uint32(7), 2**33)) == 7


def test_total_beyond_one_word():
    counts = jnp.full((2048, 512), 4095 * 16, jnp.uint32)  # 6.9e10
    assert int(_wide.total(counts, 2**40)) == 4095 * 16 * 2048 * 512


@given(
    st.one_of(st.integers(0, 2**44), st.sampled_from(EDGES)),
    st.one_of(st.integers(0, 2**44), st.sampled_from(EDGES)),
    st.floats(0, 1, width=32),
)
def test_interpolate(start, end, fraction):
    got = int(_wide.interpolate(start, end, jnp.float32(fraction)))
    units = Fraction(int(Fraction(float(fraction)) * 2**31), 2**31)
    moved = (abs(end - start) * units + Fraction(1, 2)).__floor__()
    assert got == start + moved if end >= start else got == start - moved


@pytest.mark.parametrize(
    ("start", "end"), [(0, 20_000_000_000), (20_000_000_000, 2_000_000_001), (7, 7)]
)
def test_interpolate_is_exact_at_both_ends(start, end):
    assert int(_wide.interpolate(start, end, jnp.float32(0))) == start
    assert int(_wide.interpolate(start, end, jnp.float32(1))) == end


def test_interpolate_under_jit_and_out_of_range():
    f = jax.jit(lambda x: _wide.interpolate(0, 2 * 10**10, x))
    assert int(f(0.25)) == 5 * 10**9
    assert (int(f(-3.0)), int(f(2.0))) == (0, 2 * 10**10)


@pytest.mark.parametrize("dtype", ["uint8", "uint32"])
def test_popcount(dtype):
    words = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (7, 9), dtype)
    expected = sum(int(w).bit_count() for w in words.ravel())
    assert int(_wide.popcount(jnp.asarray(words))) == expected


def test_exact_count_where_float32_arithmetic_fails():
    size = 2**25 + 1
    weights = jax.random.bits(jax.random.key(0), (size,), jnp.uint16)
    weights = weights.astype(jnp.bfloat16)  # many ties, at all magnitudes
    _, masks = jp.prune({"kernel": weights}, 0.9, where="kernel")
    kept = size - (size * 9 * 2 + 10) // 20  # size - floor(0.9 size + 1/2)
    assert jp.masks.count(masks) == (kept, size)
