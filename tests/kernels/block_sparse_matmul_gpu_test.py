"""Block-sparse products on GPUs: interpreted against the reference, and lowered."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jaxprune.kernels.block_sparse_matmul import gpu, reference, shapes

import jaxprune as jp

pytestmark = pytest.mark.usefixtures("quick_compilation")

CUSTOM_CALL = "mosaic_gpu_v2"


def make(shape, dtype="bfloat16"):
    """x, the packed matrix, and a cotangent."""
    random = np.random.default_rng(0)
    m, k, n, block, density, spare = shape
    grid = (-(-k // block[0]), -(-n // block[1]))
    blocks = random.random(grid) < density
    blocks[1:2], blocks[:, 1:2] = False, False
    mask = np.kron(blocks, np.ones(block, bool))[:k, :n]
    x, w, dy = (
        jnp.asarray(random.standard_normal(s), dtype) for s in ((m, k), (k, n), (m, n))
    )
    capacity = max(1, int(blocks.sum())) + spare
    packed = jp.formats.pack(w, jnp.asarray(mask), jp.Block(*block), capacity=capacity)
    return x, packed, dy


def with_gradients(f):
    def g(x, packed, dy):
        def product(x, values):
            return f(x, dataclasses.replace(packed, values=values))

        y, back = jax.vjp(product, x, packed.values)
        return y, *back(dy.astype(y.dtype))

    return g


def lowered(f, *arguments):
    """The program for CUDA, as text."""
    check = export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)
    exported = export.export(jax.jit(f), platforms=["cuda"], disabled_checks=[check])
    return exported(*arguments).mlir_module()


@pytest.mark.parametrize("shape", shapes.HALF, ids=str)
def test_agrees_with_the_dense_product(shape, gpu_interpreter, monkeypatch):
    # So few that a thread block has several tiles to walk over.
    monkeypatch.setattr(gpu, "_processors", lambda: 2)
    x, packed, dy = make(shape)

    @with_gradients
    def fast(x, packed):
        return jp.kernels.block_sparse_matmul(
            x, packed, backend="gpu", interpret=gpu_interpreter
        )

    exact = dataclasses.replace(packed, values=packed.values.astype(jnp.float32))
    wanted = with_gradients(reference.block_sparse_matmul)(
        x.astype(jnp.float32), exact, dy.astype(jnp.float32)
    )
    found = jax.jit(fast)(x, packed, dy)
    for name, a, b in zip(("y", "dx", "dvalues"), found, wanted, strict=True):
        assert a.dtype == x.dtype
        # A result is rounded to eight bits, once.
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()
        assert error <= 4e-3 * max(1.0, float(jnp.abs(b).max())), name


def test_sums_of_a_split_contraction_are_added(gpu_interpreter, monkeypatch):
    monkeypatch.setattr(gpu, "_processors", lambda: 4)
    x, _, dy = make(shapes.Shape(1100, 64, 64, (64, 64), 1.0))
    place = jnp.zeros(1, jnp.int32)
    m = 1152  # 18 steps, of which two are shared out unequally
    x, dy = (jnp.pad(a, ((0, m - a.shape[0]), (0, 0))) for a in (x, dy))
    found = gpu.products(
        x, dy, place, place, 1, block=(64, 64), interpret=gpu_interpreter
    )
    wanted = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    np.testing.assert_allclose(
        np.asarray(found[0], np.float32), wanted, atol=4e-3 * np.abs(wanted).max()
    )


@pytest.mark.parametrize(
    ("block", "m", "dtype"),
    [
        ((64, 64), 1, "bfloat16"),
        ((64, 64), 5000, "float16"),
        ((64, 128), 100, "bfloat16"),
        ((128, 128), 100, "float16"),
        ((128, 128), 5000, "bfloat16"),
        ((192, 64), 5000, "bfloat16"),
        ((256, 256), 5000, "bfloat16"),
    ],
    ids=str,
)
def test_all_three_products_are_lowered_to_kernels(block, m, dtype):
    x, packed, dy = make(shapes.Shape(m, 768, 768, block, 0.7), dtype)
    text = lowered(with_gradients(jp.kernels.block_sparse_matmul), x, packed, dy)
    assert text.count(f"@{CUSTOM_CALL}(") == 3


def test_a_stack_is_lowered_to_kernels():
    x, packed, dy = make(shapes.Shape(40, 256, 192, (64, 64), 0.7))
    x, packed, dy = jax.tree.map(lambda a: jnp.stack([a, a]), (x, packed, dy))
    text = lowered(with_gradients(jp.kernels.block_sparse_matmul), x, packed, dy)
    assert text.count(f"@{CUSTOM_CALL}(") == 3


@pytest.mark.parametrize(
    ("block", "dtype"), [((32, 64), "bfloat16"), ((64, 64), "float32")], ids=str
)
def test_what_does_not_suit_is_left_to_xla(block, dtype):
    x, packed, dy = make(shapes.Shape(40, 256, 192, block, 0.7), dtype)
    text = lowered(with_gradients(jp.kernels.block_sparse_matmul), x, packed, dy)
    assert CUSTOM_CALL not in text


@pytest.mark.parametrize(
    ("block", "dtype", "message"),
    [
        ((32, 64), "bfloat16", "they are 32 x 64.*multiple of 64 by a multiple of 64"),
        ((64, 64), "float32", "they are float32; expected bfloat16 or float16"),
    ],
    ids=str,
)
def test_blocks_that_do_not_suit_are_refused(block, dtype, message):
    x, packed, _ = make(shapes.Shape(4, 256, 192, block, 0.7), dtype)
    with pytest.raises(ValueError, match=message):
        jp.kernels.block_sparse_matmul(x, packed, backend="gpu")


def test_other_gpus_are_refused(monkeypatch):
    device = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda platform: [device])
    x, packed, _ = make(shapes.Shape(4, 256, 192, (64, 64), 0.7))
    with pytest.raises(ValueError, match="A100 is no GPU of the Hopper generation"):
        jp.kernels.block_sparse_matmul(x, packed, backend="gpu")


def test_an_unknown_backend_is_refused():
    x, packed, _ = make(shapes.Shape(4, 256, 192, (64, 64), 0.7))
    with pytest.raises(ValueError, match="got 'cuda'; expected 'gpu', 'tpu', 'xla'"):
        jp.kernels.block_sparse_matmul(x, packed, backend="cuda")
