"""Trees packed leaf by leaf: what is chosen, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.formats import BitmapArray, BlockSparseArray, NMArray

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _leaf(i, shape=(128, 64)):
    return jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)


def test_the_smallest_of_what_fits():
    params = {n: _leaf(i) for i, n in enumerate(("nm", "blocks", "bitmap", "dense"))}
    params |= {
        "stack": _leaf(9, (3, 64, 64)),
        "bias": _leaf(8, (64,)),
        "free": _leaf(7),
    }
    masks = dict.fromkeys(params)
    for name, sparsity, structure in (
        ("nm", 0.5, jp.NM(2, 4)),
        ("blocks", 0.9, jp.Block(16, 16)),
        ("bitmap", 0.9, jp.Unstructured()),
        ("dense", 0.01, jp.Unstructured()),
        ("stack", 0.75, jp.NM(1, 4)),
    ):
        only = {"k": params[name]}
        found = jp.prune(only, sparsity=sparsity, structure=structure)[1]["k"]
        masks[name] = jp.masks.pack_leaf(found) if name == "nm" else found
    masks["bias"] = jnp.arange(64) < 8
    packed = jp.formats.pack_tree(params, masks)
    assert isinstance(packed["nm"], NMArray) and (packed["nm"].n, packed["nm"].m) == (
        2,
        4,
    )
    assert isinstance(packed["blocks"], BlockSparseArray)
    assert packed["blocks"].block == (16, 16)
    assert isinstance(packed["bitmap"], BitmapArray)
    assert isinstance(packed["stack"], NMArray) and packed["stack"].n == 1
    for name in ("dense", "bias", "free"):
        assert isinstance(packed[name], jax.Array)
    assert packed["free"] is params["free"]
    pruned = jp.masks.apply(params, masks)
    jax.tree.map(np.testing.assert_array_equal, jp.formats.unpack_tree(packed), pruned)


def test_one_structure_or_one_for_each_pattern():
    params = {"a": _leaf(0), "b": {"kernel": _leaf(1)}}
    masks = jax.tree.map(lambda x: jnp.arange(128)[:, None] % 4 < jnp.ones(64), params)
    packed = jp.formats.pack_tree(params, masks, jp.Unstructured())
    assert isinstance(packed["a"], BitmapArray)
    packed = jp.formats.pack_tree(
        params, masks, {"*": jp.Block(8, 8), "b/*": jp.NM(1, 4)}
    )
    assert isinstance(packed["a"], BlockSparseArray)
    assert isinstance(packed["b"]["kernel"], NMArray)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"a": jp.NM(2, 4), "c": jp.NM(2, 4)}, "structure: the pattern 'c' matches no"),
        ({"a": jp.NM(2, 4)}, "structure: no pattern of .* matches b, which has a mask"),
        (jp.NM(1, 4), "a: mask: it keeps 2 weights of a group of 4"),
    ],
    ids=["no leaf", "no pattern", "does not fit"],
)
def test_what_does_not_fit(structure, message):
    params = {"a": _leaf(0), "b": _leaf(1)}
    masks = jax.tree.map(
        lambda x: jnp.arange(128)[:, None] % 4 < 2 * jnp.ones(64), params
    )
    with pytest.raises(ValueError, match=message):
        jp.formats.pack_tree(params, masks, structure)


@pytest.mark.parametrize("dtype", ["int2", "int4", "uint4", "float4_e2m1fn"])
def test_types_narrower_than_a_byte(dtype):
    w = jax.random.randint(jax.random.key(0), (64, 32), -2, 2).astype(dtype)
    mask = jnp.broadcast_to(jnp.arange(64)[:, None] % 4 < 2, w.shape)
    packed = jp.formats.pack_tree({"k": w}, {"k": mask})["k"]
    assert isinstance(packed, NMArray) and packed.dtype == dtype
    back = np.asarray(jp.formats.unpack(packed))
    np.testing.assert_array_equal(back, np.where(mask, w, np.zeros((), w.dtype)))


def test_types_without_groups_are_packed_in_other_formats():
    w = jnp.full((64, 32), 1 + 2j)
    mask = jnp.broadcast_to(jnp.arange(64)[:, None] % 4 < 2, w.shape)
    packed = jp.formats.pack_tree({"k": w}, {"k": mask})["k"]
    assert isinstance(packed, BitmapArray)
    np.testing.assert_array_equal(jp.formats.unpack(packed), np.where(mask, w, 0))


def test_the_smallest_is_not_looked_for_under_jit():
    tree = {"k": jnp.ones((8, 4))}
    with pytest.raises(
        ValueError, match=r"structure: got None under jax.jit, .*Pass it"
    ):
        jax.jit(jp.formats.pack_tree)(tree, {"k": tree["k"] > 0})
