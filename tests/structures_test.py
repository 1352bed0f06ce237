"""Structures against loops in NumPy."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _values(shape, seed=0):
    """Small integers: many ties, and sums that are exact in any order."""
    return np.random.default_rng(seed).integers(-6, 7, shape).astype(np.float32)


def _prune(values, sparsity=None, **options):
    tree = {"kernel": jnp.asarray(values)}
    pruned, found = jp.prune(tree, sparsity, where="*", **options)
    mask = np.asarray(found["kernel"])
    again, _ = jp.prune(pruned, sparsity, where="*", **options)
    np.testing.assert_array_equal(again["kernel"], pruned["kernel"])  # idempotent
    return mask


def _best(scores, count):
    """Indices of the largest scores: NaN loses, ties go to the first."""
    order = sorted(
        range(len(scores)),
        key=lambda i: (
            math.isnan(scores[i]),
            0 if math.isnan(scores[i]) else -scores[i],
        ),
    )
    return order[:count]


def _nm_groups(shape, axes, m, stride):
    """Yields the indices of each group, in the order in which groups are numbered."""
    ndim = len(shape)
    axes = [a % ndim for a in ((axes,) if isinstance(axes, int) else axes)]
    rest = [a for a in range(ndim) if a not in axes]
    at = sum(a < min(axes) for a in rest)
    length = math.prod(shape[a] for a in axes)
    spans = [range(shape[a]) for a in rest]
    inner = [range(length // (m * stride)), range(stride)]
    for place in itertools.product(*spans[:at], *inner, *spans[at:]):
        group, lane = place[at], place[at + 1]
        others = (*place[:at], *place[at + 2 :])
        members = []
        for j in range(m):
            flat = (group * m + j) * stride + lane
            index = dict(zip(rest, others, strict=True))
            unravelled = np.unravel_index(flat, [shape[a] for a in axes])
            index |= dict(zip(axes, unravelled, strict=True))
            members.append(tuple(int(index[a]) for a in range(ndim)))
        yield members


def _nm_oracle(scores, n, m, axes, stride, dense=0):
    mask = np.zeros(scores.shape, bool)
    groups = list(_nm_groups(scores.shape, axes, m, stride))
    costs = []
    for members in groups:
        values = [float(scores[i]) for i in members]
        kept = _best(values, n)
        for j in kept:
            mask[members[j]] = True
        costs.append(sum(v for j, v in enumerate(values) if j not in kept))
    for g in _best(costs, dense):
        for index in groups[g]:
            mask[index] = True
    return mask


NM_CASES = [
    # shape, n, m, axis, stride
    ((8, 3), 2, 4, -2, 1),
    ((3, 8), 2, 4, -1, 1),
    ((12, 2), 1, 3, 0, 1),
    ((4, 8, 3), 2, 4, -2, 1),  # stacked layers
    ((8, 2, 3), 2, 4, 0, 1),
    ((16, 3), 2, 4, -2, 2),
    ((2, 24, 3), 1, 4, -2, 3),
    ((2, 2, 4, 3), 2, 4, (0, 1, 2), 1),  # a convolution, flattened
    ((2, 2, 4, 3), 3, 8, (0, 1, 2), 2),
    ((4, 3, 2), 2, 4, (0, 2), 1),  # axes apart
    ((4, 3, 2), 2, 4, (2, 0), 1),  # and in another order
    ((2, 4, 3), 3, 4, (1,), 1),
    ((64, 2), 8, 32, -2, 1),
    ((64, 2), 31, 32, -2, 2),
]


@pytest.mark.parametrize(("shape", "n", "m", "axis", "stride"), NM_CASES)
def test_nm(shape, n, m, axis, stride):
    values = _values(shape)
    structure = jp.NM(n, m, axis=axis, stride=stride)
    mask = _prune(values, structure=structure)
    np.testing.assert_array_equal(mask, _nm_oracle(np.abs(values), n, m, axis, stride))
    assert mask.sum() * m == mask.size * n


@pytest.mark.parametrize(("shape", "n", "m", "axis", "stride"), NM_CASES)
def test_nm_on_the_way(shape, n, m, axis, stride):
    values = _values(shape, 1)
    structure = jp.NM(n, m, axis=axis, stride=stride)
    groups = values.size // m
    share = (m - n) / m
    mask = _prune(values, share * 0.25, structure=structure)
    dense = groups - math.floor(groups * 0.25 + 0.5)
    oracle = _nm_oracle(np.abs(values), n, m, axis, stride, dense)
    np.testing.assert_array_equal(mask, oracle)
    assert mask.sum() == groups * n + dense * (m - n)


@settings(max_examples=30)
@given(
    hnp.arrays(
        np.float32,
        (8, 3),
        elements=st.sampled_from([0, -0.0, 1, 2, math.inf, -math.inf, math.nan]),
    )
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nm_with_nonfinite_scores(dtype, values):
    tree = {"kernel": jnp.ones(values.shape)}
    scores = {"kernel": jnp.asarray(values, dtype)}
    _, found = jp.prune(tree, score=scores, structure=jp.NM(2, 4))
    np.testing.assert_array_equal(found["kernel"], _nm_oracle(values, 2, 4, -2, 1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nm_costs_do_not_overflow_or_lose_digits(dtype):
    # Two groups of 32. The second would lose one 256 more, of a sum of 480,000.
    values = jnp.full((64, 1), 3e4, dtype).at[47:].add(jnp.asarray(256, dtype))
    _, found = jp.prune({"kernel": values}, 0.25, structure=jp.NM(16, 32))
    assert found["kernel"].reshape(2, 32).sum(1).tolist() == [16, 32]


def test_nm_leaves_by_pattern():
    tree = {"a": {"kernel": jnp.asarray(_values((6, 4)))}, "c": jnp.ones((4, 6))}
    axis = {"*": 0, "a/*": -1}
    _, found = jp.prune(tree, structure=jp.NM(2, 4, axis=axis))
    assert found["a"]["kernel"].sum(1).tolist() == [2] * 6
    assert found["c"].sum(0).tolist() == [2] * 6


def test_nm_shares_one_threshold_across_leaves():
    values = {"a": _values((8, 5), 2), "c": _values((16, 3), 3) / 2}
    tree = jax.tree.map(jnp.asarray, values)
    _, found = jp.prune(tree, 0.25, structure=jp.NM(2, 4), allocation="global")
    groups = [
        (name, members)
        for name, x in values.items()
        for members in _nm_groups(x.shape, -2, 4, 1)
    ]
    sizes = [[abs(float(values[name][i])) for i in members] for name, members in groups]
    dense = _best([sum(sorted(s)[:2]) for s in sizes], len(groups) // 2)
    for g, (name, members) in enumerate(groups):
        kept = sum(bool(found[name][i]) for i in members)
        assert kept == (4 if g in dense else 2)


BLOCK_CASES = [
    # shape, rows, cols, axis, out_axis
    ((4, 6), 2, 3, -2, -1),
    ((4, 6), 1, 1, -2, -1),
    ((4, 6), 4, 6, -2, -1),
    ((6, 4), 2, 3, 1, 0),  # Equinox: [out, in]
    ((3, 4, 6), 2, 2, -2, -1),  # stacked layers
    ((2, 3, 4, 6), 6, 3, (0, 1, 2), -1),  # a convolution
    ((2, 3, 4, 6), 2, 3, -2, -1),
    ((4, 2, 3), 2, 3, 0, (1, 2)),
    ((2, 4, 3), 3, 2, (2, 0), 1),
]


def _as_matrix(x, axis, out_axis):
    """`[batch, K, N]`, of any array."""
    k, n = ([a % x.ndim for a in np.atleast_1d(axes)] for axes in (axis, out_axis))
    batch = [a for a in range(x.ndim) if a not in (*k, *n)]
    moved = x.transpose([*batch, *k, *n])
    n_size = math.prod(x.shape[a] for a in n)
    return moved.reshape(-1, math.prod(x.shape[a] for a in k), n_size)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize(("shape", "rows", "cols", "axis", "out_axis"), BLOCK_CASES)
def test_block(shape, rows, cols, axis, out_axis, sparsity):
    values = _values(shape)
    structure = jp.Block(rows, cols, axis=axis, out_axis=out_axis)
    mask = _as_matrix(_prune(values, sparsity, structure=structure), axis, out_axis)
    scores = _as_matrix(np.abs(values), axis, out_axis)
    batch, height, width = scores.shape
    places = list(
        itertools.product(range(batch), range(0, height, rows), range(0, width, cols))
    )
    blocks = [(b, slice(i, i + rows), slice(j, j + cols)) for b, i, j in places]
    kept = len(blocks) - math.floor(len(blocks) * sparsity + 0.5)
    expected = np.zeros_like(mask)
    for i in _best([float(scores[block].sum()) for block in blocks], kept):
        expected[blocks[i]] = True
    np.testing.assert_array_equal(mask, expected)


CHANNEL_CASES = [
    # shape, axis, stack_axes
    ((3, 5), -1, ()),
    ((3, 5), 0, ()),
    ((2, 3, 5), -1, ()),  # one decision for all layers
    ((2, 3, 5), -1, 0),  # one for each
    ((2, 4, 3, 5), -2, (0,)),
    ((2, 4, 3, 5), (1, 2), 0),
    ((7,), 0, ()),
]


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("shape", "axis", "stack_axes"), CHANNEL_CASES)
def test_channel(shape, axis, stack_axes, sparsity):
    values = _values(shape)
    structure = jp.Channel(axis=axis, stack_axes=stack_axes)
    mask = _prune(values, sparsity, structure=structure)
    ndim = len(shape)
    stays = {
        a % ndim for a in (*np.atleast_1d(axis), *np.atleast_1d(stack_axes).astype(int))
    }
    rest = tuple(a for a in range(ndim) if a not in stays)
    sums = np.abs(values).sum(rest)
    kept = sums.size - math.floor(sums.size * sparsity + 0.5)
    expected = np.zeros(sums.shape, bool)
    for i in _best(sums.ravel().tolist(), kept):
        expected.ravel()[i] = True
    expected = np.broadcast_to(np.expand_dims(expected, rest), shape)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("structure", [jp.Block(2, 3), jp.Channel()])
def test_a_nan_loses_its_unit(structure):
    values = np.ones((4, 6), np.float32)
    values[1, 4] = np.nan
    assert not _prune(values, 0.25, structure=structure)[1, 4]


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("spec", [P("x", None), P(None, "x"), P("x", "y")], ids=str)
@pytest.mark.parametrize(
    ("structure", "sparsity"),
    [
        (jp.NM(2, 4), 0.5),
        (jp.NM(2, 4), 0.25),
        (jp.Block(4, 4), 0.5),
        (jp.Channel(), 0.5),
    ],
    ids=str,
)
def test_sharded_leaves_get_the_same_masks(structure, sparsity, spec, axis_type):
    values = _values((32, 32))
    expected = _prune(values, sparsity, structure=structure)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    kernel = jax.device_put(values, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        _, found = jp.prune({"kernel": kernel}, sparsity, structure=structure)
    np.testing.assert_array_equal(found["kernel"], expected)
    assert found["kernel"].sharding.is_equivalent_to(kernel.sharding, 2)


@pytest.mark.parametrize("structure", [jp.Block(2, 2), jp.NM(2, 4), jp.Channel()])
def test_empty_leaves(structure):
    tree = {"a": jnp.zeros((0, 4)), "d": jnp.zeros((4, 0)), "c": jnp.ones((4, 4))}
    _, found = jp.prune(tree, 0.5, structure=structure)
    assert {name: x.shape for name, x in found.items()} == {
        name: x.shape for name, x in tree.items()
    }
    assert found["c"].sum() == 8


@pytest.mark.parametrize(
    ("structure", "sparsity", "shape", "words"),
    [
        (lambda: jp.NM(4, 4), 0, (4, 4), "NM: got n=4, m=4; expected 0 < n < m, where n "
         "weights are kept of every m. NM(2, 4) keeps two of four."),
        (lambda: jp.NM(0, 4), 0, (4, 4), "NM: got n=0; expected a whole number"),
        (lambda: jp.NM("2", 4), 0, (4, 4), "NM: got n='2'; expected a whole number of at"),
        (lambda: jp.NM(2, 4, stride=0), 0, (4, 4), "NM: got stride=0; expected a whole"),
        (lambda: jp.NM(2, 4), 0.5, (6, 4), "layer/kernel: NM(n=2, m=4, axis=-2, stride=1) "
         "does not divide axis (0,) of length 6 (shape (6, 4)); expected a multiple of 4. "
         "Choose another m or axis=, or leave the leaf out with where='!layer/kernel'."),
        (lambda: jp.NM(2, 4, stride=4), 0.5, (8, 4), "expected a multiple of 16"),
        (lambda: jp.NM(2, 4), 0.9, (8, 4), "layer/kernel: sparsity 0.9 contradicts "
         "NM(n=2, m=4, axis=-2, stride=1), which prunes 0.5 of the weights. Ask for "
         "sparsity=0.5, or for another n and m."),
        (lambda: jp.NM(2, 4, axis=2), 0.5, (8, 4), "layer/kernel: NM axis=2 is outside a "
         "leaf of 2 axes. Give its axis by pattern, as in axis={'layer/kernel': 0, '*'"),
        (lambda: jp.NM(2, 4, axis=(0, -2)), 0.5, (8, 4), "layer/kernel: NM axis=(0, -2) "
         "names an axis twice; expected different ones."),
        (lambda: jp.NM(2, 4, axis={"head/*": 0}), 0.5, (8, 4), "layer/kernel: no pattern "
         "of NM axis={'head/*': 0} matches it. Add one, such as '*': -2."),
        (lambda: jp.Block(0, 4), 0.5, (8, 4), "Block: got rows=0; expected a whole"),
        (lambda: jp.Block(3, 2), 0.5, (8, 4), "layer/kernel: Block(rows=3, cols=2, axis=-2,"
         " out_axis=-1) does not divide its shape (8, 4): rows=3 against length 8. Choose "
         "a divisor of 8, or leave the leaf out with where='!layer/kernel'."),
        (lambda: jp.Block(2, 3), 0.5, (8, 4), "cols=3 against length 4"),
        (lambda: jp.Block(2, 2, axis=-1), 0.5, (8, 4), "layer/kernel: Block axis=(1,) and "
         "out_axis=(1,) overlap; expected two different axes of shape (8, 4). Pass"),
        (lambda: jp.Block(2, 2, out_axis=5), 0.5, (8, 4), "Block out_axis=5 is outside"),
        (lambda: jp.Channel(axis=3), 0.5, (8, 4), "layer/kernel: Channel axis=3 is outs"),
        (lambda: jp.Channel(stack_axes=3), 0.5, (8, 4), "Channel stack_axes=3 is outside"),
    ],
)  # fmt: skip
def test_what_cannot_be(structure, sparsity, shape, words):
    tree = {"layer": {"kernel": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=re.escape(words)):
        jp.prune(tree, sparsity, structure=structure())


def test_the_way_out_of_a_message_works():
    tree = {"a": {"kernel": jnp.ones((6, 4))}, "c": {"kernel": jnp.ones((8, 4))}}
    with pytest.raises(ValueError, match="where='!a/kernel'"):
        jp.prune(tree, structure=jp.NM(2, 4))
    _, found = jp.prune(tree, structure=jp.NM(2, 4), where="!a/kernel")
    assert found["a"]["kernel"] is None and found["c"]["kernel"].sum() == 16
