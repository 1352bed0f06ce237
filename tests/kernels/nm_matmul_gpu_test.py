"""N:M products on GPUs: interpreted against the reference, and lowered."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jaxprune.kernels.nm_matmul import gpu, reference

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

CUSTOM_CALL = "mosaic_gpu_v2"


def make(rows, k, cols, n, m, stride=1, dtype="bfloat16"):
    random = np.random.default_rng(0)
    x, w = (
        jnp.asarray(random.standard_normal(s), dtype) for s in ((rows, k), (k, cols))
    )
    structure = jp.NM(n, m, stride=stride)
    mask = structure.best("w", jnp.abs(w).astype(jnp.float32))
    return x, jp.formats.pack(w, mask, structure)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 288, 120, 2, 4),  # an odd number of planes
        (9, 512, 128, 1, 4, 128),
    ],
    ids=str,
)
def test_agrees_with_the_dense_product(sizes, gpu_interpreter):
    x, packed = make(*sizes)
    y = jp.kernels.nm_matmul(x, packed, backend="gpu", interpret=gpu_interpreter)
    w = np.asarray(reference.dense(packed), np.float32)
    wanted = np.asarray(x, np.float32) @ w
    assert y.dtype == x.dtype
    # Rounded to eight bits, once.
    error = np.abs(np.asarray(y, np.float32) - wanted).max()
    assert error <= 4e-3 * np.abs(wanted).max()


def test_tiles_of_k_follow_each_other(gpu_interpreter, monkeypatch):
    # So few processors that a thread block has all tiles, of unequal shares.
    monkeypatch.setattr(gpu._hopper, "processors", lambda: 1)
    x, packed = make(2, 2304, 120, 1, 16)
    assert packed.tiles.number > 1
    found = gpu.matmul(x, packed, interpret=gpu_interpreter)
    wanted = np.asarray(x, np.float32) @ np.asarray(reference.dense(packed), np.float32)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def by_thread(layout, shape):
    """For each warp, lane and register the elements of an array that stand there."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        outer, inner = index.shape[: -len(tile)], index.shape[-len(tile) :]
        split = [x for s, t in zip(inner, tile, strict=True) for x in (s // t, t)]
        index = index.reshape(*outer, *split)
        first, rank = len(outer), len(tile)
        order = [*range(first), *range(first, first + 2 * rank, 2)]
        index = index.transpose(order + list(range(first + 1, first + 2 * rank, 2)))
    moved = (*layout.warp_dims, *layout.lane_dims)
    rest = [d for d in range(-index.ndim, -1) if d not in moved]
    index = index.transpose([d + index.ndim for d in (*moved, *rest, -1)])
    return index.reshape(4, 32, -1, index.shape[-1])


def test_registers_are_views_of_each_other():
    """What the interpreter replaces: rows as words, and words as operands of wgmma."""
    words = by_thread(gpu.WORDS.to_mgpu(), (8, 64))
    values = by_thread(gpu.VALUES.to_mgpu(), (16, 64))
    operand = by_thread(gpu.plgpu.Layout.WGMMA.to_mgpu(), (64, 16))
    for half, column in itertools.product(range(2), range(2)):
        row, n = divmod(words[:, :, half, column], 64)
        for place in range(2):  # of a row in its word
            loaded = divmod(values[:, :, 2 * half + place, column], 64)
            np.testing.assert_array_equal(loaded, (2 * row + place, n))
            to_row, to_k = divmod(operand[:, :, 2 * half + column, place], 16)
            np.testing.assert_array_equal(to_k, 2 * row + place)
            w, i, h = n // 16, n % 16 // 2, n % 2
            np.testing.assert_array_equal(to_row, 16 * w + 8 * h + i)


def lowered(f, *arguments):
    """The program for CUDA, as text."""
    check = export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)
    exported = export.export(jax.jit(f), platforms=["cuda"], disabled_checks=[check])
    return exported(*arguments).mlir_module()


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1024, 4096, 2, 4),
        (64, 1024, 1024, 1, 4),
        (17, 1100, 250, 2, 4),
        (5, 260, 250, 1, 2),
        (16, 600, 128, 1, 8),
        (33, 1024, 512, 1, 16, 16),
    ],
    ids=str,
)
def test_few_rows_are_lowered_to_the_kernel(sizes):
    rows, k, cols, n, m = sizes[:5]
    structure = jp.NM(n, m, stride=sizes[5] if len(sizes) > 5 else 1)
    w = jax.ShapeDtypeStruct((k, cols), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((k, cols), bool)
    packed = jax.eval_shape(
        lambda w, mask: jp.formats.pack(w, mask, structure), w, mask
    )
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    assert lowered(jp.kernels.nm_matmul, x, packed).count(f"@{CUSTOM_CALL}(") == 1


def test_stacks_and_float16_are_lowered_to_the_kernel():
    x, packed = make(4, 256, 128, 1, 4, dtype="float16")
    x, packed = jax.tree.map(lambda a: jnp.stack([a, a]), (x, packed))
    assert f"@{CUSTOM_CALL}(" in lowered(jp.kernels.nm_matmul, x, packed)


def test_what_does_not_suit_is_left_to_xla_or_refused():
    x, packed = make(65, 256, 128, 2, 4)
    assert CUSTOM_CALL not in lowered(jp.kernels.nm_matmul, x, packed)
    x, packed = make(4, 256, 128, 2, 4, dtype="float32")
    assert CUSTOM_CALL not in lowered(jp.kernels.nm_matmul, x, packed)
    with pytest.raises(ValueError, match="'gpu' does not take.*bfloat16 or float16"):
        jp.kernels.nm_matmul(x, packed, backend="gpu")
