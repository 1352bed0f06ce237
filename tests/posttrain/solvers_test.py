"""What holds of every solver on one matrix."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import posttrain
from jaxprune.calibration import Inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")

SOLVERS = {
    "magnitude": posttrain.magnitude(),
    "wanda": posttrain.wanda(),
    "ria": posttrain.ria(),
    "sparsegpt": posttrain.sparsegpt(block_size=8),
    "alps": posttrain.alps(iterations=60),
}
BY_OUTPUT = {
    "magnitude": posttrain.magnitude(group="output"),
    "wanda": posttrain.wanda(),
    "sparsegpt": posttrain.sparsegpt(group="output"),
    "alps": posttrain.alps(group="output"),
}
# A threshold for the whole matrix takes long to compile.
QUICK = {**SOLVERS, "alps": posttrain.alps(group="output", iterations=60)}
STRUCTURES = {
    "unstructured": (0.6, jp.Unstructured()),
    "2:4": (None, jp.NM(2, 4)),
    "blocks": (0.5, jp.Block(4, 2)),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", SOLVERS)
def test_counts_are_exact_and_pruned_weights_zero(name, structure, layer):
    sparsity, structure = STRUCTURES[structure]
    w, inputs = layer(24, 8)
    found = SOLVERS[name].solve(w, inputs, sparsity, structure)
    mask = np.asarray(found.mask)
    if isinstance(structure, jp.NM):
        assert (mask.reshape(6, 4, 8).sum(1) == 2).all()
    elif isinstance(structure, jp.Block):
        blocks = mask.reshape(6, 4, 4, 2)
        assert (blocks.all((1, 3)) == blocks.any((1, 3))).all()
        assert blocks.all((1, 3)).sum() == 12
    elif name == "wanda":
        assert (mask.sum(0) == 24 - 14).all()
    else:
        assert mask.sum() == 192 - 115
    assert not np.asarray(found.w)[~mask].any()
    # The error adds up squares in float32 on the way, and takes the damping off.
    wanted = posttrain.layer_error(w, found.w, inputs.gram)
    np.testing.assert_allclose(found.error, wanted, rtol=2e-3)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, None], ids=["50 %", "70 %", "2:4"])
def test_order_of_layer_errors(sparsity, layer):
    structure = jp.NM(2, 4) if sparsity is None else jp.Unstructured()
    w, inputs = layer(96, 24)
    found = {n: s.solve(w, inputs, sparsity, structure) for n, s in BY_OUTPUT.items()}
    error = {n: float(f.error) for n, f in found.items()}
    assert error["sparsegpt"] < error["wanda"] < error["magnitude"]
    assert error["alps"] < error["sparsegpt"]
    for name, solution in found.items():
        refit = posttrain.refit(w, solution.mask, inputs)
        assert float(refit.error) <= error[name] * (1 + 1e-4)
        np.testing.assert_array_equal(refit.mask, solution.mask)
    best = posttrain.refit(w, found["sparsegpt"].mask, inputs)
    assert float(best.error) < 0.9 * error["sparsegpt"]


@pytest.mark.parametrize("nm", [False, True], ids=["50 %", "2:4"])
def test_nothing_beats_brute_force(nm, layer):
    w, inputs = layer(8, 3)
    gram = np.asarray(inputs.gram, np.float64)
    structure = jp.NM(2, 4) if nm else jp.Unstructured()
    total = 0.0
    for column in np.asarray(w, np.float64).T:
        errors = []
        for keep in map(list, itertools.combinations(range(8), 4)):
            if nm and sum(k < 4 for k in keep) != 2:
                continue
            v = np.zeros(8)
            v[keep] = np.linalg.solve(gram[np.ix_(keep, keep)], gram[keep] @ column)
            errors.append((v - column) @ gram @ (v - column))
        total += min(errors)
    sparsity = None if nm else 0.5
    solvers = {n: s.solve for n, s in BY_OUTPUT.items()} | {"obs": posttrain.obs}
    for solve in solvers.values():
        found = solve(w, inputs, sparsity, structure)
        refit = posttrain.refit(w, found.mask, inputs)
        assert (
            total * (1 - 1e-3) <= float(refit.error) <= float(found.error) * (1 + 1e-3)
        )


def test_refit_is_least_squares(layer):
    w, inputs = layer(20, 5)
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, w.shape)
    found = posttrain.refit(w, mask, inputs)
    gram = np.asarray(inputs.gram, np.float64)
    wanted = np.zeros(w.shape)
    for n in range(5):
        keep = np.flatnonzero(mask[:, n])
        target = gram[keep] @ np.asarray(w[:, n], np.float64)
        wanted[keep, n] = np.linalg.solve(gram[np.ix_(keep, keep)], target)
    np.testing.assert_allclose(found.w, wanted, rtol=1e-3, atol=1e-3)


def test_refit_of_more_inputs_than_rows_fits_exactly(layer):
    w, inputs = layer(48, 4, samples=8)
    mask = jnp.ones_like(w, bool).at[:24].set(False)
    found = posttrain.refit(w, mask, inputs)
    energy = posttrain.layer_error(w, 0 * w, inputs.gram)
    assert float(found.error) < 1e-4 * float(energy)
    assert float(found.damping) >= np.float32(1e-6)


def test_obs_is_greedy(layer):
    w, inputs = layer(10, 3)
    found = posttrain.obs(w, inputs, 0.5)
    gram = np.asarray(inputs.gram, np.float64)
    h = gram + 0.01 * gram.diagonal().mean() * np.eye(10)
    for n in range(3):
        dense = np.asarray(w[:, n], np.float64)
        keep = list(range(10))
        for _ in range(5):
            inverse = np.linalg.inv(h[np.ix_(keep, keep)])
            v = inverse @ (h[keep] @ dense)  # the optimum on what is left
            keep.pop(int(np.argmin(v**2 / inverse.diagonal())))
        v = np.zeros(10)
        v[keep] = np.linalg.solve(h[np.ix_(keep, keep)], h[keep] @ dense)
        np.testing.assert_array_equal(np.flatnonzero(found.mask[:, n]), keep)
        np.testing.assert_allclose(found.w[:, n], v, atol=1e-4)


def test_obs_with_groups_beats_sparsegpt(layer):
    w, inputs = layer(48, 6)
    found = posttrain.obs(w, inputs, None, jp.NM(2, 4))
    assert (np.asarray(found.mask).reshape(12, 4, 6).sum(1) == 2).all()
    sparsegpt = posttrain.sparsegpt().solve(w, inputs, None, jp.NM(2, 4))
    assert float(found.error) < float(sparsegpt.error)


def test_wanda_and_its_variant(layer):
    w, inputs = layer(20, 6)
    scores = np.abs(np.asarray(w)) * np.sqrt(np.asarray(inputs.square))[:, None]
    found = posttrain.wanda().solve(w, inputs, 0.5, jp.Unstructured())
    order = np.argsort(scores, 0)
    np.testing.assert_array_equal(found.mask, np.argsort(order, 0) >= 10)
    found = posttrain.wanda(alpha=True).solve(w, inputs, 0.5, jp.Unstructured())
    mask = np.asarray(found.mask)
    assert mask.sum() == 60 and len(set(mask.sum(0))) > 1
    shares = np.cumsum(np.sort(scores, 0), 0) / scores.sum(0)
    bound = np.sort(shares.ravel())[59]  # alpha
    np.testing.assert_array_equal((~mask).sum(0), (shares <= bound).sum(0))
    assert all(
        scores[:, n][mask[:, n]].min() > scores[:, n][~mask[:, n]].max()
        for n in range(6)
    )


def test_ria_scores(layer):
    w, inputs = layer(12, 6)
    found = posttrain.ria(power=1.0).solve(w, inputs, 0.5, jp.Unstructured())
    size = np.abs(np.asarray(w))
    relative = size / size.sum(0) + size / size.sum(1, keepdims=True)
    scores = relative * np.sqrt(np.asarray(inputs.square))[:, None]
    np.testing.assert_array_equal(found.mask, scores > np.sort(scores.ravel())[35])


@pytest.mark.parametrize("name", SOLVERS)
def test_bfloat16_is_computed_in_float32(name, layer):
    w, inputs = layer(24, 8)
    half = w.astype(jnp.bfloat16)
    found = QUICK[name].solve(half, inputs, 0.5, jp.Unstructured())
    wide = QUICK[name].solve(half.astype(jnp.float32), inputs, 0.5, jp.Unstructured())
    assert found.w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.mask, wide.mask)
    np.testing.assert_array_equal(found.w, wide.w.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", SOLVERS)
def test_stacks_are_solved_one_by_one_also_under_jit(name, layer):
    solver = QUICK[name]
    layers = [layer(24, 8, seed=i) for i in range(4)]
    stack = jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 2, *x[0].shape), *layers)

    @jax.jit
    def solve(w, inputs):
        return solver.solve(w, inputs, 0.5, jp.Unstructured())

    found = solve(*stack)
    for i, (w, inputs) in enumerate(layers):
        one = solver.solve(w, inputs, 0.5, jp.Unstructured())
        part = jax.tree.map(lambda x, i=i: x[i // 2, i % 2], found)
        np.testing.assert_array_equal(part.mask, one.mask)
        np.testing.assert_allclose(part.w, one.w, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(part.error, one.error, rtol=2e-3)


COLLECTIVE = re.compile(
    r"= (\S+) (all-reduce|all-gather|all-to-all|collective-permute)"
)


@pytest.mark.parametrize(
    ("solver", "sparsity", "structure", "most"),
    [
        (posttrain.sparsegpt(block_size=16), None, jp.NM(2, 4), 1),
        (posttrain.sparsegpt(block_size=16, group="output"), 0.5, jp.Unstructured(), 1),
        (posttrain.wanda(), 0.5, jp.Unstructured(), 1),
        (posttrain.sparsegpt(block_size=16), 0.5, jp.Unstructured(), 16),
    ],
    ids=["sparsegpt 2:4", "sparsegpt output", "wanda", "sparsegpt block"],
)
def test_columns_on_eight_devices(solver, sparsity, structure, most, layer):
    w, inputs = layer(48, 64)
    mesh = jax.make_mesh((8,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    over, everywhere = NamedSharding(mesh, P(None, "n")), NamedSharding(mesh, P())
    sharded = jax.device_put(w, over)
    known = jax.device_put(inputs, everywhere)
    one = solver.solve(w, inputs, sparsity, structure)
    run = jax.jit(lambda w, i: solver.solve(w, i, sparsity, structure))
    many = run(sharded, known)
    np.testing.assert_array_equal(one.mask, many.mask)
    np.testing.assert_allclose(one.w, many.w, rtol=1e-4, atol=1e-5)
    assert many.w.sharding.is_equivalent_to(over, 2)
    text = run.lower(sharded, known).compile().as_text()
    found = COLLECTIVE.findall(text)
    assert {kind for _, kind in found} <= {"all-reduce"}
    sizes = [
        math.prod(int(n) for n in extents.split(",") if n)
        for shape, _ in found
        for extents in re.findall(r"\[([\d,]*)\]", shape)
    ]
    # The error is a sum over columns; a threshold for all of them is found by counting.
    assert sizes and max(sizes) <= most


def test_errors_of_inputs(layer):
    w, inputs = layer(16, 4)
    solve = posttrain.sparsegpt().solve
    any_ = jp.Unstructured()
    cases = [
        (inputs._replace(gram=None), "sparsegpt needs 'gram', which was not collected"),
        (inputs._replace(gram=inputs.gram[:8, :8]), r"gram has shape \(8, 8\) beside"),
        (
            inputs._replace(gram=inputs.gram.at[1, 1].set(jnp.nan)),
            "inputs: gram: 1 of 256 values are NaN or infinite",
        ),
        (inputs._replace(gram=0 * inputs.gram), "no row other than 0 was seen"),
        (inputs._replace(count=jnp.float32(0)), "no row other than 0 was seen"),
        (inputs._replace(gram=10 - 9 * jnp.eye(16)), "not positive definite"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            solve(w, bad, 0.5, any_)
    with pytest.raises(ValueError, match="w: 1 of 64 values are NaN"):
        solve(w.at[0, 0].set(jnp.nan), inputs, 0.5, any_)
    with pytest.raises(TypeError, match="expected jaxprune.calibration.Inputs"):
        solve(w, inputs.gram, 0.5, any_)
    with pytest.raises(TypeError, match=r"w: got int32\[2, 2\]; expected floating"):
        solve(jnp.ones((2, 2), jnp.int32), inputs, 0.5, any_)


def test_a_stack_says_which_matrix_was_not_seen(layer):
    layers = [layer(8, 4, seed=i) for i in range(3)]
    w, inputs = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    inputs = inputs._replace(count=inputs.count.at[1].set(0))
    with pytest.raises(ValueError, match=r"of a stack, at \[\[1\]\]"):
        posttrain.wanda().solve(w, inputs, 0.5, jp.Unstructured())


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
def test_what_fails_under_jit_is_nan(name, layer):
    w, inputs = layer(16, 4)
    bad = inputs._replace(gram=inputs.gram.at[0, 1].set(jnp.nan).at[1, 0].set(jnp.nan))
    solve = QUICK[name].solve
    found = jax.jit(lambda w, i: solve(w, i, 0.5, jp.Unstructured()))(w, bad)
    assert jnp.isnan(found.damping) and jnp.isnan(found.error)
    assert jnp.isnan(found.w).all()


def test_alps_damps_more_where_it_must(layer):
    w, inputs = layer(64, 4, samples=8)
    solver = posttrain.alps(damping=1e-12, iterations=30)
    found = solver.solve(w, inputs, 0.5, jp.Unstructured())
    assert 1e-11 < float(found.damping) <= 1e-2
    assert jnp.isfinite(found.w).all() and int(found.mask.sum()) == 128


@pytest.mark.parametrize("name", SOLVERS)
def test_errors_of_structures(name, layer):
    w, inputs = layer(16, 4)
    solve = SOLVERS[name].solve
    with pytest.raises(ValueError, match=r"sparsity: got 0.7 with NM\(n=2, m=4"):
        solve(w, inputs, 0.7, jp.NM(2, 4))
    with pytest.raises(ValueError, match="does not divide axis"):
        solve(w, inputs, None, jp.NM(2, 5))
    with pytest.raises(ValueError, match="sees K on axes"):
        solve(w, inputs, None, jp.NM(2, 4, axis=-1))
    with pytest.raises(TypeError, match="structure: got Channel"):
        solve(w, inputs, 0.5, jp.Channel())
    with pytest.raises(ValueError, match="share of weights to prune"):
        solve(w, inputs, 1.0, jp.Unstructured())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: posttrain.wanda(group="block"), "wanda: got group='block'"),
        (lambda: posttrain.magnitude(group="row"), "'output' is a row of"),
        (lambda: posttrain.ria(power=-1), "ria: got power=-1"),
        (lambda: posttrain.alps(rho=0), "alps: got rho=0"),
        (lambda: posttrain.alps(iterations=0), "alps: got iterations=0"),
        (lambda: posttrain.alps(damping=-1), "alps: got damping=-1"),
    ],
)
def test_errors_of_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_axes_may_be_given_in_any_way(layer):
    w, inputs = layer(16, 4)
    solve = posttrain.wanda().solve
    plain = solve(w, inputs, None, jp.NM(2, 4))
    for axis in (0, (-2,), {"*": -2}):
        found = solve(w, inputs, None, jp.NM(2, 4, axis=axis))
        np.testing.assert_array_equal(found.mask, plain.mask)


def test_errors_of_masks_and_variants(layer):
    w, inputs = layer(16, 4)
    with pytest.raises(TypeError, match="mask: got float32; expected booleans"):
        posttrain.refit(w, w, inputs)
    with pytest.raises(ValueError, match=r"mask: got shape \(4, 4\)"):
        posttrain.refit(w, jnp.ones((4, 4), bool), inputs)
    with pytest.raises(ValueError, match="wanda: alpha=True with NM"):
        posttrain.wanda(alpha=True).solve(w, inputs, None, jp.NM(2, 4))
    with pytest.raises(TypeError, match="obs prunes weight by weight"):
        posttrain.obs(w, inputs, 0.5, jp.Block(2, 2))


def test_solvers_without_a_gram_matrix_know_no_error(layer):
    w, inputs = layer(16, 4)
    known = Inputs(inputs.count, square=inputs.square)
    found = posttrain.wanda().solve(w, known, 0.5, jp.Unstructured())
    assert found.error is None and found.damping is None


def test_ties_go_to_the_lower_input():
    w = jnp.ones((6, 2))
    inputs = Inputs(jnp.float32(1), square=jnp.ones(6))
    found = posttrain.wanda().solve(w, inputs, 0.5, jp.Unstructured())
    np.testing.assert_array_equal(found.mask.T, [[1, 1, 1, 0, 0, 0]] * 2)
