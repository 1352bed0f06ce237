"""N:M with another N for each leaf."""

import itertools
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
def test_the_whole_is_kept_as_nearly_as_one_shift_can(shapes, m, data):
    share = st.integers(0, 99).map(lambda i: i / 100)
    sparsities = {p: data.draw(share, label=p) for p in shapes}
    found = mixed_nm(shapes, sparsities, m=m)
    assert all(0 < x.n < m and x.m == m and x.axis == -2 for x in found.values())

    def missed(ns):
        kept = sum(ns[p] / m * math.prod(shapes[p]) for p in shapes)
        wanted = sum((1 - sparsities[p]) * math.prod(shapes[p]) for p in shapes)
        return abs(kept - wanted)

    def shifted(shift):
        ns = {p: math.floor(m * (1 - s) + shift) for p, s in sparsities.items()}
        return {p: min(max(n, 1), m - 1) for p, n in ns.items()}

    ns = {p: x.n for p, x in found.items()}
    # Sparsities are hundredths, so that these shifts are all that matter.
    tried = [missed(shifted(i / 100 + 1e-6)) for i in range(-100 * m, 100 * m)]
    assert missed(ns) <= min(tried) + 1e-6
    for p, q in itertools.combinations(shapes, 2):  # in the order of the densities
        if sparsities[p] <= sparsities[q]:
            assert ns[p] >= ns[q]


def test_each_is_rounded_by_itself_where_the_whole_agrees():
    shapes = {str(i): (8, 4) for i in range(4)}
    found = mixed_nm(shapes, {"0": 0.3, "1": 0.45, "2": 0.55, "3": 0.7})
    assert [x.n for x in found.values()] == [6, 4, 4, 2]
    assert mixed_nm(shapes, dict.fromkeys(shapes, 0.5), m=4) == dict.fromkeys(
        shapes, jp.NM(2, 4)
    )


def test_messages():
    with pytest.raises(ValueError, match="m: got 1; expected 2 or more"):
        mixed_nm({"a": (8, 8)}, {"a": 0.5}, m=1)
    with pytest.raises(ValueError, match="sparsities: nothing for b;"):
        mixed_nm({"a": (8, 8), "b": (8, 8)}, {"a": 0.5})
    with pytest.raises(ValueError, match="sparsities of a: got 1.5"):
        mixed_nm({"a": (8, 8)}, {"a": 1.5})
