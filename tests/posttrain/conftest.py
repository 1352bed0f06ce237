"""Layers whose inputs are skewed and correlated, as those of language models are."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.calibration import Inputs


def _layer(rows: int, columns: int, samples: int = 0, seed: int = 0):
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples or 4 * rows, rows))
    x = x @ random.standard_normal((rows, rows)) * random.lognormal(size=rows)
    x = x / np.sqrt(rows)
    w = random.standard_normal((rows, columns)).astype(np.float32)
    gram = (x.T @ x / len(x)).astype(np.float32)
    inputs = Inputs(
        jnp.float32(len(x)),
        square=jnp.asarray(gram.diagonal()),
        gram=jnp.asarray(gram),
    )
    return jnp.asarray(w), inputs


@pytest.fixture(scope="session")
def layer():
    """`layer(rows, columns, samples, seed)` gives weights `[K, N]` and their inputs."""
    return _layer
