"""Products with weights that are sharded along K, N or a stack, forward and backward."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.formats import pack, unpack, with_values

pytestmark = pytest.mark.usefixtures("quick_compilation")

M, K, N = 16, 64, 32
STRUCTURES = {
    "nm_matmul": jp.NM(2, 4),
    "block_sparse_matmul": jp.Block(8, 8),
    "bitmap_matmul": jp.Unstructured(),
    "masked_matmul": jp.Unstructured(),
}
# Of the weight, of x, and of y; and the kinds of collectives in the forward pass.
LAYOUTS = {
    "columns": (P(None, "model"), P("data"), P("data", "model"), set()),
    "rows": (P("model"), P("data", "model"), P("data", None), {"all-reduce"}),
    "both, x whole": (
        P("data", "model"),
        P(),
        P(None, "model"),
        {"all-reduce"},
    ),
    "fsdp": (P("data", "model"), P("data"), P("data", "model"), {"all-gather"}),
    "experts": (
        P("model", None, "data"),
        P("model"),
        P("model", None, "data"),
        set(),
    ),
}


@functools.cache
def make(name, stacked):
    stack = (4,) if stacked else ()
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.normal(keys[0], (*stack, K, N))
    mask = jp.prune({"w": w}, 0.5, structure=STRUCTURES[name])[1]["w"]
    return w, mask, jax.random.normal(keys[1], (*stack, M, K))


def place(kind, x, spec):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    return jax.device_put(x, NamedSharding(mesh, spec))


def operands(name, layout, kind):
    w, mask, x = make(name, layout == "experts")
    w_spec, x_spec = LAYOUTS[layout][:2]
    there = place(kind, x, x_spec), place(kind, w, w_spec), place(kind, mask, w_spec)
    if name == "masked_matmul":
        return there
    return there[0], pack(*there[1:], STRUCTURES[name])


@pytest.mark.parametrize(
    ("name", "layout", "kind"),
    [
        *[("block_sparse_matmul", layout, AxisType.Explicit) for layout in LAYOUTS],
        *[
            (name, layout, AxisType.Explicit)
            for name in ("nm_matmul", "bitmap_matmul", "masked_matmul")
            for layout in ("rows", "fsdp")
        ],
        ("bitmap_matmul", "columns", AxisType.Auto),
        ("nm_matmul", "rows", AxisType.Auto),
    ],
)
def test_sharded_weights(name, layout, kind):
    w, mask, x = make(name, layout == "experts")
    *_, y_spec, wanted_moves = LAYOUTS[layout]
    there = operands(name, layout, kind)
    kernel = getattr(jp.kernels, name)

    def loss(x, packed, *mask):
        y = kernel(x, packed, *mask)
        return jnp.sum(jnp.sin(y)), y

    program = jax.jit(jax.grad(loss, (0, 1), has_aux=True, allow_int=True))
    (dx, dw), y = program(*there)

    dense = np.where(mask, w, 0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(y, x @ dense)
    dy = np.cos(x @ dense)
    close(dx, dy @ dense.mT)
    assert dx.sharding.is_equivalent_to(there[0].sharding, x.ndim)
    if name != "masked_matmul":
        dw = unpack(with_values(there[1], dw.values))
    close(np.where(mask, dw, 0), np.where(mask, x.mT @ dy, 0))
    if kind is AxisType.Explicit:
        assert y.sharding.is_equivalent_to(
            NamedSharding(y.sharding.mesh, y_spec), y.ndim
        )
        text = jax.jit(kernel).lower(*there).compile().as_text()
        moved = re.findall(
            r" (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", text
        )
        assert set(moved) == wanted_moves


def test_half_precision_is_summed_before_it_is_rounded():
    """Parts of 1 and -1 and of what bfloat16 cannot tell from them."""
    w = jnp.zeros((K, N), jnp.bfloat16).at[::16].set(1)
    w = w.at[16::32].set(-1).at[1].set(2**-9)
    x = jnp.ones((M, K), jnp.bfloat16)
    there = [place(AxisType.Explicit, a, P("model")) for a in (w, w != 0)]
    for name in ("nm_matmul", "block_sparse_matmul", "bitmap_matmul"):
        packed = pack(*there, STRUCTURES[name])
        y = getattr(jp.kernels, name)(place(AxisType.Explicit, x, P("data")), packed)
        assert y.dtype == jnp.bfloat16 and (y == 2**-9).all()
    y = jp.kernels.masked_matmul(place(AxisType.Explicit, x, P("data")), *there)
    assert (y == 2**-9).all()


def test_bias_and_activation_come_after_the_sum():
    w, mask, x = make("block_sparse_matmul", False)
    there = operands("block_sparse_matmul", "both, x whole", AxisType.Explicit)
    bias = jnp.arange(N, dtype=jnp.float32)
    y = jp.kernels.block_sparse_matmul(*there, bias=bias, activation=jnp.tanh)
    wanted = np.tanh(x @ np.where(mask, w, 0) + bias)
    np.testing.assert_allclose(y, wanted, atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("name", ["nm_matmul", "block_sparse_matmul", "masked_matmul"])
def test_lowering_for_tpu(name, kind):
    """A kernel for each device in `shard_map`; XLA where it divides the work itself."""
    structure = jp.Block(128, 128) if name == "block_sparse_matmul" else jp.NM(2, 4)
    w = jnp.ones((512, 512), jnp.bfloat16)
    mask = jnp.arange(512)[:, None] % 4 < 2 + jnp.zeros((512, 512), int)
    there = [place(kind, a, P(None, "model")) for a in (w, mask)]
    if name != "masked_matmul":
        there = [pack(*there, structure)]
    x = place(kind, jnp.ones((16, 512), jnp.bfloat16), P("data"))
    kernel = jax.jit(getattr(jp.kernels, name))
    text = kernel.trace(x, *there).lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == (kind is AxisType.Explicit)


def test_stacks_that_do_not_fit():
    packed = operands("nm_matmul", "experts", AxisType.Explicit)[1]
    x = place(AxisType.Explicit, make("nm_matmul", True)[2], P("data"))
    with pytest.raises(ValueError, match="stack of matrices is sharded as"):
        jp.kernels.nm_matmul(x, packed)


def test_ragged_products_are_refused():
    packed = operands("nm_matmul", "experts", AxisType.Explicit)[1]
    x = place(AxisType.Explicit, jnp.ones((M, K)), P())
    with pytest.raises(ValueError, match="group_sizes: x is float32.*jax.shard_map"):
        jp.kernels.nm_matmul(x, packed, group_sizes=jnp.full(4, 4))


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_rows(name):
    w, mask, _ = make(name, False)
    weights = (w, mask)
    if name != "masked_matmul":
        weights = (pack(w, mask, STRUCTURES[name]),)
    y = getattr(jp.kernels, name)(jnp.ones((3, 0, K)), *weights)
    assert y.shape == (3, 0, N)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_need_not_lie_as_its_weight_does(packed):
    w, mask, x = make("masked_matmul", False)
    kept = jp.masks.pack({"w": mask})["w"] if packed else np.asarray(mask)
    there = place(AxisType.Explicit, w, P(None, "model"))
    y = jp.kernels.masked_matmul(place(AxisType.Explicit, x, P("data")), there, kept)
    np.testing.assert_allclose(y, x @ np.where(mask, w, 0), atol=1e-4)


@pytest.mark.parametrize("name", ["nm_matmul", "masked_matmul"])
def test_axes_of_one_device(name):
    """A script for a pod, where each axis of the mesh has one device."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])
    w, mask, x = make(name, False)
    specs = P(None, "model"), P("model", "data"), P("model", "data")
    there = [
        jax.device_put(a, NamedSharding(mesh, s))
        for a, s in zip((x, w, mask), specs, strict=True)
    ]
    if name != "masked_matmul":
        there = [there[0], pack(*there[1:], STRUCTURES[name])]
    y = getattr(jp.kernels, name)(*there)
    np.testing.assert_allclose(y, x @ np.where(mask, w, 0), atol=1e-4)
