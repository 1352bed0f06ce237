"""The division of sparsity among leaves, in exact fractions."""

import math
import re
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import allocation

SIDES = st.integers(1, 300)
SHAPES = st.dictionaries(
    st.sampled_from("abcdefgh"),
    st.lists(SIDES, min_size=0, max_size=4).map(tuple),
    min_size=1,
)
SPARSITIES = st.fractions(0, 1, max_denominator=10_000).filter(lambda s: s < 1)


@given(SHAPES, SPARSITIES)
def test_erk_meets_its_budget(shapes, sparsity):
    found = allocation.erk(shapes, sparsity)
    assert set(found) == set(shapes)
    sizes = {p: math.prod(s) for p, s in shapes.items()}
    assert all(0 <= found[p] < 1 for p in shapes)
    pruned = sum(found[p] * sizes[p] for p in shapes)
    assert pruned == sparsity * sum(sizes.values())
    # Densities are in proportion to (sum of the axes) / (their product), up to 1.
    scales = {
        (1 - found[p]) * sizes[p] / sum(shapes[p] or (1,)) for p in shapes if found[p]
    }
    assert len(scales) <= 1
    if scales:
        (scale,) = scales
        for p in shapes:
            if found[p] == 0:
                assert scale * sum(shapes[p] or (1,)) >= sizes[p]


def test_erk_with_empty_leaves():
    found = allocation.erk({"a": (0, 4), "b": (100, 100)}, 0.9)
    assert found["b"] == Fraction(9, 10)


@given(SHAPES, SPARSITIES)
def test_uniform(shapes, sparsity):
    assert allocation.uniform(shapes, sparsity) == dict.fromkeys(shapes, sparsity)


@given(st.lists(st.fractions(0, 1000), max_size=20), st.data())
def test_round_to_total(wanted, data):
    whole = sum(wanted)
    total = data.draw(st.sampled_from([math.floor(whole), math.ceil(whole)]))
    found = allocation.round_to_total(wanted, total)
    assert sum(found) == total
    assert all(
        math.floor(w) <= f <= math.ceil(w) for w, f in zip(wanted, found, strict=True)
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.9, Fraction(9, 10)),
        (0, Fraction(0)),
        (0.1 + 0.2, Fraction("0.30000000000000004")),
        (1e-7, Fraction(1, 10**7)),
        (Fraction(1, 3), Fraction(1, 3)),
        (Decimal("0.95"), Fraction(19, 20)),
        (np.float64(0.9), Fraction(9, 10)),
        (np.float32(0.9), Fraction(9, 10)),
        (np.array(0.9), Fraction(9, 10)),
        (jnp.float32(0.9), Fraction(9, 10)),
    ],
)
def test_exact_takes_the_decimal_that_was_written(value, expected):
    assert allocation.exact(value) == expected


@pytest.mark.parametrize(
    "value", [1, 1.0, -0.1, 90, math.nan, math.inf, Fraction(3, 2)]
)
def test_exact_refuses_what_is_no_share(value):
    words = r"got .*; expected a share of weights to prune in \[0, 1\)\. For 90 % write 0\.9"
    with pytest.raises(ValueError, match=f"some name: {words}"):
        allocation.exact(value, "some name")


@pytest.mark.parametrize(
    "value", [None, "0.9", [0.9], np.array([0.9, 0.8]), {}, object()]
)
def test_exact_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="sparsity: got .*; expected a Python number"):
        allocation.exact(value)


def test_exact_refuses_traced_numbers():
    with pytest.raises(TypeError, match="Counts are computed exactly, before tracing"):
        jax.jit(allocation.exact)(0.5)


LEAVES = {"body/0/kernel": (4, 4), "body/1/kernel": (4, 4), "head/kernel": (4, 2)}


def test_allocate_by_pattern():
    found = allocation.allocate({"body/*": 0.5, "body/1/*": 0.75}, LEAVES, 0.25)
    assert [*found.values()] == [Fraction(1, 2), Fraction(3, 4), Fraction(1, 4)]
    assert [*found] == [*LEAVES]
    everything = allocation.allocate({"*": 0.5}, LEAVES, None)
    assert {*everything.values()} == {Fraction(1, 2)}


@pytest.mark.parametrize("name", ["uniform", "global"])
def test_allocate_by_name(name):
    assert {*allocation.allocate(name, LEAVES, 0.9).values()} == {Fraction(9, 10)}


def test_allocate_by_function():
    def by_rows(shapes, sparsity):
        return {p: sparsity * s[1] / 4 for p, s in shapes.items()}

    found = allocation.allocate(by_rows, LEAVES, 0.5)
    assert [*found.values()] == [Fraction(1, 2), Fraction(1, 2), Fraction(1, 4)]
    assert allocation.allocate(allocation.erk, LEAVES, 0.5) == allocation.allocate(
        "erk", LEAVES, 0.5
    )


@pytest.mark.parametrize(
    ("given_allocation", "sparsity", "words"),
    [
        ("uniform", None, "sparsity: got None; expected a number in [0, 1) with "
         "allocation='uniform'."),
        ("layerwise", 0.5, "allocation: got 'layerwise'; expected 'uniform', 'global', "
         "'er', 'erk', a mapping {path pattern: sparsity} or a function"),
        ({"tail/*": 0.5}, 0.5, "allocation: the pattern 'tail/*' matches no leaf. The "
         "paths are: body/0/kernel, body/1/kernel, head/kernel."),
        ({"body/*": 0.5}, None, "sparsity: got None, but no pattern of "
         "allocation={'body/*': 0.5} matches head/kernel. Give sparsity=, or a pattern"),
        ({"*": 1.5}, None, "allocation for body/0/kernel: got 1.5; expected a share"),
        (lambda shapes, s: {"body/0/kernel": s}, 0.5, "allocation: the function answered "
         "for body/0/kernel; expected exactly body/0/kernel, body/1/kernel, head/kernel."),
        (lambda shapes, s: dict.fromkeys(shapes, 2), 0.5, "allocation for body/0/kernel: "
         "got 2; expected a share"),
        ("erk", 1.0, "sparsity: got 1.0; expected a share"),
    ],
)  # fmt: skip
def test_bad_allocations(given_allocation, sparsity, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        allocation.allocate(given_allocation, LEAVES, sparsity)


def test_public_names():
    assert jp.allocation is allocation


LAYERS = {"conv": (3, 3, 8, 16), "dense": (128, 64), "head": (64, 10), "tiny": (4, 2)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("rule", [jp.allocation.er, jp.allocation.water_filling])
def test_budgets_are_met_exactly(rule, sparsity):
    found = rule(LAYERS, sparsity)
    sizes = {p: math.prod(s) for p, s in LAYERS.items()}
    left = sum((1 - found[p]) * sizes[p] for p in LAYERS)
    assert left == (1 - jp.allocation.exact(sparsity)) * sum(sizes.values())
    assert all(0 <= s < 1 for s in found.values())


def test_er_looks_at_the_last_two_axes_only():
    """Densities below 1 are in proportion to (in + out) / (in * out)."""
    found = jp.allocation.er({"conv": (3, 3, 8, 16), "dense": (32, 64)}, 0.9)
    ratio = (1 - found["conv"]) / (1 - found["dense"])
    assert ratio == Fraction(24, 128) / Fraction(96, 2048)


def test_water_filling_solves_its_program():
    """No exchange of weights between two leaves raises the sum of log densities."""
    costs = {"conv": 5.0, "dense": 1.5, "head": 0.5, "tiny": 3.0}
    found = jp.allocation.water_filling(LAYERS, 0.6, costs=costs)
    spent = {p: (1 - found[p]) * Fraction(costs[p]) for p in costs}
    assert sum(spent.values()) == Fraction(2, 5) * sum(map(Fraction, costs.values()))
    free = {p: s for p, s in spent.items() if found[p] > 0}
    # Unsaturated leaves spend the same; a saturated one would like to spend as much.
    assert len(set(free.values())) == 1
    level = next(iter(free.values()))
    assert all(s <= level for s in spent.values())
    assert len(free) < len(spent)


def test_er_is_an_allocation_by_name():
    params = {p: jnp.ones(s) for p, s in LAYERS.items()}
    _, masks = jp.prune(params, 0.9, allocation="er")
    sizes = sum(math.prod(s) for s in LAYERS.values())
    assert jp.masks.count(masks).kept == sizes - math.floor(0.9 * sizes + 0.5)


def test_costs_must_cover_the_leaves():
    with pytest.raises(ValueError, match="costs: nothing above 0 for dense"):
        jp.allocation.water_filling({"dense": (4, 4)}, 0.5, costs={"head": 1.0})
