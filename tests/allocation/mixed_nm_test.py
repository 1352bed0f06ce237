"""N:M with another N for each leaf."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

import jaxprune as jp
from jaxprune.allocation import mixed_nm

SHAPES = st.dictionaries(
    st.sampled_from("abcde"), st.tuples(st.just(8), st.integers(1, 6)), min_size=1
)


@hypothesis.given(SHAPES, st.sampled_from([2, 4, 8]), st.data())
def test_the_whole_is_kept_as_nearly_as_one_threshold_can(shapes, m, data):
    share = st.integers(1, 99).map(lambda i: i / 100)
    sparsities = {p: data.draw(share, label=p) for p in shapes}
    found = mixed_nm(shapes, sparsities, m=m)
    assert all(0 < x.n < m and x.m == m and x.axis == -2 for x in found.values())

    def missed(ns):
        kept = sum(ns[p] / m * math.prod(shapes[p]) for p in shapes)
        wanted = sum((1 - sparsities[p]) * math.prod(shapes[p]) for p in shapes)
        return abs(kept - wanted)

    def rounded(least):
        exact = {p: m * (100 - round(100 * s)) for p, s in sparsities.items()}
        ns = {p: n // 100 + (n % 100 >= least) for p, n in exact.items()}
        return {p: min(max(n, 1), m - 1) for p, n in ns.items()}

    ns = {p: x.n for p, x in found.items()}
    assert missed(ns) <= min(missed(rounded(i)) for i in range(1, 101)) + 1e-6
    for p, s in sparsities.items():
        assert abs(ns[p] - m * (1 - s)) < 1 or ns[p] in (1, m - 1)


def test_each_is_rounded_by_itself_where_the_whole_agrees():
    shapes = {str(i): (8, 4) for i in range(4)}
    found = mixed_nm(shapes, {"0": 0.3, "1": 0.45, "2": 0.55, "3": 0.7})
    assert [x.n for x in found.values()] == [6, 4, 4, 2]
    assert mixed_nm(shapes, dict.fromkeys(shapes, 0.5), m=4) == dict.fromkeys(
        shapes, jp.NM(2, 4)
    )


def test_what_groups_cannot_hold():
    shapes = {"head": (8, 800), "a": (8, 8), "b": (8, 8)}
    found = mixed_nm(shapes, {"head": 0.01, "a": 0.5, "b": 0.99})
    assert [x.n for x in found.values()] == [7, 4, 1]  # the others are not moved for it
    with pytest.raises(
        ValueError, match="sparsities: got 0 for head, of which N:M would"
    ):
        mixed_nm(shapes, {"head": 0, "a": 0.5, "b": 0.5})


def test_messages():
    with pytest.raises(ValueError, match="m: got 1; expected a whole number"):
        mixed_nm({"a": (8, 8)}, {"a": 0.5}, m=1)
    with pytest.raises(ValueError, match="m: got 2.5; expected a whole number"):
        mixed_nm({"a": (8, 8)}, {"a": 0.5}, m=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsities: nothing for b;"):
        mixed_nm({"a": (8, 8), "b": (8, 8)}, {"a": 0.5})
    with pytest.raises(ValueError, match="sparsities of a: got 1.5"):
        mixed_nm({"a": (8, 8)}, {"a": 1.5})
