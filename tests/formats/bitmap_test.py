"""Bitmaps: what goes in comes out bit for bit, and nothing is lost in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.formats import BitmapArray, pack, unpack

pytestmark = pytest.mark.usefixtures("quick_compilation")

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]


def bits_of(x):
    """The bytes of an array, so that -0.0 is not 0.0 and NaN is itself."""
    return np.asarray(x).view(np.uint8)


def masked(w, mask):
    return jnp.where(mask, w, jnp.zeros_like(w))


@given(
    st.sampled_from([(1, 1), (40, 130), (2, 3, 70, 9)]),
    st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=30)
def test_unpack_gives_what_was_packed(shape, dtype, density, seed):
    random = np.random.default_rng(seed)
    w = jnp.asarray(random.integers(-99, 99, shape).astype(np.float32)).astype(dtype)
    mask = random.random(shape) < density
    packed = pack(w, jnp.asarray(mask), jp.Unstructured(), capacity=5200)
    found = unpack(packed)
    assert (
        found.shape == packed.shape == shape and found.dtype == packed.dtype == w.dtype
    )
    wanted = np.where(mask, w, np.zeros_like(w))
    np.testing.assert_array_equal(bits_of(found), bits_of(wanted))
    assert packed.nbytes == sum(x.nbytes for x in jax.tree.leaves(packed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_special_values_keep_their_bits(dtype):
    special = jnp.array([-0.0, 0.0, jnp.nan, -jnp.nan, jnp.inf, -jnp.inf, 1e-40], dtype)
    w = jnp.tile(special, (40, 3))
    mask = jnp.asarray(np.random.default_rng(0).random(w.shape) < 0.5)
    for m in (mask, jnp.ones_like(mask), jnp.zeros_like(mask)):
        found = unpack(pack(w, m, jp.Unstructured()))
        np.testing.assert_array_equal(bits_of(found), bits_of(masked(w, m)))


def test_where_bits_values_and_starts_are():
    w = jnp.arange(66.0 * 130).reshape(66, 130) + 1
    mask = jnp.zeros(w.shape, bool)
    for place in ((0, 0), (31, 0), (0, 1), (5, 129), (32, 2), (65, 128)):
        mask = mask.at[place].set(True)
    packed = pack(w, mask, jp.Unstructured(), capacity=8)
    assert packed.bits.shape == (3, 130)
    assert int(packed.bits[0, 0]) == 1 | 1 << 31 and packed.bits[2, 128] == 2
    places = [(0, 0), (31, 0), (0, 1), (5, 129), (32, 2), (65, 128)]
    assert packed.values.tolist() == [float(w[p]) for p in places] + [0, 0]
    assert packed.starts.tolist() == [[0, 3], [4, 5], [5, 5]]


def test_size_is_one_bit_a_weight_and_the_values():
    w = jnp.ones((512, 256), jnp.bfloat16)
    mask = jnp.asarray(np.random.default_rng(0).random(w.shape) < 0.5)
    packed = pack(w, mask, jp.Unstructured())
    kept = int(mask.sum())
    assert packed.capacity == kept
    assert packed.nbytes == w.size // 8 + 2 * kept + 4 * w.size // (32 * 128)


def test_packed_masks_and_channels_are_taken_too():
    w = jnp.arange(40.0).reshape(8, 5)
    mask = jnp.broadcast_to(jnp.array([True, False, True, True, False]), (8, 5))
    packed = pack(w, jp.masks.pack(mask), jp.Channel())
    assert isinstance(packed, BitmapArray)
    np.testing.assert_array_equal(unpack(packed), masked(w, mask))


def test_a_new_mask_of_the_same_size_is_the_same_program():
    w = jnp.arange(1.0, 301.0).reshape(20, 15)
    traces = []

    @jax.jit
    def there_and_back(w, mask):
        traces.append(None)
        return unpack(pack(w, mask, jp.Unstructured(), capacity=150))

    for seed in range(3):
        mask = jnp.asarray(np.random.default_rng(seed).random(w.shape) < 0.4)
        np.testing.assert_array_equal(there_and_back(w, mask), masked(w, mask))
    assert len(traces) == 1


def test_more_weights_than_room():
    w = jnp.ones((2, 4, 4))
    with pytest.raises(
        ValueError, match="capacity: got 9, but the mask keeps 16 weights"
    ):
        pack(w, w != 0, jp.Unstructured(), capacity=9)

    @jax.jit
    def packed(w):
        return pack(w, w != 0, jp.Unstructured(), capacity=9)

    assert jnp.isnan(packed(w).values).all()
    assert jnp.isnan(unpack(packed(w))).all()
    assert (packed(w.astype(jnp.int8)).values == -128).all()
    # In a stack, it is the matrix that does not fit.
    assert jnp.isnan(packed(w.at[0, 1:].set(0)).values).all(1).tolist() == [False, True]


def test_messages():
    w = jnp.ones((4, 4))
    with pytest.raises(
        ValueError, match=r"w: its shape is \(4,\); expected two or more"
    ):
        pack(w[0], w[0] != 0, jp.Unstructured())
    with pytest.raises(ValueError, match=r"mask: its shape is \(2, 2\), that of w is"):
        pack(w, jnp.ones((2, 2), bool), jp.Unstructured())
    with pytest.raises(ValueError, match="capacity: got None under jax.jit"):
        jax.jit(lambda w: pack(w, w != 0, jp.Unstructured()))(w)
