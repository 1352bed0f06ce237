"""Examples of the kernels, which lie outside of the folders that pytest looks through."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp

NAMES = ("bitmap_matmul", "block_sparse_matmul", "masked_matmul", "nm_matmul")


def test_every_kernel_is_here():
    public = [n for n in vars(jp.kernels) if n.endswith("matmul")]
    assert sorted(public) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    module = importlib.import_module(f"jaxprune.kernels.{name}.api")
    globs = {"jax": jax, "jnp": jnp, "jp": jp}
    found = doctest.testmod(module, extraglobs=globs)
    assert found.attempted and not found.failed
