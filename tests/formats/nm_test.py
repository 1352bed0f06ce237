"""Packed N:M matrices: what goes in comes out bit for bit, in as few bytes as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.formats import _nm_words, pack, unpack

pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_mask(random, k, cols, n, m, stride=1, full=True):
    """At most `n` of every `m` along K, and exactly as many if `full`."""
    groups = -(-k // (m * stride))
    rank = random.random((groups, m, stride, cols)).argsort(1).argsort(1)
    most = n if full else random.integers(0, n + 1, (groups, 1, stride, cols))
    return (rank < most).reshape(-1, cols)[:k]


def random_bits(random, shape, dtype):
    """Numbers of any bit pattern: infinities, NaN, -0.0 and subnormal ones too."""
    dtype = jnp.dtype(dtype)
    bits = random.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    w = bits.view(dtype)[..., 0]
    special = np.asarray([0.0, -0.0], dtype)
    return np.where(
        random.random(shape) < 0.1, special[random.integers(0, 2, shape)], w
    )


def bits_of(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def assert_comes_back(w, mask, structure):
    packed = pack(jnp.asarray(w), jnp.asarray(mask), structure)
    found = unpack(packed)
    assert found.dtype == w.dtype and packed.dtype == w.dtype
    assert packed.shape == w.shape
    wanted = np.where(mask, w, np.zeros_like(w))
    np.testing.assert_array_equal(bits_of(found), bits_of(wanted))
    assert packed.nbytes == packed.values.nbytes + packed.codes.nbytes
    return packed


@settings(max_examples=15)
@given(
    st.sampled_from([1, 5, 16, 30]), st.just(3), st.sampled_from([2, 4, 7, 8, 16]),
    st.data(), st.integers(1, 3),
    st.sampled_from(["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]),
    st.booleans(), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_unpack_gives_what_was_packed(k, cols, m, data, stride, dtype, full, seed):
    n = data.draw(st.integers(1, m - 1))
    random = np.random.default_rng(seed)
    mask = random_mask(random, k, cols, n, m, stride, full)
    structure = jp.NM(n, m, stride=stride)
    assert_comes_back(random_bits(random, (k, cols), dtype), mask, structure)


@pytest.mark.parametrize(
    ("n", "m", "k", "stride", "dtype"),
    [
        (2, 4, 256, 1, "bfloat16"), (2, 4, 1344, 64, "float16"), (1, 2, 300, 1, "bfloat16"),
        (1, 4, 1344, 16, "bfloat16"), (1, 8, 300, 1, "float16"), (1, 16, 512, 1, "bfloat16"),
    ],
)  # fmt: skip
def test_codes_in_words(n, m, k, stride, dtype):
    random = np.random.default_rng(k)
    mask = random_mask(random, k, 120, n, m, stride, full=False)
    w = random_bits(random, (k, 120), dtype)
    packed = assert_comes_back(w, mask, jp.NM(n, m, stride=stride))
    assert packed.coding == "words"


@pytest.mark.parametrize(("n", "m"), [(128, 256), (5, 256), (100, 101)])
def test_large_groups(n, m):
    random = np.random.default_rng(0)
    mask = random_mask(random, 300, 3, n, m)
    w = random_bits(random, (300, 3), "bfloat16")
    assert_comes_back(w, mask, jp.NM(n, m))


@pytest.mark.parametrize(
    ("n", "m", "dtype", "bits"),
    [
        (2, 4, "bfloat16", 8.75), (2, 4, "float16", 8.75), (1, 4, "bfloat16", 4.5),
        (1, 2, "bfloat16", 8.5), (1, 8, "bfloat16", 2.375), (1, 16, "bfloat16", 1.25),
        (2, 4, "float32", 17), (2, 4, "int8", 5), (1, 4, "int8", 2.5),
        (4, 8, "bfloat16", 9), (2, 8, "bfloat16", 4.75), (8, 16, "int8", 5),
    ],
)  # fmt: skip
def test_bits_a_weight(n, m, dtype, bits):
    def make(w, mask):
        return pack(w, mask, jp.NM(n, m))

    w = jax.ShapeDtypeStruct((4096, 128), dtype)
    packed = jax.eval_shape(make, w, jax.ShapeDtypeStruct(w.shape, bool))
    assert packed.nbytes * 8 == bits * w.size


@settings(max_examples=15)
@given(
    st.integers(64, 6000), st.sampled_from([(2, 4), (1, 2), (1, 4), (1, 8), (1, 16)])
)
def test_tiles_of_words_are_not_mostly_padding(quarter, nm):
    k, (n, m) = 4 * quarter, nm
    tile = _nm_words.tiles(n, m, -(-k // m))
    held = tile.number * (tile.planes + tile.words)  # of 8 words
    bits = 2 * tile.halvings + tile.turns
    ideal = k / tile.rows * (1 + bits / 32)
    assert held <= 1.08 * ideal + 3
    # Every bit has one meaning.
    taken = [tile.half(p, i) for p in range(tile.planes) for i in range(tile.halvings)]
    taken += [(word, bit + 16) for word, bit in taken]
    taken += [tile.turn(p) for p in range(tile.planes if tile.turns else 0)]
    assert len(set(taken)) == len(taken)
    assert all(word < tile.words and bit < 32 for word, bit in taken)


@pytest.mark.parametrize(
    ("shape", "axis", "matrix"),
    [
        ((8, 6), -2, (8, 6)),
        ((6, 8), -1, (8, 6)),
        ((2, 3, 8, 6), -2, (8, 6)),
        ((3, 6, 8), -1, (8, 6)),
        ((8, 2, 3), 0, (8, 6)),
        ((2, 4, 6), (0, 1), (8, 6)),
        ((6, 2, 4), (1, 2), (8, 6)),
        ((2, 6, 4), (0, 2), (8, 6)),
        ((4, 6, 2), (2, 0), (8, 6)),
        ((8,), 0, (8, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("stride", [1, 2])
def test_layouts(shape, axis, matrix, stride):
    structure = jp.NM(2, 4, axis=axis, stride=stride)
    random = np.random.default_rng(0)
    w = random.standard_normal(shape).astype(np.float32)
    mask = np.asarray(structure.best("w", jnp.abs(w)))
    assert mask.sum() * 2 == mask.size
    packed = assert_comes_back(w, mask, structure)
    assert packed.layout.matrix == matrix
    assert packed.values.shape[-2:] == (4, matrix[1])


def test_under_jit_and_vmap():
    random = np.random.default_rng(0)
    w = jnp.asarray(random.standard_normal((3, 256, 128)), jnp.bfloat16)
    structure = jp.NM(2, 4)
    mask = structure.best("w", jnp.abs(w))

    @jax.jit
    def stacked(w, mask):
        packed = jax.vmap(lambda w, mask: pack(w, mask, structure))(w, mask)
        return packed, jax.vmap(unpack)(packed)

    packed, found = stacked(w, mask)
    np.testing.assert_array_equal(found, jnp.where(mask, w, 0))
    eager = jax.tree.leaves(pack(w, mask, structure))
    for a, b in zip(jax.tree.leaves(packed), eager, strict=True):
        np.testing.assert_array_equal(a, b)
    assert packed.shape == w.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_pass_to_what_is_kept(dtype):
    random = np.random.default_rng(0)
    w, dy = (jnp.asarray(random.standard_normal((260, 128)), dtype) for _ in range(2))
    mask = jp.NM(2, 4).best("w", jnp.abs(w))

    @jax.jit
    def gradient(w):
        return jax.vjp(lambda w: unpack(pack(w, mask, jp.NM(2, 4))), w)[1](dy)[0]

    np.testing.assert_array_equal(gradient(w), jnp.where(mask, dy, 0))


def test_packed_masks():
    w = jnp.arange(32.0).reshape(8, 4)
    mask = jp.NM(2, 4).best("w", w)
    found = unpack(pack(w, jp.masks.pack({"w": mask})["w"], jp.NM(2, 4)))
    np.testing.assert_array_equal(found, jnp.where(mask, w, 0))


def test_stays_where_the_weights_are():
    devices = jax.make_mesh((4,), ("model",))
    for spec in (jax.P(None, "model"), jax.P("model", None)):
        sharding = jax.NamedSharding(devices, spec)
        w = jax.device_put(jnp.ones((4096, 512), jnp.bfloat16), sharding)
        mask = jp.NM(2, 4).best("w", w)
        packed = jax.jit(lambda w, mask: pack(w, mask, jp.NM(2, 4)))(w, mask)
        for leaf in jax.tree.leaves(packed):
            assert leaf.addressable_shards[0].data.size * 4 == leaf.size
        assert unpack(packed).sharding.is_equivalent_to(sharding, 2)


def test_more_than_n_of_a_group():
    w = jnp.ones((8, 3))
    mask = jp.NM(2, 4).best("w", w).at[4:7, 1].set(True)
    with pytest.raises(
        ValueError, match="mask: it keeps 3 weights of a group of 4; expec"
    ):
        pack(w, mask, jp.NM(2, 4))
    packed = jax.jit(lambda w: pack(w, mask, jp.NM(2, 4)))(w)
    assert jnp.isnan(packed.values).all()
    assert not jnp.isnan(pack(w, mask, jp.NM(3, 4)).values).any()


def test_messages():
    w = jnp.ones((8, 4))
    with pytest.raises(ValueError, match=r"mask: its shape is \(2, 2\), that of w is"):
        pack(w, jnp.ones((2, 2), bool), jp.NM(2, 4))
    with pytest.raises(TypeError, match="w: its type is complex64; expected floating"):
        pack(w.astype(jnp.complex64), w == 2, jp.NM(2, 4))
    with pytest.raises(ValueError, match="capacity: got 3 for NM"):
        pack(w, w == 2, jp.NM(2, 4), capacity=3)
    with pytest.raises(ValueError, match="w: NM axis=-2 is outside a leaf of 1 axes"):
        pack(w[0], w[0] == 2, jp.NM(2, 4))
