"""DSnoT: the error of a column never rises, and what was given is what stays."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import calibration, posttrain

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N, ROWS = 16, 5, 40
PLAIN = jp.Unstructured()


def _inputs(x):
    x = np.asarray(x, np.float64)
    return calibration.Inputs(
        jnp.float32(len(x)),
        *(jnp.asarray(a, jnp.float32) for a in ((x**2).mean(0), x.mean(0), x.var(0))),
        gram=jnp.asarray(x.T @ x / len(x), jnp.float32),
    )


def _magnitude_mask(w, structure):
    """Half of the weights of the matrix, or what the groups allow; ties do not happen."""
    size = np.abs(np.asarray(w, np.float32))
    if not isinstance(structure, jp.NM):
        return jnp.asarray(size > np.median(size))
    grouped = size.reshape(-1, structure.m, structure.stride, size.shape[1])
    least = np.sort(grouped, axis=1)[:, structure.m - structure.n, None]
    return jnp.asarray((grouped >= least).reshape(size.shape))


def _case(seed, structure=PLAIN, shape=(K, N), dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(
        rng.normal(size=shape[0]), rng.gamma(1, size=shape[0]), (ROWS, shape[0])
    )
    w = jnp.asarray(rng.normal(size=shape), dtype)
    return w, _magnitude_mask(w, structure), _inputs(x)


def _error(w, mask, inputs):
    share = np.asarray(w, np.float64) * np.asarray(inputs.mean, np.float64)[:, None]
    return np.where(np.asarray(mask), 0, share).sum(0), np.abs(share).sum(0)


def _authors_loop(w, mask, inputs, power, cycles, threshold):
    """Column by column, swap by swap, with our rule that each swap must help."""
    w, mask = np.asarray(w, np.float64), np.array(mask)
    mean, var = np.asarray(inputs.mean, np.float64), np.asarray(inputs.variance)
    norm = np.sqrt(np.asarray(inputs.square))
    for n in range(w.shape[1]):
        m = w[:, n] * mean
        e = m[~mask[:, n]].sum()
        back = [k for k in np.argsort(-np.sign(e) * m / var**power) if not mask[k, n]]
        goes = [k for k in np.argsort(np.abs(w[:, n]) * norm)
                if mask[k, n] and m[k] * np.sign(e) < 0]  # fmt: skip
        for grown, pruned in list(zip(back, goes, strict=False))[:cycles]:
            new = e + m[pruned] - m[grown]
            if abs(e) <= threshold or new * e < 0 or abs(new) >= abs(e):
                break
            mask[grown, n], mask[pruned, n], e = True, False, new
    return mask


refine = jax.jit(
    posttrain.dsnot, static_argnames=("structure", "cycles", "variance_power")
)


@pytest.mark.parametrize("power", [0, 1])
@pytest.mark.parametrize("cycles", [3, 50])
@pytest.mark.parametrize("seed", range(4))
def test_same_swaps_as_a_loop(seed, cycles, power):
    w, mask, inputs = _case(seed)
    found = refine(w, mask, inputs, cycles=cycles, variance_power=power)
    expected = _authors_loop(w, mask, inputs, power, cycles, 0.1 / 2048)
    np.testing.assert_array_equal(found.mask, expected)
    assert (np.asarray(found.mask) != np.asarray(mask)).any()


@pytest.mark.parametrize("structure", [PLAIN, jp.NM(2, 4), jp.NM(1, 4, stride=2)])
@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(0, 10_000), st.sampled_from([0, 1]))
def test_error_of_a_column_never_rises(structure, seed, power):
    w, mask, inputs = _case(seed, structure)
    found = refine(w, mask, inputs, structure=structure, variance_power=power)
    before, scale = _error(w, mask, inputs)
    after, _ = _error(w, found.mask, inputs)
    assert (np.abs(found.error) <= np.abs(found.initial_error)).all()
    # The same in exact arithmetic, up to the rounding of a sum of 16 float32.
    assert (np.abs(after) <= np.abs(before) + 1e-6 * scale).all()
    np.testing.assert_allclose(found.error, after, atol=1e-5 * scale.max())
    np.testing.assert_allclose(found.initial_error, before, atol=1e-5 * scale.max())
    np.testing.assert_array_equal(found.mask.sum(0), mask.sum(0))
    if isinstance(structure, jp.NM):
        grouped = found.mask.reshape(-1, structure.m, structure.stride, N)
        assert (grouped.sum(1) == structure.n).all()


@pytest.mark.parametrize(("structure", "share"), [(PLAIN, 0.25), (jp.NM(2, 4), 0.5)])
def test_error_falls_much(structure, share):
    w, mask, inputs = _case(1, structure, (64, 32))
    found = refine(w, mask, inputs, structure=structure)
    fall = np.abs(found.error).mean() / np.abs(found.initial_error).mean()
    assert fall < share


def test_variance_term_changes_the_order():
    w, mask, inputs = _case(3)
    masks = [refine(w, mask, inputs, variance_power=p).mask for p in (0, 1)]
    assert (masks[0] != masks[1]).any()


def test_variance_is_needed_only_with_its_power():
    w, mask, inputs = _case(0)
    without = inputs._replace(variance=None)
    np.testing.assert_array_equal(
        refine(w, mask, without, variance_power=0).mask,
        refine(w, mask, inputs, variance_power=0).mask,
    )
    with pytest.raises(ValueError, match=re.escape("dsnot: inputs.variance is None")):
        posttrain.dsnot(w, mask, without)


def test_dead_and_constant_inputs():
    w, mask, inputs = _case(0)
    x = np.random.default_rng(0).normal(size=(ROWS, K))
    x[:, 0], x[:, 1] = 0, 3
    inputs = _inputs(x)
    found = refine(w, mask, inputs)
    assert np.isfinite(found.error).all()
    dead = ~np.asarray(mask)[0]
    assert not np.asarray(found.mask)[0, dead].any()  # a dead input gives nothing back


@pytest.mark.parametrize("structure", [PLAIN, jp.NM(2, 4)])
def test_stacks_are_matrices_side_by_side(structure):
    cases = [_case(seed, structure) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    found = refine(*stacked, structure=structure)
    mapped = jax.vmap(functools.partial(refine, structure=structure))(*stacked)
    for i, case in enumerate(cases):
        alone = refine(*case, structure=structure)
        np.testing.assert_array_equal(found.mask[i], alone.mask)
        np.testing.assert_array_equal(mapped.mask[i], alone.mask)


def test_bfloat16_weights():
    w, mask, inputs = _case(2, dtype=jnp.bfloat16)
    found = refine(w, mask, inputs)
    assert found.error.dtype == jnp.float32
    same = refine(w.astype(jnp.float32), mask, inputs)
    np.testing.assert_array_equal(found.mask, same.mask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": np.ones((K, N))}, TypeError, "dsnot: mask holds float"),
        (
            {"mask": np.ones((K, 2), bool)},
            ValueError,
            "dsnot: mask has the shape (16, 2)",
        ),
        (
            {"w": jnp.ones(K)},
            ValueError,
            "dsnot: w has the shape (16,); expected a matrix",
        ),
        ({"w": jnp.ones((K, N), int)}, TypeError, "dsnot: w holds int32"),
        ({"inputs": 3}, TypeError, "dsnot: inputs is of type int"),
        ({"cycles": 0}, ValueError, "dsnot: got cycles=0; expected at least 1"),
        ({"structure": jp.Channel()}, TypeError, "dsnot: got structure=Channel("),
        (
            {"structure": jp.NM(2, 4, axis=-1)},
            ValueError,
            "expected the contracted axis -2",
        ),
        ({"structure": jp.NM(2, 5)}, ValueError, "does not divide axis"),
        (
            {
                "structure": jp.NM(2, 4),
                "mask": np.arange(K)[:, None] % 4 < [3, 2, 2, 2, 2],
            },
            ValueError,
            "dsnot: mask keeps 3 of a group",
        ),
        (
            {"inputs": calibration.Inputs(jnp.ones(()), mean=jnp.ones(3))},
            ValueError,
            "dsnot: inputs.mean has the shape (3,); expected (16,)",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_refused(change, error, message):
    w, mask, inputs = _case(0)
    arguments = {"w": w, "mask": mask, "inputs": inputs, **change}
    with pytest.raises(error, match=re.escape(message)):
        posttrain.dsnot(**arguments)


def test_bias_correction_makes_the_mean_error_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(1, 1, (ROWS, K)).astype(np.float32)
    w, mask, inputs = _case(0)
    pruned = jnp.where(mask, w, 0)
    extra = jax.jit(posttrain.bias_correction)(w, pruned, _inputs(x))
    error = x @ w - (x @ pruned + extra)
    assert np.abs((x @ w - x @ pruned).mean(0)).max() > 0.1
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-5)
    stack = jnp.stack([w, 2 * w]), jnp.stack([pruned, 2 * pruned])
    both = posttrain.bias_correction(
        *stack, jax.tree.map(lambda a: jnp.stack([a, a]), _inputs(x))
    )
    np.testing.assert_allclose(both, jnp.stack([extra, 2 * extra]), rtol=1e-5)


def test_bias_correction_refuses_what_does_not_fit():
    w, _, inputs = _case(0)
    with pytest.raises(ValueError, match=re.escape("inputs.mean is None")):
        posttrain.bias_correction(w, w, inputs._replace(mean=None))
    with pytest.raises(ValueError, match=re.escape("w has the shape (2, 5)")):
        posttrain.bias_correction(w, w[:2], inputs)
