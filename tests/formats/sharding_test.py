"""Sharded weights are packed where they lie, in the same parts as on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.formats import pack, unpack

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESHES = [
    pytest.param(AxisType.Explicit, id="explicit"),
    pytest.param(AxisType.Auto, id="auto"),
]
STRUCTURES = {"nm": jp.NM(2, 4), "blocks": jp.Block(8, 8), "any": jp.Unstructured()}
K, N = 64, 32
CASES = {
    "rows": ((K, N), P("data"), (2, 1)),
    "columns": ((K, N), P(None, "model"), (1, 4)),
    "both": ((K, N), P("data", "model"), (2, 4)),
    "two axes of the mesh": ((K, N), P(("data", "model")), (8, 1)),
    "experts": ((4, K, N), P("model", None, "data"), (1, 2)),
}
# 24 rows on 8 devices: 3 each, which hold no whole groups or blocks.
STRADDLING = (24, N), P(("data", "model"))


@functools.cache
def make(structure, shape):
    w = jax.random.normal(jax.random.key(0), shape)
    return w, jp.prune({"w": w}, 0.5, structure=STRUCTURES[structure])[1]["w"]


def place(kind, spec, *arrays):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    return jax.device_put(arrays, NamedSharding(mesh, spec))


def collectives(f, *operands):
    text = jax.jit(f).lower(*operands).compile().as_text()
    assert "ENTRY" in text
    return re.findall(r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text)


@pytest.mark.parametrize(
    ("structure", "case", "kind"),
    [
        *[(s, "both", AxisType.Explicit) for s in STRUCTURES],
        *[(s, "experts", AxisType.Auto) for s in STRUCTURES],
        ("blocks", "rows", AxisType.Auto),
        ("blocks", "columns", AxisType.Explicit),
        ("any", "two axes of the mesh", AxisType.Explicit),
    ],
)
def test_a_weight_is_packed_where_it_lies(structure, case, kind):
    shape, spec, parts = CASES[case]
    plain, kept = make(structure, shape)
    w, mask = place(kind, spec, plain, kept)
    packed = pack(w, mask, STRUCTURES[structure])
    alone = pack(plain, kept, STRUCTURES[structure], parts=parts)
    assert packed.layout.parts == parts and packed.shape == shape
    jax.tree.map(np.testing.assert_array_equal, packed, alone)
    for x in jax.tree.leaves(packed):
        held = x.sharding.shard_shape(x.shape)
        assert held[len(shape) - 2 : len(shape)] == (1, 1)  # a part
        assert held[len(shape) :] == x.shape[len(shape) :]
    back = unpack(packed)
    assert back.sharding.is_equivalent_to(w.sharding, w.ndim)
    np.testing.assert_array_equal(back, np.where(kept, plain, 0))
    np.testing.assert_array_equal(unpack(alone), back)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_moves(structure):
    shape, spec, _ = CASES["both"]
    w, mask = place(AxisType.Explicit, spec, *make(structure, shape))
    packed = pack(w, mask, STRUCTURES[structure])
    capacity = None if structure == "nm" else packed.capacity

    def again(w, mask):
        return pack(w, mask, STRUCTURES[structure], capacity=capacity)

    assert collectives(again, w, mask) == []
    assert collectives(unpack, packed) == []
    jax.tree.map(np.testing.assert_array_equal, jax.jit(again)(w, mask), packed)


@pytest.mark.parametrize("structure", ["nm", "blocks"])
def test_groups_that_straddle_shards_are_brought_together(structure):
    shape, spec = STRADDLING
    plain, kept = make(structure, shape)
    w, mask = place(AxisType.Explicit, spec, plain, kept)
    packed = pack(w, mask, STRUCTURES[structure])
    assert packed.layout.parts is None
    assert not any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(packed))
    np.testing.assert_array_equal(unpack(packed), np.where(kept, plain, 0))
    capacity = None if structure == "nm" else packed.capacity
    moved = collectives(
        lambda w, m: pack(w, m, STRUCTURES[structure], capacity=capacity), w, mask
    )
    assert moved == ["all-gather"] * 2  # the weight and its mask


@pytest.mark.parametrize("kind", MESHES)
def test_axes_that_are_flattened(kind):
    """Of heads and their width only the first may be sharded; the other is made whole."""
    plain = jax.random.normal(jax.random.key(0), (32, 4, 16))
    structure = jp.NM(2, 4, axis=0)
    kept = structure.best("w", jnp.abs(plain))
    for spec, parts in ((P(None, "model"), (1, 4)), (P(None, None, "model"), None)):
        w, mask = place(kind, spec, plain, kept)
        packed = pack(w, mask, structure)
        assert packed.layout.parts == parts
        np.testing.assert_array_equal(unpack(packed), np.where(kept, plain, 0))
        if parts:
            assert unpack(packed).sharding.is_equivalent_to(w.sharding, 3)


@pytest.mark.parametrize("kind", MESHES)
def test_one_shard_is_packed_whole(kind):
    """Axes of a mesh that have one device divide nothing."""
    plain, kept = make("nm", (K, N))
    mesh = jax.make_mesh((1, 8), ("data", "model"), axis_types=(kind,) * 2)
    w, mask = jax.device_put((plain, kept), NamedSharding(mesh, P("data")))
    packed = pack(w, mask, jp.NM(2, 4))
    assert packed.layout.parts is None
    np.testing.assert_array_equal(unpack(packed), np.where(kept, plain, 0))


@pytest.mark.parametrize("explicit", [0, 1])
def test_a_mesh_of_both_kinds(explicit):
    plain, kept = make("nm", (K, N))
    kinds = [AxisType.Auto] * 2
    kinds[explicit] = AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=tuple(kinds))
    w, mask = jax.device_put((plain, kept), NamedSharding(mesh, P("data", "model")))
    packed = pack(w, mask, jp.NM(2, 4))
    assert packed.layout.parts == (2, 4)
    back = unpack(packed)
    assert back.sharding.is_equivalent_to(w.sharding, w.ndim)
    np.testing.assert_array_equal(back, np.where(kept, plain, 0))


def test_parts_move_to_another_mesh():
    """What was packed on eight devices goes on with two, or one."""
    shape, spec, _ = CASES["rows"]
    plain, kept = make("blocks", shape)
    packed = pack(
        *place(AxisType.Explicit, P(("data", "model")), plain, kept), jp.Block(8, 8)
    )
    assert packed.layout.parts == (8, 1)
    small = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), packed)
    moved = jax.device_put(packed, NamedSharding(small, P("data")))
    for same in (alone, moved):
        np.testing.assert_array_equal(unpack(same), np.where(kept, plain, 0))
    assert unpack(moved).sharding.spec[0] == "data"


@pytest.mark.parametrize("structure", STRUCTURES)
def test_values_and_gradients_of_parts(structure):
    shape, spec, _ = CASES["both"]
    plain, kept = make(structure, shape)
    w, mask = place(AxisType.Explicit, spec, plain, kept)
    packed = {"w": pack(w, mask, STRUCTURES[structure])}
    found = jp.formats.value_masks(packed, {"w": mask})["w"]
    assert jax.typeof(found).sharding.spec[:2] == ("data", "model")
    assert int(found.sum()) == int(kept.sum())

    def loss(values):
        return jnp.sum(jnp.sin(unpack(jp.formats.with_values(packed, values)["w"])))

    with jax.set_mesh(w.sharding.mesh):
        gradient = jax.grad(loss)(jp.formats.values(packed))["w"]
    wanted = jp.formats.with_values(packed, {"w": gradient})
    dense = np.where(kept, unpack(wanted["w"]), 0)
    np.testing.assert_allclose(dense, np.where(kept, np.cos(plain), 0), rtol=1e-6)


def test_more_than_there_is_room_for_in_a_part():
    shape, spec, _ = CASES["both"]
    w, mask = place(AxisType.Explicit, spec, *make("blocks", shape))
    most = pack(w, mask, jp.Block(8, 8)).capacity
    with pytest.raises(
        ValueError, match=f"capacity: got 1, but the mask keeps {most} blo"
    ):
        pack(w, mask, jp.Block(8, 8), capacity=1)
    lost = jax.jit(lambda w, m: pack(w, m, jp.Block(8, 8), capacity=1))(w, mask)
    assert jnp.isnan(lost.values).any()


def test_messages():
    w = jnp.ones((24, 8))
    with pytest.raises(ValueError, match=r"parts: got \(4, 1\) for a matrix \[24, 8\]"):
        pack(w, w > 0, jp.NM(2, 4), parts=(4, 1))
    with pytest.raises(ValueError, match=r"parts: got \(0, 1\)"):
        pack(w, w > 0, jp.Unstructured(), parts=(0, 1))
