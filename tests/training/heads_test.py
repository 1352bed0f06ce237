"""Tests of which attention heads are dropped and how they are folded into others."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxprune.training import _heads

pytestmark = pytest.mark.usefixtures("quick_compilation")

find = jax.jit(_heads.find_dominating)
kept_heads = jax.jit(_heads.kept_heads)
fold_heads = jax.jit(_heads.fold_heads)


def _paper(similar):
    """FIND_DOMINATING as the paper writes it, in plain Python."""
    k = len(similar)
    dominating = [[int(i == j) for j in range(k)] for i in range(k)]
    for i in range(k):
        best = i
        for j in range(k):
            s = [similar[best][m] - similar[j][m] for m in range(k)]
            larger = 1 not in s and -1 in s
            later = not any(s) and best < j
            if larger or later:
                best = j
        dominating[i][best] = 1
    return dominating


def _graph(k, edges):
    """Symmetric with ones on the diagonal; `edges` are the pairs above it."""
    similar = np.eye(k, dtype=int)
    for (i, j), edge in zip(itertools.combinations(range(k), 2), edges, strict=True):
        similar[i, j] = similar[j, i] = edge
    return similar


def _random_graph(seed, k, probability):
    rng = np.random.default_rng(seed)
    return _graph(k, rng.random(k * (k - 1) // 2) < probability)


def _check(similar):
    """Equal to the paper's, and the invariants that make folding at once safe."""
    dominating = np.asarray(find(jnp.asarray(similar, bool)))
    np.testing.assert_array_equal(dominating, np.array(_paper(similar.tolist()), bool))
    kept = np.asarray(kept_heads(jnp.asarray(dominating)))
    others = dominating & ~np.eye(len(similar), dtype=bool)
    assert kept.any()
    assert (similar[:, kept] > 0).any(1).all()  # the kept heads dominate all
    assert (others.sum(1) == ~kept).all()  # one stand-in for each removed head
    assert (similar[others] == 1).all()  # which is similar to it
    assert kept[np.nonzero(others)[1]].all()  # and kept itself


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("k", [1, 6, 12])
def test_random_graphs_agree_with_the_paper(k, probability):
    for seed in range(20):
        _check(_random_graph(seed, k, probability))


def test_all_graphs_of_four_heads_agree_with_the_paper():
    for edges in itertools.product([0, 1], repeat=6):
        _check(_graph(4, edges))


@hypothesis.settings(deadline=None, max_examples=100, derandomize=True)
@hypothesis.given(st.lists(st.booleans(), min_size=28, max_size=28))
def test_graphs_of_eight_heads_agree_with_the_paper(edges):
    _check(_graph(8, edges))


def test_large_layer_agrees_with_the_paper():
    similar = _random_graph(0, 128, 0.02)
    groups = np.arange(128) // 8
    similar |= groups[:, None] == groups[None, :]
    _check(similar)


def test_latest_of_equal_heads_is_kept():
    dominating = find(jnp.ones((5, 5), bool))
    np.testing.assert_array_equal(kept_heads(dominating), [0, 0, 0, 0, 1])


def test_hub_of_a_star_is_kept():
    star = jnp.eye(5, dtype=bool).at[1, :].set(True).at[:, 1].set(True)
    np.testing.assert_array_equal(kept_heads(find(star)), [0, 1, 0, 0, 0])


def test_nothing_similar_removes_nothing():
    own = jnp.eye(4, dtype=bool)
    np.testing.assert_array_equal(find(own), own)
    assert kept_heads(own).all()


def test_diagonal_counts_as_similar():
    similar = jnp.asarray(_random_graph(3, 9, 0.4), bool)
    without = similar & ~jnp.eye(9, dtype=bool)
    np.testing.assert_array_equal(find(without), find(similar))


def test_find_dominating_under_vmap():
    graphs = jnp.stack([jnp.asarray(_random_graph(s, 9, 0.5), bool) for s in range(4)])
    wanted = jnp.stack([find(graph) for graph in graphs])
    np.testing.assert_array_equal(jax.vmap(_heads.find_dominating)(graphs), wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distance_is_the_largest_difference_over_all_parts(dtype):
    rng = np.random.default_rng(0)
    shapes = [(6, 5, 3), (6, 5, 2), (6,)]
    parts = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    distance = jax.jit(_heads.head_distance)(parts)
    assert distance.dtype == jnp.float32
    flat = [np.asarray(part, np.float32).reshape(6, -1) for part in parts]
    whole = np.concatenate(flat, axis=1)
    wanted = np.abs(whole[:, None] - whole[None]).max(-1)
    np.testing.assert_array_equal(distance, wanted)


def test_distance_to_a_head_with_nan_is_nan():
    part = jnp.array([[1.0, 2.0], [jnp.nan, 2.0], [1.0, 5.0]])
    distance = _heads.head_distance([part])
    np.testing.assert_array_equal(np.isnan(distance), [[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    assert distance[0, 2] == 3


def test_distance_needs_no_temporary_of_all_pairs():
    part = jax.ShapeDtypeStruct((32, 64, 64), jnp.float32)
    compiled = jax.jit(_heads.head_distance).lower([part]).compile()
    # All pairs would take 32 times the part.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * 32 * 64 * 64 * 4


@jax.jit
def _attention(x, query, key, value, out):
    """Heads of `[k, d, n]`, and an output projection `[k, n, d]`."""
    q, k, v = (jnp.einsum("td,hdn->htn", x, w) for w in (query, key, value))
    scores = jax.nn.softmax(jnp.einsum("htn,hsn->hts", q, k), axis=-1)
    return jnp.einsum("hts,hsn,hnd->td", scores, v, out)


def _duplicated_heads():
    """Four heads, of which 0, 2 and 3 are the same up to their output projection."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (7, 12))
    parts = [
        jax.random.normal(key, (2, 12, 3))[jnp.array([0, 1, 0, 0])] for key in keys[1:4]
    ]
    return x, parts, jax.random.normal(keys[4], (4, 3, 12))


def test_folding_equal_heads_keeps_the_function():
    x, parts, out = _duplicated_heads()
    dominating = find(_heads.head_distance(parts) <= 0)
    kept = kept_heads(dominating)
    np.testing.assert_array_equal(kept, [False, True, False, True])
    folded = fold_heads(out, dominating)
    np.testing.assert_array_equal(folded[~kept], 0)
    whole = _attention(x, *parts, out)
    # Float32 sums of 4 heads instead of 2, of values near 10.
    masked = _attention(x, *parts, folded)
    np.testing.assert_allclose(masked, whole, atol=1e-4)
    shrunk = _attention(x, *(part[kept] for part in parts), folded[kept])
    np.testing.assert_allclose(shrunk, whole, atol=1e-4)
    dropped = _attention(x, *parts, jnp.where(kept[:, None, None], out, 0))
    assert jnp.abs(dropped - whole).max() > 1  # so the fold did something


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_fold_equals_a_product_of_matrices(seed, dtype):
    dominating = find(jnp.asarray(_random_graph(seed, 8, 0.7), bool))
    kept = kept_heads(dominating)
    assert not kept.all()
    others = np.asarray(dominating) & ~np.eye(8, dtype=bool)
    goes_to = np.where(kept, np.arange(8), others.argmax(1))
    matrix = np.eye(8)[:, goes_to]  # at [j, i]: head i goes to head j
    out = jax.random.normal(jax.random.key(seed), (8, 3, 5)).astype(dtype)
    folded = fold_heads(out, dominating)
    assert folded.dtype == dtype
    exact = np.einsum("ji,ind->jnd", matrix, np.asarray(out, np.float64))
    # One rounding to the dtype, after float32 sums of at most 8 numbers.
    np.testing.assert_allclose(
        np.asarray(folded, np.float64), exact, rtol=jnp.finfo(dtype).eps, atol=1e-6
    )


def test_fold_of_nothing_is_the_identity():
    out = jax.random.normal(jax.random.key(0), (8, 3, 5))
    own = jnp.eye(8, dtype=bool)
    np.testing.assert_array_equal(fold_heads(out, own), out)


def test_nan_stays_in_its_own_heads():
    out = jnp.ones((3, 1, 2)).at[0].set(jnp.nan)
    dominating = jnp.array([[1, 0, 1], [0, 1, 0], [0, 0, 1]], bool)
    folded = fold_heads(out, dominating)
    np.testing.assert_array_equal(folded[:, 0, 0], [0, 1, jnp.nan])


def test_paper_fold_adds_columns_of_the_transposed_matrix():
    l_in = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    dominating = np.array(_paper(_random_graph(1, 4, 0.7).tolist()), bool)
    paper = l_in.T.copy()  # [ff, d]
    for i in range(4):
        partners = [j for j in range(4) if j != i and dominating[i, j]]
        for j in partners:
            paper[:, 3 * j : 3 * j + 3] += l_in.T[:, 3 * i : 3 * i + 3]
        if partners:
            paper[:, 3 * i : 3 * i + 3] = 0
    assert (paper == 0).any()
    folded = _heads.fold_into_mlp(jnp.asarray(l_in), jnp.asarray(dominating))
    np.testing.assert_allclose(folded, paper.T, rtol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [jax.P("x", None, None), jax.P(None, "x", None), jax.P(None, None, "x")],
    ids=str,
)
def test_whole_step_on_an_explicit_mesh(spec):
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, spec)

    def step(out):
        similar = _heads.head_distance([out, out]) <= 0.1
        return _heads.fold_heads(out, _heads.find_dominating(similar))

    with jax.sharding.use_abstract_mesh(mesh):
        out = jax.ShapeDtypeStruct((4, 8, 6), jnp.float32, sharding=sharding)
        folded = jax.eval_shape(jax.jit(step), out)
    assert folded.sharding.spec == spec


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (jnp.ones((2, 3)), TypeError, r"parts is one array.*\(2, 3\).*\[kernel\]"),
        ([], ValueError, "parts is empty.*query, key, value"),
        (
            [jnp.ones((2, 3)), jnp.ones((4, 3))],
            ValueError,
            r"parts\[1\] has shape \(4, 3\).*\(2, 3\).*number of heads.*moveaxis",
        ),
        ([jnp.ones(())], ValueError, r"parts\[0\] has shape \(\)"),
        ([jnp.ones((2, 3), int)], TypeError, r"parts\[0\] has dtype int32.*Cast"),
    ],
    ids=["bare-array", "empty", "unlike-heads", "scalar", "integers"],
)
def test_bad_parts_are_refused(parts, error, message):
    with pytest.raises(error, match=message):
        _heads.head_distance(parts)


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (_heads.find_dominating, "similar"),
        (_heads.kept_heads, "dominating"),
        (functools.partial(_heads.fold_heads, jnp.ones((2, 1, 3))), "dominating"),
        (functools.partial(_heads.fold_into_mlp, jnp.ones((4, 3))), "dominating"),
    ],
    ids=["find", "kept", "fold", "mlp"],
)
def test_bad_relation_is_refused(f, name):
    with pytest.raises(TypeError, match=f"{name} has dtype float32; wanted bool"):
        f(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\).*jax.vmap"):
        f(jnp.ones((2, 3), bool))


def test_output_projection_of_another_shape_is_refused():
    own = jnp.eye(2, dtype=bool)
    with pytest.raises(ValueError, match=r"out has shape \(6, 4\).*\(2, head_dim, d\)"):
        _heads.fold_heads(jnp.ones((6, 4)), own)
    with pytest.raises(ValueError, match=r"out has shape \(3, 2, 4\).*reshape"):
        _heads.fold_heads(jnp.ones((3, 2, 4)), own)
    with pytest.raises(TypeError, match="out has dtype int32"):
        _heads.fold_heads(jnp.ones((2, 2, 4), int), own)


def test_mlp_kernel_that_does_not_divide_is_refused():
    own = jnp.eye(2, dtype=bool)
    with pytest.raises(ValueError, match=r"l_in has shape \(5, 4\).*2 heads.*multiple"):
        _heads.fold_into_mlp(jnp.ones((5, 4)), own)
    with pytest.raises(ValueError, match=r"l_in has shape \(4,\)"):
        _heads.fold_into_mlp(jnp.ones(4), own)
    with pytest.raises(TypeError, match="l_in has dtype int32"):
        _heads.fold_into_mlp(jnp.ones((4, 4), int), own)
