"""Schedules against their formulas in float64."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp

SHARES = st.fractions(0, 1, max_denominator=1000)


def _cubic(final, initial, gone):
    return final + (initial - final) * (1 - gone) ** 3


def _cosine(final, initial, gone):
    return initial + (final - initial) * (1 - math.cos(math.pi * gone)) / 2


CURVES = [(jp.schedules.cubic, _cubic), (jp.schedules.cosine, _cosine)]


@pytest.mark.parametrize(("make", "formula"), CURVES, ids=["cubic", "cosine"])
@given(
    final=SHARES,
    initial=SHARES,
    begin=st.integers(0, 50),
    length=st.integers(0, 60),
    every=st.integers(1, 25),
)
def test_curves(make, formula, final, initial, begin, length, every):
    end = begin + length
    schedule = make(float(final), begin, end, every, initial=float(initial))
    steps = np.arange(170)
    got = np.asarray(schedule(steps))
    updates = {*range(begin, end + 1, every), end}
    np.testing.assert_array_equal(schedule.due(steps), [t in updates for t in steps])
    current = float(initial)
    for step, value in zip(steps, got, strict=True):
        if step >= end:
            current = float(final)
        elif step in updates:
            current = formula(float(final), float(initial), (step - begin) / length)
        assert value == pytest.approx(current, abs=2e-6)
    # Exact where counts have to be, and never back.
    assert (got[steps < begin] == np.float32(initial)).all()
    assert (got[steps >= end] == np.float32(final)).all()
    fractions = np.asarray(schedule.fraction(steps))
    assert (np.diff(fractions) >= 0).all()
    assert (fractions[steps < begin] == 0).all() and (
        fractions[steps >= end] == 1
    ).all()


def test_ends_are_exact_beyond_2_to_the_24():
    schedule = jp.schedules.cubic(0.9, 2**24 + 1, 2**30 + 3, 1000)
    steps = jnp.array([0, 2**24, 2**30 + 3, 2**31 - 1], jnp.int32)
    assert schedule.fraction(steps).tolist() == [0, 0, 1, 1]
    assert schedule.due(steps).tolist() == [False, False, True, False]
    assert bool(schedule.due(jnp.int32(2**24 + 1)))


def test_schedules_work_under_jit_and_take_fractions():
    schedule = jp.schedules.cubic(Fraction(9, 10), 0, 100, 10, Fraction(1, 3))
    values = jax.jit(jax.vmap(schedule))(jnp.arange(101))
    # To two ulps: under jit a product and a sum are fused and rounded once.
    np.testing.assert_allclose(values, schedule(np.arange(101)), rtol=2**-22)
    assert values.dtype == jnp.float32
    assert values[0] == np.float32(1 / 3) and values[100] == np.float32(0.9)
    assert bool(jax.jit(schedule.due)(50)) and not bool(jax.jit(schedule.due)(55))


def test_constant():
    schedule = jp.schedules.constant(0.3)
    assert {float(schedule(t)) for t in (0, 1, 99)} == {float(np.float32(0.3))}
    assert [bool(schedule.due(t)) for t in (0, 1, 99)] == [True, False, False]


@pytest.mark.parametrize("at", [0, 7])
def test_one_shot(at):
    schedule = jp.schedules.one_shot(0.3, at)
    steps = np.arange(10)
    assert (
        np.asarray(schedule(steps)) == np.where(steps < at, 0, np.float32(0.3))
    ).all()
    np.testing.assert_array_equal(schedule.due(steps), steps == at)


@pytest.mark.parametrize(
    ("total", "start", "stop", "expected"),
    [(100, 0.25, 0.75, (25, 75)), (10, 0, 1, (0, 10)), (3, 0.5, 0.5, (2, 2)),
     (0, 0.25, 0.75, (0, 0))],
)  # fmt: skip
def test_window(total, start, stop, expected):
    schedule = jp.schedules.window(0.9, total, 4, start=start, stop=stop, initial=0.1)
    assert (schedule.begin, schedule.end) == expected
    plain = jp.schedules.cubic(0.9, *expected, 4, 0.1)
    steps = np.arange(total + 2)
    np.testing.assert_array_equal(schedule(steps), plain(steps))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: jp.schedules.cubic(0.9, 5, 4), ValueError,
         "begin, end: got begin=5, end=4; expected 0 <= begin <= end, in training steps"),
        (lambda: jp.schedules.cosine(0.9, -1, 4), ValueError, "got begin=-1, end=4"),
        (lambda: jp.schedules.one_shot(0.9, -1), ValueError, "got begin=-1, end=-1"),
        (lambda: jp.schedules.cubic(0.9, 0, 4, 0), ValueError,
         "every: got 0; expected at least 1 step"),
        (lambda: jp.schedules.cubic(0.9, 0, 1e4), TypeError,
         "end: got 10000.0; expected a whole number of training steps, written as an int"),
        (lambda: jp.schedules.cubic(0.9, 0.5, 4), TypeError, "begin: got 0.5"),
        (lambda: jp.schedules.cubic(0.9, 0, 4, 2.0), TypeError, "every: got 2.0"),
        (lambda: jp.schedules.window(0.9, 100, start=0.8), ValueError,
         "start, stop: got 0.8, 0.75; expected 0 <= start <= stop <= 1"),
        (lambda: jp.schedules.window(0.9, 100, stop=1.5), ValueError, "got 0.25, 1.5"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()
