"""SparseGPT against its definition, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import posttrain
from jaxprune.posttrain import _hessian, _selection, _solver, _sparsegpt

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _damped(gram, damping=0.01):
    gram = np.asarray(gram, np.float64)
    return gram + damping * gram.diagonal().mean() * np.eye(len(gram))


def _keep(scores, kept):
    """The `kept` highest of a list, ties to the first."""
    order = np.argsort(-scores.ravel(), kind="stable")
    keep = np.zeros(scores.size, bool)
    keep[order[:kept]] = True
    return keep.reshape(scores.shape)


def _choose(scores, kept, structure, group):
    high, wide = (
        (structure.rows, structure.cols) if isinstance(structure, jp.Block) else (1, 1)
    )
    rows, columns = scores.shape
    units = scores.reshape(rows // high, high, columns // wide, wide).sum((1, 3))
    if group == "output":
        keep = np.stack([_keep(c, kept) for c in units.T], 1)
    else:
        keep = _keep(units, kept)
    return keep.repeat(high, 0).repeat(wide, 1)


def _by_definition(w, gram, kept, structure, group, size):
    """Inverts the Hessian of the rows that are left, row by row."""
    h, w = _damped(gram), np.asarray(w, np.float64).copy()
    rows = len(w)
    if isinstance(structure, jp.NM) and structure.stride > 1:
        order = _selection.group_order(structure, rows)
        plain = jp.NM(structure.n, structure.m)
        new, mask, loss = _by_definition(
            w[order], gram[order][:, order], kept, plain, group, size
        )
        back = np.argsort(order)
        return new[back], mask[back], loss
    inverses = [np.linalg.inv(h[k:, k:]) for k in range(rows)]
    scale = np.array([i[0, 0] for i in inverses])[:, None]
    mask = np.ones(w.shape, bool)
    size = rows if group == "layer" else size
    loss = 0.0
    for k in range(rows):
        if isinstance(structure, jp.NM):
            if k % structure.m == 0:
                group_rows = slice(k, k + structure.m)
                scores = w[group_rows] ** 2 / scale[group_rows]
                mask[group_rows] = _choose(
                    scores, structure.n, jp.Unstructured(), "output"
                )
        elif k % size == 0:
            tile = slice(k, k + size)
            scores = w[tile] ** 2 / scale[tile]
            mask[tile] = _choose(scores, kept[k // size], structure, group)
        error = np.where(mask[k], 0, w[k])
        loss += (error**2 / scale[k]).sum()
        w[k:] -= np.outer(inverses[k][:, 0], error / scale[k])
        w[k] = np.where(mask[k], w[k], 0)
    return w, mask, loss


CASES = {
    "block": (0.5, jp.Unstructured(), "block"),
    "output": (0.6, jp.Unstructured(), "output"),
    "layer": (0.3, jp.Unstructured(), "layer"),
    "2:4": (None, jp.NM(2, 4), "block"),
    "1:3": (None, jp.NM(1, 3), "output"),
    "2:4 stride 3": (None, jp.NM(2, 4, stride=3), "layer"),
    "5:12": (None, jp.NM(5, 12), "block"),
    "blocks": (0.5, jp.Block(2, 3), "block"),
    "blocks by output": (0.5, jp.Block(2, 3), "output"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [4, 10])
def test_equals_its_definition(name, size, layer):
    sparsity, structure, group = CASES[name]
    w, inputs = layer(24, 6)
    solver = posttrain.sparsegpt(group=group, block_size=size)
    found = solver.solve(w, inputs, sparsity, structure)
    height = 24 if group == "layer" else size
    exact = jp.allocation.exact(sparsity or 0)
    kept = np.asarray(_selection.counts(w.shape, height, exact, structure, group).lo)
    new, mask, loss = _by_definition(w, inputs.gram, kept, structure, group, size)
    np.testing.assert_array_equal(found.mask, mask)
    # Float32 against float64, through a condition number of some hundreds.
    np.testing.assert_allclose(found.w, new, atol=2e-4)
    added = 0.01 * float(inputs.square.mean())
    change = new - np.asarray(w)
    np.testing.assert_allclose(found.error, loss - added * (change**2).sum(), rtol=2e-3)


@pytest.mark.parametrize("group", ["block", "output", "layer"])
def test_loss_is_the_damped_quadratic_form(group, layer):
    # Twice what the authors call the loss: they halve the squares.
    w, inputs = layer(40, 16)
    factored = _hessian.factor(inputs.gram, 0.01)
    half = jp.allocation.exact(0.5)
    kept = _selection.counts(
        w.shape, 40 if group == "layer" else 16, half, jp.Unstructured(), group
    )
    change, _, loss = jax.jit(
        lambda w: _sparsegpt.prune_rows(
            w, factored, kept, structure=jp.Unstructured(), group=group, block_size=16
        )
    )(w)
    change = np.asarray(change, np.float64)
    form = np.einsum("kn,kl,ln->", change, _damped(inputs.gram), change)
    np.testing.assert_allclose(loss, form, rtol=1e-4)


def test_factor_is_the_root_of_the_damped_matrix(layer):
    _, inputs = layer(300, 1)
    lower = np.asarray(_hessian.factor(inputs.gram, 0.01).lower, np.float64)
    assert not np.triu(lower, 1).any()
    damped = _damped(inputs.gram)
    np.testing.assert_allclose(lower.T @ lower, damped, atol=1e-5 * damped.max())


@pytest.mark.parametrize("size", [17, 32, 100, 300])
def test_factors_panel_by_panel(size, monkeypatch):
    monkeypatch.setattr(_hessian, "_LEAF", 16)
    monkeypatch.setattr(_hessian, "_HALVED", 16)
    x = np.random.default_rng(0).normal(size=(2, size + 50, size)).astype(np.float32)
    h = jnp.asarray(x.mT @ x) / size
    lower = jax.vmap(_hessian.cholesky)(h)
    assert lower.shape == h.shape
    assert not np.triu(lower, 1).any()
    assert (np.diagonal(lower, axis1=1, axis2=2) > 0).all()
    wide = np.asarray(lower, np.float64)
    np.testing.assert_allclose(wide.mT @ wide, h, atol=1e-5)
    for at in (0, size // 2, size - 1):
        not_definite = h[0].at[at, at].set(-1)
        assert np.isnan(_hessian.cholesky(not_definite)[0, 0])


def test_results_do_not_change_with_the_scale_of_the_inputs(layer):
    w, inputs = layer(32, 8)
    gram = inputs.gram.at[3].set(0).at[:, 3].set(0)
    solver = posttrain.sparsegpt(block_size=16)
    one, other = (
        solver.solve(w, inputs._replace(gram=scale * gram), 0.5, jp.Unstructured())
        for scale in (1.0, 1024.0)
    )
    np.testing.assert_array_equal(one.mask, other.mask)
    np.testing.assert_allclose(one.w, other.w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(1024 * one.error, other.error, rtol=1e-4)


def test_dead_inputs_get_no_weights_and_do_not_count(layer):
    w, inputs = layer(24, 8)
    dead = np.array([0, 5, 23])
    gram = inputs.gram.at[dead].set(0).at[:, dead].set(0)
    found = posttrain.sparsegpt(block_size=8).solve(
        w, inputs._replace(gram=gram), 0.25, jp.Unstructured()
    )
    assert not np.asarray(found.w)[dead].any()
    assert int(found.mask.sum()) == 24 * 8 * 3 // 4
    live = np.setdiff1d(np.arange(24), dead)
    assert np.asarray(found.w)[live].any(1).all()
    wanted = posttrain.layer_error(w, found.w, gram)
    np.testing.assert_allclose(found.error, wanted, rtol=1e-3)


def test_one_program_for_every_sparsity(layer):
    w, inputs = layer(32, 8)
    solver = posttrain.sparsegpt(block_size=16)
    solver.solve(w, inputs, 0.5, jp.Unstructured())
    before = _solver._solve._cache_size()
    found = solver.solve(w, inputs, 0.75, jp.Unstructured())
    assert _solver._solve._cache_size() == before and int(found.mask.sum()) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "row"}, "sparsegpt: got group='row'; expected 'block' | 'output'"),
        ({"damping": 0.0}, r"sparsegpt: got damping=0.0; expected a positive number"),
        ({"block_size": 0}, "sparsegpt: got block_size=0; expected at least 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        posttrain.sparsegpt(**options)


def test_a_block_must_fit_the_block_size(layer):
    w, inputs = layer(24, 8)
    with pytest.raises(ValueError, match="block_size=16 is no multiple of the rows"):
        posttrain.sparsegpt(block_size=16).solve(w, inputs, 0.5, jp.Block(3, 2))


@pytest.mark.parametrize(
    ("damping", "wanted"),
    [(0.01, [0.01, 0.1, 1]), (0.02, [0.02, 0.2, 1]), (1, [1]), (3, [3])],
)
def test_damping_ends_at_the_mean(damping, wanted):
    np.testing.assert_allclose(_hessian.escalation(damping), wanted, rtol=1e-6)


def test_damping_grows_until_the_factor_is_there(layer):
    w, inputs = layer(64, 8, samples=8)
    found = posttrain.sparsegpt(damping=1e-12).solve(w, inputs, 0.5, jp.Unstructured())
    assert 1e-11 < float(found.damping) <= 1e-2
    assert jnp.isfinite(found.w).all() and int(found.mask.sum()) == 256
    steady = posttrain.sparsegpt().solve(w, inputs, 0.5, jp.Unstructured())
    assert float(steady.damping) == np.float32(0.01)
