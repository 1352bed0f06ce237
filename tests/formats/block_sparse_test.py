"""Packed blocks: what goes in comes out, and nothing is lost in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.formats import pack, unpack

pytestmark = pytest.mark.usefixtures("quick_compilation")


@settings(max_examples=15)  # each compiles anew
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4),
    st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(0, 5),
    st.floats(0, 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_unpack_gives_what_was_packed(k, n, rows, cols, dtype, spare, density, seed):
    random = np.random.default_rng(seed)
    special = random.choice([0.0, -0.0, np.nan, np.inf, -np.inf], (k, n))
    numbers = np.where(random.random((k, n)) < 0.3, special, random.normal(size=(k, n)))
    w = jnp.asarray(numbers, dtype)
    mask = jnp.asarray(random.random((k, n)) < density)
    packed = pack(w, mask, jp.Block(rows, cols))
    packed = pack(w, mask, jp.Block(rows, cols), capacity=packed.capacity + spare)
    found = unpack(packed)
    assert found.dtype == w.dtype
    wanted = np.where(mask, w, np.zeros_like(w))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    bits = np.uint32 if dtype == "float32" else np.uint16
    same = np.asarray(found).view(bits) == wanted.view(bits)
    assert (same | np.isnan(wanted)).all()  # -0 stays -0
    assert packed.nbytes == sum(x.nbytes for x in jax.tree.leaves(packed))


def test_places_are_sorted_by_column_and_by_row():
    mask = jnp.asarray(np.random.default_rng(0).random((6, 5)) < 0.5)
    packed = pack(jnp.ones((6, 5)), mask, jp.Block(1, 1), capacity=25)
    kept = int(mask.sum())
    columns, rows = np.nonzero(mask.T)
    np.testing.assert_array_equal(packed.columns[:kept], columns)
    np.testing.assert_array_equal(packed.rows[:kept], rows)
    assert (packed.rows[kept:] == 6).all() and (packed.columns[kept:] == 5).all()
    again = sorted(range(kept), key=lambda i: (rows[i], columns[i]))
    np.testing.assert_array_equal(packed.by_row[:kept], again)
    assert sorted(packed.by_row.tolist()) == list(range(25))


def test_stacked_matrices_have_the_capacity_of_the_fullest():
    mask = jnp.asarray(np.random.default_rng(0).random((3, 8, 6)) < 0.2)
    w = jnp.arange(144.0).reshape(3, 8, 6)
    packed = pack(w, mask, jp.Block(2, 3))
    assert packed.values.shape[0] == 3 and packed.shape == (3, 8, 6)
    np.testing.assert_array_equal(unpack(packed), jnp.where(mask, w, 0))


@pytest.mark.parametrize(
    "block",
    [jp.Block(2, 3, axis=1, out_axis=0), jp.Block(4, 3, axis=(0, 1), out_axis=2)],
)
def test_other_layouts(block):
    shape = (6, 8) if block.rows == 2 else (2, 4, 6)
    w = jnp.arange(48.0).reshape(shape)
    mask = jnp.asarray(np.random.default_rng(1).random(shape) < 0.3)
    np.testing.assert_array_equal(unpack(pack(w, mask, block)), jnp.where(mask, w, 0))


def test_more_blocks_than_room():
    w = jnp.ones((4, 4))
    with pytest.raises(
        ValueError, match="capacity: got 2, but the mask keeps 4 blocks"
    ):
        pack(w, w != 0, jp.Block(2, 2), capacity=2)
    packed = jax.jit(lambda w: pack(w, w != 0, jp.Block(2, 2), capacity=2))(w)
    assert jnp.isnan(packed.values).all()


def test_messages():
    w = jnp.ones((4, 4))
    with pytest.raises(ValueError, match=r"mask: its shape is \(2, 2\), that of w is"):
        pack(w, jnp.ones((2, 2), bool), jp.Block(2, 2))
    with pytest.raises(TypeError, match="structure: got 'dense'; expected Block"):
        pack(w, w != 0, "dense")
    with pytest.raises(TypeError, match="packed: got int; expected what"):
        unpack(3)
    with pytest.raises(ValueError, match="capacity: got None under jax.jit"):
        jax.jit(lambda w: pack(w, w != 0, jp.Block(2, 2)))(w)
