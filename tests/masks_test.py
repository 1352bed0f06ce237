"""Mask trees: packing, counting, comparing, applying."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import masks

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = [(), (0,), (1,), (8,), (9,), (3, 5), (7, 16), (8, 3), (2, 9, 4), (2, 3, 0, 4)]


def _mask(shape, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_and_unpack(shape):
    @settings(max_examples=10)
    @given(hnp.arrays(bool, shape))
    def check(mask):
        packed = masks.pack({"w": jnp.asarray(mask), "b": None})
        assert packed["b"] is None
        np.testing.assert_array_equal(masks.unpack(packed)["w"], mask)
        assert masks.count(packed) == (mask.sum(), mask.size)
        assert masks.pack(packed)["w"] is packed["w"]  # it is packed already

    check()


@pytest.mark.parametrize("shape", [(7,), (16,), (3, 16), (16, 3), (5, 24, 2), (9, 9)])
@pytest.mark.parametrize("axis", [0, -1])
def test_bits_along_a_given_axis(shape, axis):
    axis %= len(shape)
    mask = _mask(shape)
    like = masks.PackedMask(jnp.zeros(()), shape, axis)
    packed = masks.repack(jnp.asarray(mask), like)
    expected = np.packbits(mask, axis=axis, bitorder="little")
    np.testing.assert_array_equal(packed.bits, expected)
    np.testing.assert_array_equal(masks.as_bool(packed), mask)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((), None),
        ((16,), 0),
        ((64, 48), 0),  # not the last
        ((3, 64), 1),  # but the last rather than padding
        ((8, 16, 5), 1),
        ((1001, 7), 0),  # padding of less than a tenth
        ((1000, 1000), 0),
    ],
)
def test_one_bit_a_weight(shape, axis):
    packed = masks.pack_leaf(jnp.asarray(_mask(shape)))
    assert packed.axis == axis
    assert packed.bits.nbytes <= max(1.1 * np.prod(shape) / 8, 1)


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("shape", "spec", "axis"),
    [
        ((64, 24), P("x", None), 0),
        ((64, 24), P(None, "x"), 0),
        ((12, 64), P("x", None), 1),
        ((12, 64), P(None, ("x", "y")), 1),
        ((32, 32), P("x", "y"), 0),
        ((4, 4), P("x", "y"), None),
    ],
    ids=str,
)
def test_sharded_masks(shape, spec, axis, jitted, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    values = _mask(shape)
    with jax.set_mesh(mesh):
        mask = jax.device_put(values, NamedSharding(mesh, spec))
        packed = (jax.jit(masks.pack_leaf) if jitted else masks.pack_leaf)(mask)
        back = (jax.jit(masks.as_bool) if jitted else masks.as_bool)(packed)
        np.testing.assert_array_equal(back, values)
        assert int(masks.count_leaf(packed)) == values.sum()
        if axis_type is AxisType.Explicit:
            assert packed.axis == axis
            assert jax.typeof(packed.bits).sharding.spec == spec
            assert jax.typeof(back).sharding.spec == spec
        elif not jitted:  # without jit the sharding is known on auto meshes too
            assert packed.axis == axis


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_apply(packed, dtype):
    weights = jnp.asarray([[1.0, jnp.nan, -jnp.inf], [-0.0, 2.0, jnp.nan]], dtype)
    keep = np.array([[True, False, False], [False, True, True]])
    tree = {"w": weights, "b": jnp.ones(2), "n": None, "o": jnp.ones(3)}
    found = {"w": jnp.asarray(keep), "b": None, "n": None, "o": optax.MaskedNode()}
    found = masks.pack(found) if packed else found
    once = masks.apply(tree, found)
    values = np.asarray(once["w"], np.float32)
    np.testing.assert_array_equal(values, [[1, 0, 0], [0, 2, np.nan]])
    assert not np.signbit(values[~keep]).any()
    assert once["w"].dtype == dtype
    assert once["b"] is tree["b"] and once["n"] is None and once["o"] is tree["o"]
    twice = np.asarray(masks.apply(once, found)["w"], np.float32)
    np.testing.assert_array_equal(twice, values)


def test_apply_takes_masks_of_another_container():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    found = {"kernel": jnp.eye(4, dtype=bool), "bias": None}
    kernel = masks.apply(params, found)["kernel"][...]
    np.testing.assert_array_equal(kernel, np.diag(np.diag(model.kernel[...])))


@pytest.mark.parametrize("shape", [(), (0,), (2, 9, 4)], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_counts_and_comparisons(shape, seed):
    mask, other = _mask(shape, 0), _mask(shape, seed)
    a = {"x": jnp.asarray(mask), "y": None, "z": (jnp.asarray(other),)}
    b = {"x": jnp.asarray(other), "y": None, "z": (jnp.asarray(other),)}
    flat_a, flat_b = (np.concatenate([x.ravel(), other.ravel()]) for x in (mask, other))
    kept = int(flat_a.sum())
    for left, right in ((a, b), (masks.pack(a), b), (masks.pack(a), masks.pack(b))):
        assert masks.count(left) == (kept, flat_a.size)
        assert masks.sparsity(left) == (1 - kept / flat_a.size if flat_a.size else 0)
        assert masks.flipped(left, right) == (flat_a != flat_b).sum()
        either = (flat_a | flat_b).sum()
        both = (flat_a & flat_b).sum()
        assert masks.overlap(left, right) == (both / either if either else 1)


def test_counts_are_python_integers():
    found = {"w": jnp.ones((2, 3), bool)}
    kept, total = masks.count(found)
    assert type(kept) is int and type(total) is int
    assert type(masks.flipped(found, found)) is int
    assert (masks.count(None), masks.sparsity(None)) == ((0, 0), 0)
    assert masks.overlap(None, None) == 1


def test_masks_pass_through_jit_and_scan():
    packed = masks.pack({"w": jnp.asarray(_mask((6, 10)))})
    assert jax.jit(lambda m: m)(packed)["w"].shape == (6, 10)
    carried, _ = jax.lax.scan(lambda m, _: (m, None), packed, length=2)
    assert masks.flipped(carried, packed) == 0


def test_from_params():
    params = {"kernel": jnp.array([[0.0, jnp.nan], [-0.0, 2]]), "bias": jnp.zeros(2)}
    found = masks.from_params(params)
    assert found["kernel"].tolist() == [[False, True], [False, True]]
    assert found["bias"] is None
    assert masks.from_params(params, "*")["bias"].tolist() == [False, False]


def test_pruned_parameters_give_their_masks_back():
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
    pruned, found = jp.prune(params, 0.7)
    assert masks.flipped(found, masks.from_params(pruned)) == 0


def test_summary():
    params = {
        "norm": {"scale": jnp.ones(4)},
        "out": {"kernel": jnp.ones((100, 20))},
        "hole": None,
        "number": 3.0,
    }
    found = jax.tree.map(lambda _: None, params)
    found["out"]["kernel"] = jnp.arange(2000).reshape(100, 20) < 1500
    table = masks.summary(params, masks.pack(found)).splitlines()
    assert [line.split() for line in table if "-----" not in line] == [
        ["leaf", "shape", "weights", "kept", "sparsity"],
        ["norm/scale", "(4,)", "4", "4", "-"],
        ["out/kernel", "(100,", "20)", "2,000", "1,500", "25.00", "%"],
        ["masked", "2,000", "1,500", "25.00", "%"],
        ["all", "2,004", "1,504", "24.95", "%"],
    ]
    assert len({len(line) for line in table if not line.startswith("norm")}) == 1


PARAMS = {"a": {"kernel": jnp.ones((2, 3))}, "bias": jnp.ones(2)}
GOOD = jnp.ones((2, 3), bool)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"a": {"kernel": GOOD}}, "masks: their structure is not that of params. params "
         "has the leaves a/kernel, bias; masks has a/kernel."),
        ({"a": {"kernel": GOOD, "more": GOOD}, "bias": None}, "masks has a/kernel, a/more"),
        ({"a": {"kernel": GOOD.T}, "bias": None}, "masks: a/kernel has shape (3, 2) but "
         "the weight is float32[2, 3]. Make the masks from these params."),
        ({"a": {"kernel": masks.pack(GOOD.T)}, "bias": None}, "a/kernel has shape (3, 2)"),
        ({"a": {"kernel": jnp.ones((2, 3))}, "bias": None}, "masks: a/kernel is float32[2, "
         "3]; expected a boolean array (True = keep), a packed mask or None. Turn"),
        ({"a": {"kernel": 1.0}, "bias": None}, "masks: a/kernel is of type float; expected"),
    ],
    ids=["missing", "more", "shape", "packed", "dtype", "number"],
)  # fmt: skip
@pytest.mark.parametrize("function", [masks.apply, masks.summary, masks.check])
def test_masks_that_do_not_fit(function, found, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        function(PARAMS, found)


@pytest.mark.parametrize("function", [masks.count, masks.sparsity, masks.pack])
def test_trees_that_are_no_masks(function):
    with pytest.raises(ValueError, match="masks: a/w is float32.*expected a boolean"):
        function({"a": {"w": jnp.ones(3)}})


@pytest.mark.parametrize("function", [masks.flipped, masks.overlap])
def test_masks_that_cannot_be_compared(function):
    a, b = {"w": GOOD}, {"w": GOOD.T}
    with pytest.raises(
        ValueError, match=r"do not match: the shapes at w are .*\(2, 3\)"
    ):
        function(a, b)
    with pytest.raises(ValueError, match="do not match"):
        function(a, {"w": GOOD, "v": GOOD})
    with pytest.raises(ValueError, match="the shapes at x are"):
        function({"x": GOOD, "y": None}, {"x": None, "y": GOOD})


def test_states_that_vmap_has_stacked():
    params = {"kernel": jnp.arange(64.0).reshape(16, 4)}
    tx = jp.masked(optax.sgd(0.1), jp.static(0.5))
    stacked = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, -x, x]), params))
    for read in (jp.get_masks, lambda s: jp.masks.count(s.method.masks)):
        with pytest.raises(ValueError, match=r"jax.vmap\(jaxprune.get_masks\)"):
            read(stacked)
    with pytest.raises(ValueError, match="opt_state: holds 3 states stacked to one"):
        jp.get_info(stacked)
    found = jax.vmap(jp.get_masks)(stacked)["kernel"]
    np.testing.assert_array_equal(found[0], jp.get_masks(tx.init(params))["kernel"])
