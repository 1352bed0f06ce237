"""MiniLM without what NeuroPrune has silenced is a smaller MiniLM of the same function."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from minilm import model, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = model.Config(
    vocab=20, positions=12, width=384, heads=(12, 12), ff=(24, 24), classes=2
)


def _silenced():
    """Random weights; half of the heads and neurons are dead, in every way there is."""
    static, shapes, frozen = model.split(model.abstract(TINY))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    fill = lambda x: x.replace(jax.random.normal(next(keys), x.shape) / 8)  # noqa: E731
    params, frozen = (nnx.map_state(lambda _, x: fill(x), t) for t in (shapes, frozen))
    pure = nnx.as_pure(params)
    for i, layer in pure["layers"].items():
        attn, mlp = layer["attn"], layer["mlp"]
        out = attn["out"]["kernel"].reshape(12, 32, -1)
        attn["out"]["kernel"] = out.at[: 12 if i else 4].set(0).reshape(384, -1)
        value = attn["value"]["kernel"].reshape(-1, 12, 32)
        attn["value"]["kernel"] = value.at[:, 4:6].set(0).reshape(-1, 384)
        mlp["up"]["kernel"] = mlp["up"]["kernel"].at[:, 3:10].set(0)
        mlp["down"]["kernel"] = mlp["down"]["kernel"].at[8:15].set(0)
    nnx.replace_by_pure_dict(params, pure)
    return static, params, frozen


def test_a_plan_leaves_a_smaller_minilm():
    static, params, frozen = _silenced()
    small = train.shrunk(static, params, frozen)
    config = model.sizes(small)
    # A layer that has lost all of its heads keeps a silent one.
    assert (config.heads, config.ff) == ((6, 1), (12, 12))
    small_static, *_ = model.split(model.abstract(
        dataclasses.replace(TINY, heads=config.heads, ff=config.ff)
    ))  # fmt: skip
    batch = {"ids": jnp.arange(24).reshape(3, 8) % 20, "mask": jnp.arange(8) < 6}
    batch["mask"] = jnp.broadcast_to(batch["mask"], (3, 8))
    want = train.forward(static, frozen)(params, batch)
    got = train.forward(small_static, frozen)(small, batch)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
